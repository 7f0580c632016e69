"""Measure runs of runs.json on this GPU: the peak memory and the seconds of a step, through the recipes.

    python tests/common/plan/measure.py OUT_FOLDER NAME NAME+NAME+NAME

Each argument is a process of its own, which takes its runs one after the other. AT_ONCE of them (13) run side by side
as far as the GPU's memory holds them, but while one times its steps the others are stopped. A checkpoint of the model's
true shape is made on the spot, with random weights; a run's `layers` are those of it that are kept. OUT_FOLDER gets a
file of each run, and a table is printed last. RUNS=FILE takes the runs from another file; SMALL=1 shrinks every model,
to try this on a CPU; with ALONE=0 no run waits for the others, and times mean nothing. With `profile` a run has two
more steps, whose kernels are counted.
"""

import fcntl
import gc
import json
import os
import random
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from math import prod
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]
SMALL = bool(os.environ.get("SMALL"))
SECONDS = float(os.environ.get("SECONDS_LIMIT", 3000))
WARM_UP, TIMED, PROFILED = 2, 3, 2  # steps; of the last two the second is profiled
# A reward that differs between the completions of a group, so that there is something to learn.
REWARD = "import zlib\n\n\ndef spread(texts):\n    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]\n"
FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "gemma-2": "gemma2", "phi-3": "phi3"}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "gemma2": "Gemma2", "phi3": "Phi3"}
READY = {"qwen2-1.5b": os.environ.get("CHECKPOINT_1_5B", ""), "qwen2.5-7b": os.environ.get("CHECKPOINT_7B", "")}
AT_ONCE = int(os.environ.get("AT_ONCE", 13))
ALONE = os.environ.get("ALONE", "1") != "0"
CONTEXT = 0.6  # GiB of a process, before anything is loaded


def runs() -> dict[str, dict[str, Any]]:
    file = Path(os.environ.get("RUNS") or Path(__file__).parent / "runs.json")
    found = {run["name"]: run for run in json.loads(file.read_text(encoding="utf-8"))}
    for run in found.values() if SMALL else ():
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            if name in run["given"]:
                run["given"][name] //= 4
    return found


# --- checkpoints ------------------------------------------------------------------------------------------------------


def shape_of(model: str, layers: int | None = None) -> Any:
    from common.lm.cards import read_card

    shape = SimpleNamespace(**read_card(model).architecture.model_dump(), context=read_card(model).context)
    if layers:
        shape.layers = layers
    if SMALL:
        shape.__dict__.update(hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2, head_dim=32)
        shape.__dict__.update(vocab_size=4096)
    return shape


