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

    from common.lm.cuda_graph import Recorded
    from common.lm.hidden_states import at_last_token, last_hidden, pad_right
    from common.lm.scalar_head import apply_head, load_head

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

    @torch.no_grad()
    def score(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (apply_head(head, at_last_token(last_hidden(model, ids, mask), mask)),)

    recorded = Recorded(model, score, "the reward model's pass") if torch.cuda.is_available() else score
    seconds = []
    for number in range(COMPLETIONS):
        row = [1 + number] * 16 + [2 + number] * length
        started = time.perf_counter()
        recorded(*pad_right([row], 0, model.device))[0].tolist()  # floats, so the GPU is done
        seconds.append(time.perf_counter() - started)
    seconds = seconds[WARMUP:]
    write_result(result, seconds, [length] * len(seconds), str(model.dtype))


if __name__ == "__main__":
    main()
