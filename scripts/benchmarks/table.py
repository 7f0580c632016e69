"""The figures of a run of the benchmark as a Markdown page."""

from statistics import median, quantiles
from typing import Any

from common.lm.cards import read_card

from benchmarks.ceiling import need
from benchmarks.workloads import Workload

FORMULA = (
    "Ceiling: the FLOPs of a step at the measured rate of a matrix product, and where tokens are decoded one by one "
    "the bytes of weights and cache at the measured rate of a copy. FLOPs a token: forward 2N + 2Vh + 2SqL + 2P, "
    "backward 2N + 2Vh + 5SqL + 4P, recomputation 2N + 2SqL + 2P (N linear layers, V vocabulary, h hidden size, "
    "S length, q width of the queries, L layers, P LoRA; scripts/benchmarks/ceiling.py)."
)
HEAD = ("contestant", "tokens/s, median (5–95 %)", "s a step", "reserved GiB", "allocated GiB", "share of ceiling")


def summary(figures: dict[str, Any], workload: Workload, machine: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a contestant's raw figures; one that has none, as a skipped one, stays as it is."""
    if "seconds" not in figures:
        return figures
    seconds, tokens = figures["seconds"], figures["tokens"]
    least = need(read_card(workload.model).architecture, workload, sum(tokens) / len(tokens))
    ceiling = least.seconds(machine["flops_per_second"], machine["bytes_per_second"])
    phases = {name: round(median(values), 4) for name, values in figures.get("phases", {}).items() if values}
    return {
        "tokens_per_second": spread([count / time for count, time in zip(tokens, seconds, strict=True)]),
        "seconds_per_step": spread(seconds),
        "steps": len(seconds),
        "tokens": round(sum(tokens)),
        "memory_gib": {"reserved": figures["reserved_gib"], "allocated": figures["allocated_gib"]},
        "share_of_ceiling": ceiling / median(seconds),
        "dtype": figures["dtype"],
        **{name: figures[name] for name in ("cold_start_seconds", "recipe_args") if name in figures},
        **({"phases": phases} if phases else {}),
        **({"refresh_seconds": median(figures["refresh_seconds"])} if "refresh_seconds" in figures else {}),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median, and between what 90 % of the values are; of few values the least and the greatest."""
    if len(values) < 2:
        return {"median": values[0], "p5": values[0], "p95": values[0]}
    cuts = quantiles(values, n=20, method="inclusive")
    return {"median": median(values), "p5": cuts[0], "p95": cuts[-1]}


def page(machine: dict[str, Any], results: dict[str, dict[str, dict]], described: dict[str, str]) -> str:
    """The Markdown page: {workload: {contestant: summary}}."""
    lines = [f"# Benchmark on {machine.get('gpu') or machine['cpu']}", "", about(machine), ""]
    for workload, contestants in results.items():
        lines += [f"## {workload}", "", f"{described[workload]}.", "", row(HEAD), row(["---"] * len(HEAD))]
        for name, figures in contestants.items():
            lines.append(row(cells(name, figures)))
        lines += ["", *more(contestants)]
    return "\n".join([*lines, FORMULA, ""])


def about(machine: dict[str, Any]) -> str:
    """Device, driver, clocks, versions and the measured peaks."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    clocks = machine["clocks"] or {}
    device = [f"{name} {value}" for name, value in clocks.items()] or [machine.get("driver")]
    peak = f"{machine['flops_per_second'] / 1e12:.1f} TFLOP/s in a matrix product"
    copied = f"{machine['bytes_per_second'] / 1e12:.3f} TB/s in a copy"
    facts = "; ".join(fact for fact in (*device, f"python {machine['python']}", packages) if fact)
    return f"{peak}, {copied}. {facts}."


def cells(name: str, figures: dict[str, Any]) -> list[str]:
    if reason := figures.get("skipped") or figures.get("failed"):
        return [name, f"{'skipped' if 'skipped' in figures else 'failed'}: {reason}", "", "", "", ""]
    speed, seconds, memory = figures["tokens_per_second"], figures["seconds_per_step"], figures["memory_gib"]
    allocated = "" if memory["allocated"] is None else f"{memory['allocated']:.2f}"
    return [
        f"{name} with `{figures['recipe_args']}`" if "recipe_args" in figures else name,
        f"{speed['median']:,.0f} ({speed['p5']:,.0f}–{speed['p95']:,.0f})",
        f"{seconds['median']:.3f}",
        f"{memory['reserved']:.2f}",
        allocated,
        f"{figures['share_of_ceiling']:.0%}",
    ]


def more(contestants: dict[str, dict]) -> list[str]:
    """What only ours has: the phases of a step, and how long it takes to the first one."""
    figures = contestants.get("ours", {})
    lines = []
    if "cold_start_seconds" in figures:
        lines += [
            f"From the start of the recipe's process to its first finished step: {figures['cold_start_seconds']:.1f} s."
        ]
    if phases := {name: value for name, value in figures.get("phases", {}).items() if name.startswith("time/")}:
        parts = ", ".join(f"{name.removeprefix('time/')} {value:.3f} s" for name, value in phases.items())
        lines += [f"Phases of a step of ours: {parts}."]
    return [*lines, ""] if lines else []


def row(values) -> str:
    return "| " + " | ".join(str(value).replace("|", "/") for value in values) + " |"