def make_checkpoint(model: str, folder: Path, layers: int | None = None) -> None:
    """A checkpoint whose weights are zeros that take no disk; `randomize` fills them once they are loaded."""
    family = next(kind for prefix, kind in FAMILIES.items() if model.startswith(prefix))
    s = shape_of(model, layers)
    h, i, a, kv = s.hidden_size, s.intermediate_size, s.heads * s.head_dim, s.kv_heads * s.head_dim
    tensors = {"model.embed_tokens.weight": [s.vocab_size, h], "model.norm.weight": [h]}
    for n in range(s.layers):
        layer = {"input_layernorm": [h], "post_attention_layernorm": [h]}
        layer |= {"self_attn.o_proj": [h, a], "mlp.down_proj": [h, i]}
        if family == "phi3":
            layer |= {"self_attn.qkv_proj": [a + 2 * kv, h], "mlp.gate_up_proj": [2 * i, h]}
        else:
            layer |= {"self_attn.q_proj": [a, h], "self_attn.k_proj": [kv, h], "self_attn.v_proj": [kv, h]}
            layer |= {"mlp.gate_proj": [i, h], "mlp.up_proj": [i, h]}
        if family == "qwen3":
            layer |= {"self_attn.q_norm": [s.head_dim], "self_attn.k_norm": [s.head_dim]}
        if family == "gemma2":
            layer |= {"pre_feedforward_layernorm": [h], "post_feedforward_layernorm": [h]}
        tensors |= {f"model.layers.{n}.{name}.weight": size for name, size in layer.items()}
        if family == "qwen2":
            biases = {"q": a, "k": kv, "v": kv}
            tensors |= {f"model.layers.{n}.self_attn.{name}_proj.bias": [size] for name, size in biases.items()}
    if not s.tied_embeddings:
        tensors["lm_head.weight"] = [s.vocab_size, h]
    header, at = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + 2 * prod(size)]}
        at += 2 * prod(size)
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows of zeros are refused as untrained tokens
            if name in header:
                stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                some = b"".join(random.choice((b"\x00\x3c", b"\x00\xbc", b"\x80\x3c")) for _ in range(4096))
                stream.write(some * h)  # the first 4096 rows, which the tokens of the tiny tokenizer are
    config = {
        "architectures": [f"{CLASSES[family]}ForCausalLM"], "model_type": family, "dtype": "bfloat16",
        "hidden_act": "gelu_pytorch_tanh" if family == "gemma2" else "silu", "hidden_size": h, "intermediate_size": i,
        "num_hidden_layers": s.layers, "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim, "vocab_size": s.vocab_size, "max_position_embeddings": min(s.context, 32768),
        "tie_word_embeddings": s.tied_embeddings, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "use_cache": True,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "pad_token_id": 2045, "eos_token_id": 2047,
        "bos_token_id": 2046,
    }  # fmt: skip
    if family == "gemma2":
        config |= {"query_pre_attn_scalar": s.head_dim, "sliding_window": 4096, "attn_logit_softcapping": 50.0}
        config |= {"final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"}
    if family.startswith("qwen"):
        config["use_sliding_window"] = False
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "data_samples" / "tiny" / name, folder)


def checkpoint(run: dict[str, Any], scratch: Path) -> Path:
    model, layers = run["model"], run.get("layers")
    ready = READY.get(model)
    if ready and not layers and Path(ready, "config.json").exists() and not SMALL:
        return Path(ready)
    folder = scratch / "checkpoints" / (f"{model}-{layers}-layers" if layers else model)
    with (scratch / "checkpoints.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            make_checkpoint(model, folder, layers)
    return folder


def randomize(model: Any) -> None:
    """Random values for the zeros, the same in every run: a GPU multiplies zeros with less power, and faster."""
    import torch

    quantized, draws = [], torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if type(parameter).__name__ == "Params4bit":
                quantized.append(parameter)
            elif parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 0.02, generator=draws)
            elif "norm" in name and parameter.is_floating_point():
                parameter.fill_(1)
        for parameter in quantized:
            import bitsandbytes

            state = parameter.quant_state
            values = torch.randn(state.shape, device=parameter.device, dtype=torch.bfloat16, generator=draws) * 0.02
            packed, new = bitsandbytes.functional.quantize_4bit(
                values, blocksize=state.blocksize, quant_type="nf4", compress_statistics=True
            )
            parameter.data.copy_(packed.view_as(parameter.data))
            state.absmax.copy_(new.absmax)
            state.offset.copy_(new.offset)
            state.state2.absmax.copy_(new.state2.absmax)
            del values, packed, new


# --- one run ----------------------------------------------------------------------------------------------------------


def timed_steps(run: dict[str, Any]) -> int:
    """Steps that are timed: whole rounds of GRPO with several iterations."""
    if not ALONE:
        return 1
    return TIMED * run["given"].get("num_iterations", 1)


