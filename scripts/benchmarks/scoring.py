"""Score one completion by a reward model as PPO does, which is one more adapter on the policy's base.

python -m benchmarks.scoring JOB.json RESULT.json REWARD_FOLDER
"""

import sys
import time
from pathlib import Path

from benchmarks.peer import write_result
from benchmarks.workloads import RANK, Job

COMPLETIONS, WARMUP = 60, 10


def main() -> None:
    job, result, reward = Job.read(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    import unsloth  # noqa: F401, I001  first
    import torch
    from peft import PeftConfig
    from unsloth import FastLanguageModel

    from common.lm.cuda_graph import RecordedPass
    from common.lm.scalar_head import load_head, score_last

    length = job.workload.length
    model, _ = FastLanguageModel.from_pretrained(
        str(job.checkpoint),
        max_seq_length=2 * length,
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        load_in_4bit=job.workload.load_in_4bit,
        use_exact_model_name=True,
    )
    adapted = list(PeftConfig.from_pretrained(str(reward / "adapter")).target_modules)
    model = FastLanguageModel.get_peft_model(model, r=RANK, target_modules=adapted)  # the policy, at rest
    model.load_adapter(str(reward / "adapter"), adapter_name="reward")
    model.set_adapter("reward", inference_mode=True)
    head, _ = load_head(reward / "adapter", model.device)
    backbone = RecordedPass(model)
    seconds = []
    for number in range(COMPLETIONS):
        row = ([1 + number] * 16, [2 + number] * length)
        started = time.perf_counter()
        score_last(model, head, [row], 0, backbone=backbone)  # it returns floats, so the GPU is done
        seconds.append(time.perf_counter() - started)
    seconds = seconds[WARMUP:]
    write_result(result, seconds, [length] * len(seconds), str(model.dtype))


if __name__ == "__main__":
    main()
