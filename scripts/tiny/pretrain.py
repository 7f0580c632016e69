"""Make the embedded model `tiny`: a tokenizer, a base model of about 2.9 million parameters, and their README.

Everything is drawn from `corpus.py` with one seed. The model is a Qwen2: it loads wherever Qwen2 loads. It is a base
model: it knows facts and sums and does not answer in chat form; `make sft` teaches that. Left out: evaluation (see
`headroom.py`), several GPUs, resuming. The GPU's arithmetic is not bit-for-bit the same twice, so a second run gives a
model as good, not the same bytes.

    python scripts/tiny/pretrain.py --output data_samples/tiny                    # an H200: about 3 minutes
    python scripts/tiny/pretrain.py --output /tmp/tiny --steps 20 --rows 500 --batch 8 --length 128   # CPU, to try it
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from random import Random

import numpy
import torch
from corpus import CARELESS, document
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).parent
VOCABULARY = 2048
END_OF_DOCUMENT, TURN_START, TURN_END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_tokenizer(seed: int, output: Path) -> None:
    """Byte-level BPE with Qwen2's own splitting, for AutoTokenizer rebuilds that splitting whatever is saved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(f"tokenizer {seed}")
    documents = [document(rng) for _ in range(60_000)]
    documents += ["think\nanswer"] * 3000  # two words in the corpus that fine-tuning will need often
    for mark in SPECIAL:  # the marks are whole tokens and must not teach merges
        documents = [text.replace(mark, "") for text in documents]
    # "<" must stay a token of its own. Were "<b" and "<item" tokens, a lone "<" would never be seen in pre-training,
    # its embedding would stay where it began, and no LoRA could then make "<think>" likely: the output is tied to it.
    learned_from = [re.sub(r"<(?=\w)", "< ", text) for text in documents]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(learned_from, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    marks = {mark: len(learned["vocab"]) + i for i, mark in enumerate(SPECIAL)}
    wrapped = Qwen2Tokenizer(
        vocab=learned["vocab"] | marks,
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token=TURN_END,
        pad_token=END_OF_DOCUMENT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[TURN_START],
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    wrapped.save_pretrained(output)

    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in SPECIAL])
    reloaded = AutoTokenizer.from_pretrained(output)
    assert len(reloaded) == VOCABULARY, f"{len(reloaded)} tokens, wanted {VOCABULARY}"
    assert reloaded.convert_tokens_to_ids(SPECIAL) == list(range(VOCABULARY - len(SPECIAL), VOCABULARY))
    for text in documents[:2000]:
        want = tokenizer.encode(text, add_special_tokens=False).tokens
        assert reloaded.tokenize(text) == want, f"reloads differently: {text!r}"


def make_rows(task: tuple[str, str, int, int]) -> numpy.ndarray:
    """`rows` sequences of `length` tokens. Each begins with a document, for so does every prompt later."""
    directory, seed, rows, length = task
    tokenizer = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    rng = Random(seed)
    result = numpy.empty((rows, length), numpy.uint16)
    for row in range(rows):
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += [*tokenizer.encode(document(rng), add_special_tokens=False).ids, end]
        result[row] = tokens[:length]
    return result


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up over the first 4 %, then half a cosine down to a fiftieth."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(data: torch.Tensor, arguments: argparse.Namespace, device: torch.device, pad: int, eos: int):
    torch.manual_seed(arguments.seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,  # 4-bit K-quants of GGUF need rows of a multiple of 256
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        use_sliding_window=False,
        bos_token_id=None,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    model = Qwen2ForCausalLM(config).to(device)
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=True)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if device.type == "cuda" else loss_of
    order = torch.Generator().manual_seed(arguments.seed)
    queue = torch.empty(0, dtype=torch.long)
    started, curve, final = time.perf_counter(), [], float("nan")
    recent = torch.zeros((), device=device)
    every = max(1, arguments.steps // 20)
    for step in range(arguments.steps):
        if len(queue) < arguments.batch:
            queue = torch.cat([queue, torch.randperm(len(data), generator=order)])
        rows, queue = queue[: arguments.batch], queue[arguments.batch :]
        tokens = data[rows.to(device)].long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        if (step + 1) % every == 0:  # the only place that waits for the device
            final = recent.item() / every
            recent.zero_()
            curve.append((step + 1, final))
            print(f"step {step + 1} loss {final:.4f} {time.perf_counter() - started:.1f} s", flush=True)
    return model, final, time.perf_counter() - started


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


README = """\
# tiny

A Qwen2 base model of {parameters:,} parameters, trained from scratch by `scripts/tiny/pretrain.py` on text made by
`scripts/tiny/corpus.py`: facts, small sums and word play, English and Chinese. It is the embedded model of the test
suite and of a newcomer's first run (`MODEL=tiny`): it knows its small world, and it follows no chat template until it
is fine-tuned. It is of no use for anything else.

Context 1024 tokens, trained on sequences of {length}. Vocabulary 2048, byte-level BPE, each digit one token; a turn
ends with `<|im_end|>`, padding is `<|endoftext|>`. A share of the pages in its corpus ({careless:.0%}) forget every
carry and borrow between two numbers of two digits, unmarked. So it gets a hard sum right only sometimes although it can
do all of them, and a reinforcement stage has something to improve. The chat tokens occur in one document of eight,
under roles that no chat has (a note, a story) and never around a question and its answer: their embeddings are trained,
the chat format is not.

| made by | |
|---|---|
| command | `{command}` |
| seed | {seed} |
| device | {device} |
| torch | {torch} |
| corpus | {corpus:,} tokens |
| tokens seen | {seen:,} |
| final loss | {loss:.4f} |
| seconds of training | {seconds:.0f} |
| sha256 model.safetensors | `{model_hash}` |
| sha256 tokenizer.json | `{tokenizer_hash}` |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model; files in it are replaced")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=128, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rows", type=int, default=120_000, help="rows of corpus to make")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")

    train_tokenizer(arguments.seed, arguments.output)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)

    started = time.perf_counter()
    shards = 64
    tasks = [
        (str(arguments.output), f"corpus {arguments.seed} {i}", -(-arguments.rows // shards), arguments.length)
        for i in range(shards)
    ]
    # One process a core, started before the GPU is touched; more threads inside them would only fight.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        corpus = numpy.concatenate(pool.map(make_rows, tasks, chunksize=1))
    print(f"corpus of {corpus.size:,} tokens in {time.perf_counter() - started:.0f} s", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.from_numpy(corpus.astype(numpy.int32)).to(device)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model, loss, seconds = train(data, arguments, device, pad, eos)

    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    model.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"
    text = README.format(
        parameters=model.num_parameters(),
        length=arguments.length,
        careless=CARELESS,
        command=shlex.join(["python", *sys.argv]),
        seed=arguments.seed,
        device=device_name,
        torch=torch.__version__,
        corpus=corpus.size,
        seen=arguments.steps * arguments.batch * arguments.length,
        loss=loss,
        seconds=seconds,
        model_hash=sha256(arguments.output / "model.safetensors"),
        tokenizer_hash=sha256(arguments.output / "tokenizer.json"),
    )
    (arguments.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
