"""The gate: what leaves is what was trained. An export is done when every check here has passed.

Compared are the trained model (the adapter on its base, by transformers and PEFT), the merged folder, and every GGUF
file as llama.cpp itself reads it. First tokens: conversations become the same token ids everywhere, and the token that
ends an answer stops. Then weights: log-probabilities on fixed texts agree, within `BOUNDS`. docs/export.md has a table.
Models are loaded one after the other, never two at once. The first difference is raised.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge import check_prompts, greedy, log_probs, prompt_ids, widen

from exporting import llama_cpp
from exporting.gate_tokens import Difference, check_file, check_folder, read_conversations
from exporting.merged import Trained, trained_tokenizer
from exporting.quantize import WIDE
from exporting.tensors import BOUNDS as WEIGHTS
from exporting.tensors import tensor_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Bound:
    """How far log-probabilities may be from those they are compared with: the mean KL in nats at most, and the share of
    positions with the same likeliest token at least, of those where the second is MARGIN nats behind."""

    kl: float
    top1: float


MARGIN = 0.1
# docs/export.md has what right and wrong exports measure.
MERGED = Bound(0.01, 0.97)
CHANGE = 0.1  # and at most this part of the KL between trained model and base
BOUNDS = {
    "f16": Bound(1e-3, 0.97),
    "bf16": Bound(1e-3, 0.97),
    "q8_0": Bound(0.02, 0.9),
    "q6_k": Bound(0.05, 0.85),
    "q5": Bound(0.1, 0.8),
    "q4": Bound(0.3, 0.7),
    "q3": Bound(0.5, 0.6),
    "q2": Bound(1.0, 0.5),
}


@dataclass
class Exported:
    """The files of an export: `gguf` is {quantization: file}, the 16-bit one first; `modelfile` is a text."""

    merged: Path
    gguf: dict[str, Path] = field(default_factory=dict)
    modelfile: str | None = None


def check(trained: Trained, exported: Exported, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Compare `exported` with what was trained; returns what was measured. Raises Difference at the first."""
    texts = read_conversations(trained_tokenizer(trained))
    check_folder(exported.merged, texts)
    for kind, file in exported.gguf.items():
        check_file(file, texts, exported.modelfile if kind == next(iter(exported.gguf)) else None)
    report(f"Tokens: {len(texts.found)} conversations are the same everywhere, and {texts.end} stops")
    measured = check_weights(trained, exported, report)
    return {"conversations": [*texts.found], "refused by the template": texts.refused, "end": texts.end, **measured}


def check_weights(trained: Trained, exported: Exported, report: Callable[[str], None]) -> dict[str, Any]:
    """Compare log-probabilities after held-out prompts of the run and their greedy answers; returns the figures."""
    import torch

    paths, reference, base, dtype = _of_trained(trained)
    merged = _of_folder(exported.merged, paths)
    change = divergence(reference, base)["kl"] if base else None
    found = divergence(reference, merged)
    measured: dict[str, Any] = {
        "tokens": sum(map(len, reference)),
        "dtype": dtype,
        "adapter": {"kl of the base": change},
    }
    if base and all(torch.equal(one, other) for one, other in zip(base, merged, strict=True)):
        raise Difference(
            f"{exported.merged} computes what the base computes: the base was exported, not what was trained"
        )
    _judge(exported.merged.name, found, MERGED, "the adapter on its base" if base else "the trained model", change)
    report(f"merged: {_words(found)}, against the trained model" + (f"; the base: KL {change:.2g}" if base else ""))
    measured["merged"] = found
    half, wide = merged, None  # those of the 16-bit file that the others were made of, and that file
    for kind, file in exported.gguf.items():
        with llama_cpp.quiet(), llama_cpp.weights(file, context=_room(paths)) as model:
            rows = [torch.from_numpy(model.log_probs(ids, len(one))) for ids, one in zip(paths, reference, strict=True)]
        before, what, errors = merged, "the merged model", {}
        if wide and kind not in WIDE:
            before, what, errors = half, wide.name, check_tensors(wide, file)  # which names the tensor: so first
        found = divergence(before, rows)
        _judge(file.name, found, bound(kind), what)
        report(f"{kind}: {_words(found)}, against {what}")
        measured[kind] = {**found, "largest error of weights": errors} if errors else found
        if not wide:
            half, wide = rows, file
    return measured