def digits(draw: random.Random, tokens: int) -> str:
    return " ".join(str(draw.randrange(10)) for _ in range(tokens // 2))  # a digit and a space, a token each


def rows_of(run: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows that are as long as the run's lengths or longer, or documents of log-normal length where it packs."""
    draw, given, method = random.Random(0), run["given"], run["method"]
    length = given.get("max_length") or given["max_prompt_length"]
    steps = WARM_UP + timed_steps(run) + PROFILED + 1
    count = steps * given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] + 12
    if run.get("packed"):
        count *= max(1, length // 150)
    rows = []
    for number in range(count):
        if method == "sft":
            tokens = max(int(draw.lognormvariate(5.5, 0.8)), 32) if run.get("packed") else 2 * length
            rows.append({"prompt": "Continue.", "completion": digits(draw, tokens)})
        elif method == "dpo" or (method == "reward" and run.get("pairs")):
            sides = {side: digits(draw, 2 * length) for side in ("chosen", "rejected")}
            rows.append({"prompt": f"Continue {number}.", **sides})
        elif method == "kto":
            rows.append(
                {"prompt": f"Continue {number}.", "completion": digits(draw, 2 * length), "label": number % 2 == 1}
            )
        elif method == "reward":
            rows.append({"prompt": f"Rate {number}.", "response": digits(draw, 2 * length), "score": number % 5})
        else:
            rows.append({"prompt": prompt_of(draw, number, length, tokenizer), "answer": str(number)})
    return rows


def prompt_of(draw: random.Random, number: int, length: int, tokenizer: Any) -> str:
    """A prompt that is `length` tokens or one less in the chat template."""
    text, kept, tokens = digits(draw, 2 * length), length, length + 1
    while tokens > length and kept > 0:
        prompt = f"What is {number} + {text[:kept]}?"
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        tokens, kept = len(ids), kept - max(1, len(ids) - length)
    return prompt


def words_of(run: dict[str, Any], source: Path, data: Path, output: Path) -> list[str]:
    given = dict(run["given"])
    given |= {
        "model": str(source),
        "data": str(data),
        "output_dir": str(output),
        "max_steps": WARM_UP + timed_steps(run) + PROFILED + 1,
    }
    given |= {"logging_steps": 1, "save_steps": 1_000_000, "max_truncated": 1.0}
    if run["method"] in ("grpo", "ppo"):
        (output.parent / "spread.py").write_text(REWARD, encoding="utf-8")
        given["rewards"] = ("math", f"{output.parent / 'spread.py'}:spread")
    given |= {"eval_ratio": 0.0} if run["method"] in ("reward", "ppo") else {}
    given |= {} if run["method"] == "reward" else {"sample_prompts": 0}
    if run["method"] == "ppo":
        given["critic_warmup_steps"] = 0
    if SMALL:  # fp8 and nf4 need a GPU
        given["load_in_4bit"] = False
        given.pop("load_in_fp8", None)
    words: list[str] = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


class Enough(BaseException):
    """The last step to measure is done."""


class Worker:
    """A process that measures a run."""

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out, self.scratch = out, scratch
        self.record: dict[str, Any] = {}
        self.lock: Any = None

    def main(self, names: list[str]) -> None:
        began, known = time.time(), runs()
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(self.scratch / f"unsloth-{names[0]}")
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        os.environ["UNSLOTH_BLOCK_COMPILE_DEBUG"] = "1"
        if known[names[0]]["method"] in ("grpo", "ppo"):  # as their recipes set it, before the import
            os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
        import common.lm.hub as hub
        from common import environment

        hub.base_sha256 = lambda *_: "0" * 64  # hashing takes longer than the run
        first = hub.find_model(str(checkpoint(known[names[0]], self.scratch)))
        reference = known[names[0]]["method"] in ("dpo", "kto")  # as their recipes say it, before the import
        environment.set_variables(models=[first], sources=[], reference=reference)
        import unsloth  # noqa: I001  first
        import torch

        self.torch, self.on_gpu = torch, torch.cuda.is_available()
        self.hook(unsloth)
        for name in names:
            self.started = began
            self.record = {"name": name, "import_s": round(time.time() - began, 1), "marks": [], "ok": False}
            self.profiler: Any = None
            try:
                self.wait_for_memory(known[name])
                self.measure(known[name])
            except Enough:
                pass
            except BaseException as error:  # noqa: BLE001  whatever it is, it is reported
                self.record["error"] = f"{type(error).__name__}: {error}"[:300]
                traceback.print_exc()
            self.release()
            self.read_losses(name)
            self.save()
            sys.stdout.flush()
            began = time.time()
            self.clear()
        os._exit(0)

    def clear(self) -> None:
        """Leave nothing of a run on the GPU for the next one."""
        gc.collect()
        self.torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            self.torch.cuda.empty_cache()

    def read_losses(self, name: str) -> None:
        """The loss and the gradient's norm of each step, as the recipe has logged them."""
        metrics = self.scratch / name / "run" / "metrics.jsonl"
        if metrics.exists():
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            kept = [row for row in rows if "loss" in row]
            for key in ("loss", "grad_norm"):
                self.record[key] = [round(float(row.get(key, 0)), 6) for row in kept]
            for key in kept[-1] if kept else ():
                if key.startswith(("time/", "rollout/")):
                    self.record.setdefault("phases", {})[key] = [row.get(key) for row in kept]

    def wait_for_memory(self, run: dict[str, Any]) -> None:
        """Wait until the GPU's memory holds this run beside those that have begun."""
        if not self.on_gpu:
            return
        total = self.torch.cuda.get_device_properties(0).total_memory / 2**30 - CONTEXT * AT_ONCE
        file, wanted = self.scratch / "memory.json", 1.1 * run.get("predicted", run.get("measured", 20)) + 0.5
        while True:
            with (self.scratch / "memory.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                taken = json.loads(file.read_text()) if file.exists() else {}
                taken = {pid: gib for pid, gib in taken.items() if Path("/proc", pid, "exe").exists()}
                taken.pop(str(os.getpid()), None)
                if not taken or sum(taken.values()) + wanted <= total:
                    file.write_text(json.dumps(taken | {str(os.getpid()): wanted}))
                    return
            time.sleep(0.3)

    def measure(self, run: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        torch = self.torch
        source = checkpoint(run, self.scratch)
        self.run, self.last = run, time.time()
        self.timed, self.rounds = timed_steps(run), run["given"].get("num_iterations", 1) > 1
        self.zeros = source.parent == self.scratch / "checkpoints"
        if self.on_gpu:
            properties = torch.cuda.get_device_properties(0)
            total, limit = properties.total_memory, run.get("limit", 80) * 2**30
            self.record["device"] = properties.name
            self.limit, self.total = min(limit, total), total
            torch.cuda.set_per_process_memory_fraction(self.limit / total if "limit" in run else 1.0)
            torch.cuda.reset_peak_memory_stats()
        self.mark("before")
        folder = self.scratch / run["name"]
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "rows.jsonl"
        rows = rows_of(run, AutoTokenizer.from_pretrained(source))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = words_of(run, source, data, folder / "run")
        if run.get("reward_model"):
            words += ["--reward-model", str(self.reward_model(run, source, folder))]
        recipe = str(ROOT / "recipes" / f"{run['method']}.py")
        sys.argv = [recipe, *words]
        runpy.run_path(recipe, run_name="__main__")

    def reward_model(self, run: dict[str, Any], source: Path, folder: Path) -> Path:
        """A reward model of one step, from a process of its own."""
        data = folder / "scores.jsonl"
        rows = [{"prompt": f"What is {n}?", "response": str(n), "score": n} for n in range(4)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = ["--model", source, "--data", data, "--output-dir", folder / "reward", "--max-steps", 1]
        words += ["--eval-ratio", 0, "--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 1]
        words += ["--load-in-4bit" if run["given"]["load_in_4bit"] and not SMALL else "--no-load-in-4bit"]
        environment = {**os.environ, "UNSLOTH_BLOCK_COMPILE": "0"}  # for one step
        paths = [str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")]
        recipe = str(ROOT / "recipes" / "reward.py")
        code = "import runpy, sys, common.lm.hub as hub; hub.base_sha256 = lambda *_: '0' * 64; del sys.argv[0]; "
        subprocess.run(
            [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')", recipe, *map(str, words)],
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
        )
        return folder / "reward"

    def hook(self, unsloth: Any) -> None:
        """Read the counters at every step, and fill a checkpoint of zeros once it is loaded."""
        from common.lm.rollout import rollouts
        from common.run.metrics import ProgressCallback

        torch = self.torch
        begin, end = ProgressCallback.on_train_begin, ProgressCallback.on_step_end
        load, sample = unsloth.FastLanguageModel.from_pretrained, rollouts.Rollouts.sample
        worker = self
        if self.on_gpu:
            torch.cuda.mem_get_info = lambda device=None: (
                int(max(worker.limit - torch.cuda.memory_reserved() - 0.5 * 2**30, 0)),
                worker.total,
            )

        def on_train_begin(callback, args, state, control, **more):
            worker.mark("train begin")
            worker.last = time.time()
            return begin(callback, args, state, control, **more)

        def on_step_end(callback, args, state, control, **more):
            worker.step(state.global_step)
            result = end(callback, args, state, control, **more)
            worker.last = time.time()
            return result

        def from_pretrained(*args, **more):
            loaded = load(*args, **more)
            worker.mark("loaded")
            if worker.zeros:
                randomize(loaded[0])
                if worker.on_gpu:
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
            return loaded

        def timed_sample(self, *args, **more):
            worker.mark("sample begin")
            started = time.time()
            result = sample(self, *args, **more)
            worker.record.setdefault("sample_s", []).append(round(time.time() - started, 3))
            worker.record |= {"kept": self.weights is not None, "backend": self.backend}
            worker.record["completion_tokens"] = sum(len(one.completion_ids) for one in result)
            worker.mark("sample end")
            return result

        ProgressCallback.on_train_begin, ProgressCallback.on_step_end = on_train_begin, on_step_end
        unsloth.FastLanguageModel.from_pretrained = staticmethod(from_pretrained)
        rollouts.Rollouts.sample = timed_sample

    def step(self, number: int) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
        self.record.setdefault("step_s", []).append(round(time.time() - self.last, 4))
        self.mark(f"step {number}")
        if number == WARM_UP and ALONE:
            self.alone()
        if number < WARM_UP + self.timed:
            return
        if number == WARM_UP + self.timed:
            self.record |= {"ok": True, "seconds": self.seconds(self.record["step_s"][WARM_UP:])}
            self.save()
            if not (self.run.get("profile") and self.on_gpu):
                raise Enough
        if number == WARM_UP + self.timed + PROFILED - 1:
            activities = [self.torch.profiler.ProfilerActivity.CUDA]
            self.profiler = self.torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        if number == WARM_UP + self.timed + PROFILED:
            self.profiler.__exit__(None, None, None)
            self.release()
            self.kernels()
            raise Enough

    def kernels(self) -> None:
        """How long the GPU computes in a step, and by which kernels."""
        found = [one for one in self.profiler.key_averages() if one.device_type.name == "CUDA"]
        found.sort(key=lambda one: -one.self_device_time_total)
        self.record["busy_s"] = round(sum(one.self_device_time_total for one in found) / 1e6, 4)
        self.record["launches"] = sum(one.count for one in found)
        top = [(one.key[:90], one.count, round(one.self_device_time_total / 1e3, 2)) for one in found[:60]]
        self.record["kernels"] = top

    def seconds(self, timed: list[float]) -> float:
        """The median; the mean where a rollout is for several steps."""
        return mean(timed) if self.rounds else median(timed)

    def alone(self) -> None:
        """Wait for the turn to time steps, and stop the other workers."""
        self.lock = (self.scratch / "timing.lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        signal_others(self.scratch, signal.SIGSTOP)
        time.sleep(0.3)

    def release(self) -> None:
        if self.lock is not None:
            signal_others(self.scratch, signal.SIGCONT)
            self.lock.close()
            self.lock = None

    def mark(self, label: str) -> None:
        cuda = self.torch.cuda
        counters = (cuda.memory_allocated, cuda.memory_reserved, cuda.max_memory_allocated, cuda.max_memory_reserved)
        numbers = [round(count() / 2**30, 3) for count in counters] if self.on_gpu else [0.0] * 4
        self.record["marks"].append([label, round(time.time() - self.started, 2), *numbers])
        self.record["allocated"] = max(self.record.get("allocated", 0), numbers[2])
        self.record["peak"] = max(self.record.get("peak", 0), numbers[3])
        self.save()

    def save(self) -> None:
        part = self.out / f"{self.record['name']}.part"
        part.write_text(json.dumps(self.record), encoding="utf-8")
        part.replace(self.out / f"{self.record['name']}.json")


def signal_others(scratch: Path, what: signal.Signals) -> None:
    for file in (scratch / "pids").iterdir():
        if int(file.name) != os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(int(file.name), what)


# --- all of them ------------------------------------------------------------------------------------------------------


def driver(out: Path, names: list[str]) -> None:
    started, scratch = time.time(), Path(os.environ.get("SCRATCH", "/tmp/plan-measure"))
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "pids").mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    waiting, workers = list(names), []
    while (waiting or workers) and time.time() - started < SECONDS:
        time.sleep(0.2)
        if somebody_times(scratch):
            continue
        for worker in [worker for worker in workers if worker.poll() is not None]:
            workers.remove(worker)
            (scratch / "pids" / str(worker.pid)).unlink()
            signal_others(scratch, signal.SIGCONT)  # it may have ended while the others were stopped
        while waiting and len(workers) < AT_ONCE:
            workers.append(start(waiting.pop(0), out, scratch))
    for worker in workers:  # and what it has started, which would write where the next call removes
        os.killpg(worker.pid, signal.SIGKILL)
    table(out, [name for together in names for name in together.split("+")])


def somebody_times(scratch: Path) -> bool:
    with (scratch / "timing.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def start(names: str, out: Path, scratch: Path) -> "subprocess.Popen[bytes]":
    """A process that measures these runs; its compiler's processes are stopped with it."""
    threads = os.environ.get("COMPILE_THREADS", "4")
    name = names.split("+")[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = threads
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # whose locks a stopped process would hold
        environment[cache] = str(scratch / name / cache.split("_")[0].lower())
    command = [sys.executable, __file__, "worker", str(out), str(scratch), names]
    with (out / f"{name}.log").open("w") as log:
        worker = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    (scratch / "pids" / str(worker.pid)).touch()
    return worker


def table(out: Path, names: list[str]) -> None:
    known = runs()
    for name in names:
        file, run = out / f"{name}.json", known[name]
        if not file.exists():
            print(f"{name:40s} not started")
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        device = "h200" if "H200" in found.get("device", "") else "h100"
        peak, seconds = found.get("peak") or 1e9, found.get("seconds") or 1e9
        planned, expected = run.get("predicted", 0), run.get("predicted_seconds", {}).get(device, 0)
        print(f"{name:24s} {'ok ' if found['ok'] else 'BAD'}", end=" ")
        print(
            f"peak {peak:7.3f} planned {planned:7.3f} {planned / peak - 1:+6.1%} allocated {found['allocated']:7.3f}",
            end=" ",
        )
        print(f"| step {seconds:7.3f} planned {expected:7.3f} {expected / seconds - 1:+6.1%}", end=" ")
        print(f"{found.get('step_s')} sample {found.get('sample_s', [])[-1:]} kept {found.get('kept')}", end=" ")
        print(f"busy {found.get('busy_s')} {found.get('launches')}", end=" ")
        print(found.get("error", "")[:100])


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _, _, folder, scratch, names = sys.argv
        Worker(Path(folder), Path(scratch)).main(names.split("+"))
    else:
        driver(Path(sys.argv[1]), sys.argv[2:])
