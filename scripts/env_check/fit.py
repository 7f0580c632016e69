"""Which models a recipe can train here."""

import glob
import os
import shutil
import tomllib
from types import SimpleNamespace

from common.environment import ROOT
from common.lm import memory

from env_check.checks import FAILURE, GIB, OK, Check, judge
from env_check.machine import existing, hub_cache, hub_token, read

SMALL = 50e6  # parameters that a CPU trains while one waits


def recipe_names():
    return sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "recipes", "*.py")))


def card_names():
    return sorted(os.path.basename(path)[:-5] for path in glob.glob(os.path.join(ROOT, "recipes", "models", "*.toml")))


def read_cards():
    """{name: card}, smallest first. Plain objects, because common.lm.cards, which checks cards, needs packages."""
    cards = {}
    for name in card_names():
        card = tomllib.loads(read(os.path.join(ROOT, "recipes", "models", name + ".toml")))
        cards[name] = SimpleNamespace(**dict(card, architecture=SimpleNamespace(**card["architecture"])))
    return dict(sorted(cards.items(), key=lambda item: item[1].parameters))


def sizes(recipe, card):
    """The sizes of a batch where the card sets its own; memory.fit knows the recipe's."""
    names = ("max_length", "per_device_train_batch_size")
    return {name: value for name, value in getattr(card, recipe, {}).items() if name in names}


def what_runs(recipe, cards, facts):
    """[{model, fits, ...}] of every card that is offered for `recipe`, smallest first."""
    lines = []
    for name, card in cards.items():
        if recipe not in card.methods:
            continue
        line = {"model": name, "fits": card.parameters <= SMALL}
        if facts.free_gib is not None:
            fit = memory.fit(card, recipe, facts.free_gib, **sizes(recipe, card))
            line["fits"] = fit is not None
            if fit:
                line.update(load_in_4bit=fit.load_in_4bit, gradient_checkpointing=fit.gradient_checkpointing)
                line["gib"] = round(fit.total, 1)
        lines.append(line)
    return lines


def check_job(recipe, model, card, lines, facts):
    """Can `recipe` train `model` here? `lines` are those of what_runs."""
    name = f"{recipe} {model}"
    line = next(line for line in lines if line["model"] == model)
    fitting = [line["model"] for line in lines if line["fits"]]
    smaller = "make {} MODEL={}".format(recipe, fitting[-1] if fitting else "tiny")
    if facts.free_gib is None:
        found = f"{card.parameters / 1e6:,.0f} M parameters on a CPU, " + ("minutes" if line["fits"] else "days")
        yield judge(name, line["fits"], found, "", "use a machine with an NVIDIA GPU; here " + smaller)
    elif line["fits"]:
        flags = ("--" if line["load_in_4bit"] else "--no-") + "load-in-4bit"
        flags += " --" + ("" if line["gradient_checkpointing"] else "no-") + "gradient-checkpointing"
        yield Check(name, OK, f"{line['gib']} GiB with {flags}", f"<= {facts.free_gib:.1f} GiB, what is free")
    else:
        settings = {"max_length": memory.MAX_LENGTH[recipe], "per_device_train_batch_size": 4, **sizes(recipe, card)}
        need = memory.estimate(card, recipe, load_in_4bit=True, gradient_checkpointing=True, **settings).total
        one = memory.fit(card, recipe, facts.free_gib, **{**sizes(recipe, card), "per_device_train_batch_size": 1})
        mend = f'make {recipe} MODEL={model} ARGS="--per-device-train-batch-size 1"' if one else smaller
        yield Check(name, FAILURE, f"{need:.1f} GiB at the least", f"<= {facts.free_gib:.1f} GiB, what is free", mend)
    yield from check_download(name, card)


def check_download(name, card):
    """Room for the weights, and leave to fetch them, unless they are on this machine."""
    hub_id = getattr(card, "hub_id", None)
    if hub_id is None or glob.glob(os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"), "snapshots", "*")):
        return
    need, free = card.parameters * 2 / GIB, shutil.disk_usage(existing(hub_cache())).free / GIB
    if free < need:
        mend = "free some space, or move the cache, export HF_HOME=/another/disk"
        yield Check(name, FAILURE, f"{free:.1f} GiB free in {hub_cache()}", f">= {need:.1f} GiB of weights", mend)
    if card.gated and not hub_token():
        mend = f"accept the licence on the page of {hub_id}, then export HF_TOKEN=..."
        yield Check(name, FAILURE, "it is gated, and there is no token", "HF_TOKEN", mend)
