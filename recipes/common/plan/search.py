"""Settings under which a run fits a card, the fastest first. Standard library only."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from common.plan.devices import Device, of_size
from common.plan.memory import CUDA_CONTEXT, GIB, Memory, base_bytes, peak
from common.plan.sampling import sampling
from common.plan.time import Time, step_time
from common.plan.workload import SAMPLING, Workload, settings, workload

LEAST_ROWS = {"kto": 2}  # of a micro-batch: with one, KTO has no mismatched completion
MARGIN = 0.95  # of a card that a plan may fill: it was never too low by more than the rest (docs/plan.md)
SHORTEST = 512  # tokens; a plan does not cut rows below that
# What the plan may choose without changing what is learned: the arguments of a recipe.
PRECISION, RECOMPUTATION = ("load_in_4bit", "load_in_fp8"), ("gradient_checkpointing", "checkpoint_skip_layers")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Plan:
    """A run on a card: what it needs and how long a step takes. `changed` are the arguments that differ."""

    work: Workload
    device: Device
    memory: Memory
    time: Time
    changed: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.memory.total <= MARGIN * self.device.gib

    @property
    def total(self) -> float:
        return self.memory.total


def measure(card: Any, work: Workload, device: Device, changed: dict[str, Any] | None = None) -> Plan:
    """What `work` needs on `device`, and how long a step takes."""
    held = None
    if work.method in SAMPLING:
        weights, linear = base_bytes(card, work)
        held = sampling(card.architecture, work, weights + CUDA_CONTEXT, device.gib * GIB, linear)
    return Plan(work, device, peak(card, work, device.gib), step_time(card, work, device, held), changed or {})


def fit(
    card: Any,
    method: str,
    device: Device,
    given: dict[str, Any] | None = None,
    fixed: Collection[str] | None = None,
    **more: Any,
) -> Plan | None:
    """The fastest settings that learn the same as `given` and fit `device`; None when none does.

    16 bit or nf4, with or without recomputation, and other micro-batches of the same step. The arguments `fixed`
    stay, by default all that are given. fp8 is never chosen. `more` are fields of Workload.
    """
    given = given or {}
    work = workload(card, method, given, **more)
    return _fastest(card, work, device, given if fixed is None else fixed)


def plan(
    card: Any,
    method: str,
    device: Device,
    given: dict[str, Any] | None = None,
    fixed: Collection[str] | None = None,
    **more: Any,
) -> Plan:
    """Settings that fit `device` as `fit` finds them, and where none do with shorter rows, which cuts data.

    Where nothing fits, the smallest settings that were tried: its `fits` is False.
    """
    given = given or {}
    fixed = given if fixed is None else fixed
    work = workload(card, method, given, **more)
    shorter, changed = work, {}
    for length, changed in _longest_first(card, method, given, fixed):
        shorter = replace(work, length=length, completion=changed.get("max_completion_length", work.completion))
        if found := _fastest(card, shorter, device, fixed, changed):
            return found
    rows = LEAST_ROWS.get(method, 1)
    smallest = replace(least(shorter, fixed), rows=rows, accumulation=max(1, work.rows * work.accumulation // rows))
    return measure(card, smallest, device, changed | batch(smallest, rows))


def least(work: Workload, fixed: Collection[str] = ()) -> Workload:
    """`work` with what needs the least memory for its micro-batch: nf4, every layer recomputed; `fixed` stays."""
    if any(name in fixed for name in RECOMPUTATION):
        return work
    precision = work.precision if any(name in fixed for name in PRECISION) else "nf4"
    return replace(work, precision=precision, gradient_checkpointing=True, kept_layers=0)


def advice(card: Any, method: str, given: dict[str, Any], device: Device, **more: Any) -> list[Plan]:
    """Up to three changes of `given`, each with its plan, that would have fit; those that cost only speed first.

    Single changes, then two together, then all that cost only speed; [] where not even those fit. `more` are fields of
    Workload.
    """
    now, own = workload(card, method, given, **more), settings(card, method, given)
    single: list[dict[str, Any]] = []
    if not now.gradient_checkpointing:
        single.append({"gradient_checkpointing": True})
    if now.precision == "16 bit":
        single.append({"load_in_4bit": True})
    if now.precision == "fp8":
        single.append({"load_in_fp8": False, "load_in_4bit": True})
    rows = now.rows
    while method != "kto" and rows % 2 == 0 and rows // 2 >= LEAST_ROWS.get(method, 1):
        rows //= 2
        single.append(batch(now, rows))
    for name in ("max_length", "max_completion_length", "max_prompt_length"):
        single += [{name: own[name] // n} for n in (2, 4)] if name in own else []
    pairs = [one | other for one, other in itertools.combinations(single, 2) if not one.keys() & other.keys()]
    found: list[Plan] = []
    for changed in (*single, *pairs):
        if any(one.changed.keys() <= changed.keys() for one in found):  # a smaller change does
            continue
        tried = measure(card, workload(card, method, {**given, **changed}, **more), device, changed)
        found += [tried] if tried.fits else []
    if not found:
        saving = {**given, "load_in_4bit": True, "gradient_checkpointing": True}
        if now.precision == "fp8":
            saving["load_in_fp8"] = False
        together = plan(card, method, device, saving, fixed=PRECISION + RECOMPUTATION, **more)
        also = {name: value for name, value in saving.items() if given.get(name) != value}
        found = [replace(together, changed=also | together.changed)] if together.fits else []
    return found[:3]


def _fastest(
    card: Any, work: Workload, device: Device, fixed: Collection[str], changed: dict[str, Any] | None = None
) -> Plan | None:
    tried = [
        measure(card, one, device, {**(changed or {}), **also})
        for one, also in _variants(work, card.architecture.layers, fixed)
    ]
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return None
    # Of settings that differ in speed by less than a fiftieth: 16 bit, which is exact; then what changes less.
    best = min(plan.time.seconds for plan in fitting)
    close = [plan for plan in fitting if plan.time.seconds <= 1.02 * best]
    # Where completions are sampled most rows are shorter than planned, so that a larger micro-batch does gain.
    rows = -1 if work.method in SAMPLING else 0
    return min(
        close,
        key=lambda plan: (plan.work.precision != "16 bit", rows * plan.work.rows, len(plan.changed), plan.total),
    )


def _variants(work: Workload, layers: int, fixed: Collection[str]) -> Iterator[tuple[Workload, dict[str, Any]]]:
    """Workloads that learn the same, with the arguments that make them; the arguments `fixed` stay."""
    precisions = [work.precision]
    if work.precision != "fp8" and not any(name in fixed for name in PRECISION):
        precisions = ["16 bit", "nf4"]
    recomputed = [(False, 0), (True, 0), *((True, layers * n // 4) for n in (1, 2, 3))]
    if any(name in fixed for name in RECOMPUTATION):
        recomputed = [(work.gradient_checkpointing, work.kept_layers)]
    sizes = [work.rows]
    if work.method != "kto" and not any(name in fixed for name in BATCH):  # KTO estimates its reference from one
        sizes += [work.rows // n for n in (2, 4, 8, 16) if work.rows % n == 0]
        if work.method in SAMPLING:  # their defaults are for small cards, and their rows are short
            sizes += [work.rows * n for n in (2, 4, 8, 16) if work.accumulation % n == 0]
    for precision, (checkpointing, kept), rows in itertools.product(precisions, recomputed, sizes):
        one = replace(work.with_rows(rows), precision=precision)
        one = replace(one, gradient_checkpointing=checkpointing, kept_layers=kept)
        yield one, differences(one, work)


def differences(one: Workload, other: Workload) -> dict[str, Any]:
    """The arguments by which `one` differs from `other`."""
    changed: dict[str, Any] = {}
    if one.precision != other.precision:
        changed["load_in_4bit"] = one.precision == "nf4"
    if one.gradient_checkpointing != other.gradient_checkpointing:
        changed["gradient_checkpointing"] = one.gradient_checkpointing
    if one.kept_layers != other.kept_layers:
        changed["checkpoint_skip_layers"] = one.kept_layers
    if one.rows != other.rows:
        changed |= batch(one, one.rows)
    return changed


def batch(work: Workload, rows: int) -> dict[str, Any]:
    """The arguments for micro-batches of `rows`; the accumulation is that of all GPUs, which divide it."""
    step = work.rows * work.accumulation * work.gpus
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": max(1, step // rows)}


def _longest_first(
    card: Any, method: str, given: dict[str, Any], fixed: Collection[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Tokens of a row, the method's own number and some below it, each with the arguments that change it."""
    own = settings(card, method, given)
    if method in SAMPLING:
        prompt, completion = own["max_prompt_length"], own["max_completion_length"]
        first = prompt + completion
        shorter = [{"max_prompt_length": prompt // 2}]
        shorter += [{"max_prompt_length": prompt // n, "max_completion_length": completion // 2} for n in (2, 4)]
        lengths = [(sum({"max_completion_length": completion, **changed}.values()), changed) for changed in shorter]
    else:
        first = own["max_length"]
        lengths = [(first // n, {"max_length": first // n}) for n in (2, 4)]
    allowed = [
        (tokens, changed) for tokens, changed in lengths if tokens >= SHORTEST and not changed.keys() & set(fixed)
    ]
    return [(first, {}), *allowed]


def device_with(gib: float, like: Device | None = None) -> Device:
    """A card with `gib` GiB to use, as fast as `like`, or as the typical card of that size."""
    like = like or of_size(gib)
    return replace(like, gib=gib)