def check_tensors(wide: Path, file: Path) -> dict[str, float]:
    """Raise Difference where a tensor of `file` is not that of `wide`, quantized; returns {type: largest error}.

    One broken matrix of a large model may hardly be seen in its log-probabilities.
    """
    worst: dict[str, float] = {}
    for name, kind, error in tensor_errors(wide, file):
        if not error <= WEIGHTS[kind]:  # also where it is not a number
            raise Difference(
                f"{file.name}: {name}, of type {kind}, is not that of {wide.name}: its weights differ by {error:.1%}, "
                f"and quantizing changes at most {WEIGHTS[kind]:.1%}"
            )
        worst[kind] = max(error, worst.get(kind, 0.0))
    return worst


def bound(kind: str) -> Bound:
    """The bound of a quantization."""
    return BOUNDS.get(kind) or BOUNDS[kind[:2]]


def divergence(reference: "Sequence[torch.Tensor]", other: "Sequence[torch.Tensor]") -> dict[str, float]:
    """How far `other` is from `reference`, both log-probabilities (T, V): mean and largest KL, and top-1 agreement."""
    import torch

    a, b = torch.cat(list(reference)).double(), torch.cat(list(other)).double()  # (N, V)
    a, b = a[:, : b.shape[1]], b[:, : a.shape[1]]  # of one vocabulary, which tokens were added to later
    kl = (a.exp() * (a - b)).nan_to_num(nan=torch.inf).sum(-1).clamp(min=0)
    best = a.topk(2, dim=-1).values
    same = (a.argmax(-1) == b.argmax(-1))[best[:, 0] - best[:, 1] > MARGIN]
    top1 = float(same.double().mean()) if len(same) else 1.0
    return {"kl": float(kl.mean()), "largest kl": float(kl.max()), "top1": top1}


def _judge(name: str, found: dict[str, float], limit: Bound, what: str, change: float | None = None) -> None:
    """Raise Difference where `found` is beyond its limit."""
    kl = limit.kl if change is None else min(limit.kl, CHANGE * change + 1e-3)
    if not (found["kl"] <= kl and found["top1"] >= limit.top1):  # also where one is not a number
        against = f"; the base alone is {change:.2g} nats from it" if change is not None else ""
        raise Difference(
            f"{name} is not what was trained: its log-probabilities are {found['kl']:.2g} nats (KL) from those of "
            f"{what}, and {found['top1']:.1%} of the likeliest tokens are the same; at most {kl:.2g} and at least "
            f"{limit.top1:.0%} are right{against}"
        )


def _words(found: dict[str, float]) -> str:
    return (
        f"KL {found['kl']:.2g} nats ({found['largest kl']:.2g} at most), {found['top1']:.1%} the same likeliest token"
    )


def _of_trained(trained: Trained) -> tuple[list[list[int]], list, list | None, str]:
    """The texts in tokens; the log-probabilities of the trained model and, if it has one, of its base; the dtype."""
    from common.lm.merge import put_on
    from merge import load_tokenizers

    source = trained.base if trained.adapter else trained.whole
    assert source
    tokenizer, model = trained_tokenizer(trained), _load(source.source, source.revision)
    if trained.adapter and trained.base:
        model = put_on(model, trained.adapter, load_tokenizers(trained.base, trained.adapter)[1])
    prompts = check_prompts(trained.adapter or trained.folder / "model")
    paths = [greedy(model, prompt_ids(tokenizer, turns)) for turns in prompts]
    rows = [log_probs(model, ids) for ids in paths]
    dtype, base = str(model.dtype).removeprefix("torch."), None
    if trained.adapter:
        with model.disable_adapter():
            base = [log_probs(model, ids) for ids in paths]
    elif trained.base:
        del model
        gc.collect()
        base = [log_probs(_load(trained.base.source, trained.base.revision), ids) for ids in paths]
    return paths, rows, base, dtype


def _of_folder(folder: Path, paths: list[list[int]]) -> list:
    gc.collect()
    model = _load(str(folder), None)
    return [log_probs(model, ids) for ids in paths]


def _load(source: str, revision: str | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return widen(
        AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype="auto", trust_remote_code=False)
    ).eval()


def _room(paths: list[list[int]]) -> int:
    """Tokens that llama.cpp computes at once: the longest text, in whole blocks of 256."""
    return -(-max(map(len, paths)) // 256) * 256
