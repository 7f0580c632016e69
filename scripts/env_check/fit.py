"""Which models each recipe can train here."""

import glob
import os
import shutil
import tomllib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from common.environment import ROOT
from common.plan.search import BATCH, device_with, fit, least, measure, plan
from common.plan.words import variables
from common.plan.workload import workload

from env_check.checks import FAILURE, GIB, OK, TRY_AGAIN, WARNING, Check, Facts, judge
from env_check.machine import existing, hub_cache, hub_token, read

PLAIN = ("load_in_4bit", "gradient_checkpointing")  # settings that are named in any case
SMALL = 50e6  # parameters; a CPU trains such a model in minutes


def read_cards() -> dict[str, Any]:
    """{name: card}, smallest first. Plain objects, because common.lm.cards, which validates cards, needs packages."""
    cards = {}
    for file in (ROOT / "recipes" / "models").glob("*.toml"):
        card = tomllib.loads(read(file))
        cards[file.stem] = SimpleNamespace(**card | {"architecture": SimpleNamespace(**card["architecture"])})
    return dict(sorted(cards.items(), key=lambda item: item[1].parameters))


def what_runs(recipe: str, cards: dict[str, Any], facts: Facts) -> list[dict[str, Any]]:
    """[{model, fits, ...}] of every card that is offered for `recipe`, smallest first."""
    lines = []
    for name, card in cards.items():
        if recipe not in card.methods:
            continue
        line = {"model": name, "fits": card.parameters <= SMALL}
        if facts.free_gib is not None:
            found = fit(card, recipe, device_with(facts.free_gib), fixed=BATCH)
            line["fits"] = found is not None
            if found:
                line["load_in_4bit"] = found.work.precision == "nf4"
                line["gradient_checkpointing"] = found.work.gradient_checkpointing
                line["checkpoint_skip_layers"] = found.work.kept_layers
                line["gib"] = round(found.total, 1)
        lines.append(line)
    return lines


def check_job(recipe: str, model: str, card: Any, lines: list[dict[str, Any]], facts: Facts) -> Iterator[Check]:
    """Can `recipe` train `model` here? `lines` are those of what_runs."""
    name = f"{recipe} {model}"
    line = next(line for line in lines if line["model"] == model)
    fitting = [line["model"] for line in lines if line["fits"]]
    smaller = f"make {recipe} MODEL={fitting[-1] if fitting else 'tiny'}"
    if facts.free_gib is None and facts.smi.slow:
        yield Check(name, WARNING, "not known: nvidia-smi is slow", "", TRY_AGAIN)
    elif facts.free_gib is None:
        found = f"{card.parameters / 1e6:,.0f} M parameters on a CPU, {'minutes' if line['fits'] else 'days'}"
        yield judge(name, line["fits"], found, "", f"use a machine with an NVIDIA GPU; here {smaller}")
    elif line["fits"]:
        settings = ("load_in_4bit", "gradient_checkpointing", "checkpoint_skip_layers")
        chosen = variables({setting: line[setting] for setting in settings if line[setting] != 0 or setting in PLAIN})
        yield Check(name, OK, f"{line['gib']} GiB with {chosen}", f"<= {facts.free_gib:.1f} GiB, what is free")
    else:
        device = device_with(facts.free_gib)
        need = measure(card, least(workload(card, recipe)), device).total
        planned = plan(card, recipe, device)
        fix = f"make {recipe} MODEL={model} {variables(planned.changed)}" if planned.fits else smaller
        yield Check(name, FAILURE, f"at least {need:.1f} GiB", f"<= {facts.free_gib:.1f} GiB, what is free", fix)
    yield from check_download(name, card)


def check_download(name: str, card: Any) -> Iterator[Check]:
    """Room for the weights and permission to fetch them, unless they are on this machine."""
    hub_id = getattr(card, "hub_id", None)
    if hub_id is None or glob.glob(os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"), "snapshots", "*")):
        return
    need, free = card.parameters * 2 / GIB, shutil.disk_usage(existing(hub_cache())).free / GIB
    if free < need:
        fix = "free some space, or move the cache, export HF_HOME=/another/disk"
        yield Check(name, FAILURE, f"{free:.1f} GiB free in {hub_cache()}", f">= {need:.1f} GiB of weights", fix)
    if card.gated and not hub_token():
        fix = f"accept the licence on the page of {hub_id}, then export HF_TOKEN=..."
        yield Check(name, FAILURE, "it is gated, and there is no token", "HF_TOKEN", fix)
