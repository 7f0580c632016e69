"""The model card of a run: README.md for the hub, written from its run.json and its evaluation.

It has no path of this machine, and nothing that differs between two runs of the same settings, so that a resumed run
writes the card of an uninterrupted one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.arguments import variable
from common.commands import make
from common.errors import InputError
from common.lm.cards import HUB_ID, Card, card_names, read_card
from common.lm.hub import find_model
from common.pages.facts import NO_OUTCOME, TITLES, number, text
from common.pages.reading import RunFiles, read_run
from common.run.files import write_bytes
from common.run.record import measure_of

# What the hub calls the licences of our model cards; it wants a name for those that it does not know.
LICENCES = {
    "Apache-2.0": {"license": "apache-2.0"},
    "MIT": {"license": "mit"},
    "Gemma": {"license": "gemma"},
    "Llama 3.1 Community": {"license": "llama3.1"},
    "Llama 3.2 Community": {"license": "llama3.2"},
}
METHODS = {
    "sft": "Supervised fine-tuning with TRL's SFTTrainer",
    "dpo": "Direct preference optimization (Rafailov et al. 2023) with TRL's DPOTrainer",
    "kto": "KTO (Ethayarajh et al. 2024) with TRL's KTOTrainer",
    "grpo": "Group relative policy optimization (Shao et al. 2024) with TRL's GRPOTrainer",
    "ppo": "Proximal policy optimization (Schulman et al. 2017), the loop of this project's recipes/ppo.py",
    "reward": "A reward model with TRL's RewardTrainer",
}
USE = {
    "model": "The weights are whole; transformers' `AutoModelForCausalLM.from_pretrained` loads them.",
    "adapter": "A LoRA adapter, for the base below and no other; PEFT's `PeftModel.from_pretrained` puts it on. The "
    "chat template beside it is that of the training.",
}
SHOWN_ANYWAY = ("learning_rate", "max_length", "lora_r", "lora_alpha", "seed")  # also where it is the recipe's default


def write_card(run: Path) -> None:
    """Write README.md into the adapter or model that a run saved, in place of what PEFT writes there."""
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            library, relation = ("peft", "adapter") if name == "adapter" else ("transformers", "finetune")
            card = card_of_run(read_run(run), USE[name], library, relation)
            write_bytes(run / name / "README.md", card.encode())


def card_of_run(run: RunFiles, use: str, library: str = "peft", relation: str = "adapter") -> str:
    """The card of what a run trained.

    Args:
        run: the run.
        use: a section in Markdown: how the files beside the card are used.
        library: the hub's name for what loads them: "peft", "transformers" or "gguf".
        relation: what they are to the base, for the hub: "adapter", "finetune" or "quantized".
    """
    base = base_facts(run)
    header = {"library_name": library, "pipeline_tag": "text-generation", **licence(base.get("card"))}
    if run.recipe == "reward":
        header["pipeline_tag"] = "text-classification"
    if base.get("hub_id"):
        header |= {"base_model": base["hub_id"], "base_model_relation": relation}
    if dataset := _dataset(run):
        header["datasets"] = [dataset]
    header["tags"] = ["trl", "unsloth", run.recipe]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    of, on = base.get("hub_id") or base["name"], _data_name(run)
    parts = [
        f"---\n{front}---\n\n# {TITLES.get(run.recipe, run.recipe)} of {of.rpartition('/')[2]}",
        f"{METHODS.get(run.recipe, run.recipe)}, from `{of}` on `{on}`.",
        "## Use\n\n" + use.strip(),
        "## What it was made from\n\n" + _table([(name, value) for name, value in _sources(run, base) if value]),
        "## Hyperparameters\n\n" + _table(_hyperparameters(run)) + "\n\nAll others are the recipe's defaults.",
    ]
    if figures := _figures(run):
        parts.append("## Numbers\n\n" + "\n\n".join(figures))
    parts.append("## How to repeat it\n\n```sh\n" + "\n".join(_repeat(run)) + "\n```")
    return "\n\n".join(parts) + "\n"


def base_facts(run: RunFiles) -> dict[str, Any]:
    """The base of a run: `name`, its `card` if it has one, `hub_id` and `commit` if it is on the hub, or its sha256."""
    given = str(run.arguments.get("model") or "tiny")
    identity = str(run.record.get("matters", {}).get("base") or "")
    facts: dict[str, Any] = {"name": given}
    if given in card_names():
        facts["card"] = read_card(given)
        facts["hub_id"] = facts["card"].hub_id
    elif HUB_ID.fullmatch(given) and "@" in identity:
        facts["hub_id"] = given
    else:
        facts |= _merged(Path(given).expanduser())
    if facts.get("hub_id"):
        facts["commit"] = run.record.get("revision") or identity.rpartition("@")[2]
    elif identity:
        facts["sha256"] = identity
    return facts


def _merged(folder: Path) -> dict[str, Any]:
    """What a folder of a model is called, without its place, and the card of the base that it was merged from."""
    facts: dict[str, Any] = {"name": folder.name}
    try:
        if card := find_model(str(folder)).card:
            facts |= {"card": card, "name": f"{card.name}, merged with an adapter of an earlier stage"}
    except InputError:  # it is no longer there
        pass
    return facts


def licence(card: Card | None) -> dict[str, Any]:
    """The hub's fields for the licence of a base; a model without a card has its own, which is not known here."""
    if card is None:
        return {}
    known = LICENCES.get(card.licence)
    link = f"https://huggingface.co/{card.hub_id}/blob/main/LICENSE"
    return known or {"license": "other", "license_name": card.licence.lower().replace(" ", "-"), "license_link": link}


def _sources(run: RunFiles, base: dict[str, Any]) -> list[tuple[str, str | None]]:
    record, card = run.record, base.get("card")
    facts, code = record.get("data") or {}, record.get("code") or {}
    git, lock = code.get("git") or {}, code.get("lock") or {}
    commit = git.get("commit")
    data = str(record.get("matters", {}).get("data") or "")
    of = base.get("hub_id") or base["name"]
    return [
        ("base", f"`{of}`" + (f" at commit `{base['commit']}`" if base.get("commit") else "")),
        ("sha256 of the base's weights", f"`{base['sha256']}`" if base.get("sha256") else None),
        ("licence of the base", card.licence if card else "see the page of the base"),
        ("data", f"`{_data_name(run)}`" + (f", {facts['rows']:,} rows" if facts.get("rows") else "")),
        ("sha256 of the data" if re.fullmatch("[0-9a-f]{64}", data) else "version of the data", f"`{data}`"),
        ("method", METHODS.get(run.recipe)),
        ("steps", f"{record['step']:,}" if record.get("step") else None),
        ("trained tokens", f"{record['tokens']:,.0f}" if record.get("tokens") else None),
        ("precision", str(record.get("dtype", "")).removeprefix("torch.")),
        ("code", f"commit `{commit}`" + (", with uncommitted changes" if git.get("dirty") else "") if commit else None),
        ("lock", f"`{lock['file']}`, sha256 `{lock['sha256']}`" if lock else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in (code.get("packages") or {}).items())),
    ]


def _hyperparameters(run: RunFiles) -> list[tuple[str, str]]:
    fitted = run.record.get("fit") or {}
    rows = []
    for name, argument in run.record.get("arguments", {}).items():
        if name in ("model", "data", "run", *NO_OUTCOME) or argument["value"] is None:
            continue
        if argument.get("from") != "recipe" or name in SHOWN_ANYWAY or name in fitted:
            rows.append((f"`--{name.replace('_', '-')}`", f"`{text(_short(fitted.get(name, argument['value'])))}`"))
    return rows


def _figures(run: RunFiles) -> list[str]:
    """Tables of what was measured: the training's own figure, and held-out data before and after."""
    record, found = run.record, []
    name = measure_of(run.recipe)[0]
    if isinstance(change := record.get(name), dict) and {"first", "last"} <= change.keys():
        found.append(_table([(f"{name}, first step", number(change["first"])), ("last step", number(change["last"]))]))
    held_out = record.get("held_out") or {}
    if held_out.get("before") and held_out.get("after"):
        rows = [[key, number(held_out["before"].get(key)), number(value)] for key, value in held_out["after"].items()]
        found.append(_rows([f"{held_out.get('prompts', 0)} held-out prompts", "before", "after"], rows))
    for section in run.evaluation.get("sections", {}).values():
        if rows := [_judged(line) for line in section.get("lines", [])]:
            title = f"{section.get('title', 'evaluation')}, {section.get('rows', 0)} rows"
            found.append(_rows([title, "before", "after", "change (95% interval)", ""], rows))
    if isinstance(report := record.get("report"), dict):
        rows = [[key, number(value)] for key, value in report.items() if isinstance(value, int | float)]
        found.append(_rows(["held-out rows", "at the end"], rows))
    return found


def _judged(line: dict[str, Any]) -> list[str]:
    """A figure of an evaluation: its name, before, after, the difference with its interval, and the verdict."""
    low, high = line.get("interval") or (None, None)
    change = f"{line['difference']:+.4g} ({number(low)} to {number(high)})" if low is not None else "–"
    return [
        str(line["name"]),
        number(line.get("before")),
        number(line.get("after")),
        change,
        str(line.get("verdict", "")),
    ]


def _repeat(run: RunFiles) -> list[str]:
    given: dict[str, Any] = {}
    for name, argument in run.record.get("arguments", {}).items():
        if argument.get("from") != "recipe" and argument["value"] is not None and name not in NO_OUTCOME:
            value = _short(argument["value"])
            given[variable(name)] = list(map(str, value)) if isinstance(value, list) else text(value)
    git = (run.record.get("code") or {}).get("git") or {}
    code = [f"git checkout {git['commit']}"] if git.get("commit") else []
    return [*code, make(run.recipe, **given)]


def _dataset(run: RunFiles) -> str | None:
    """The data's id on the hub; None for a file."""
    data = str(run.arguments.get("data") or "").removeprefix("hf://datasets/").partition("@")[0].partition(":")[0]
    return data if HUB_ID.fullmatch(data) and not data.endswith((".jsonl", ".json", ".csv", ".parquet")) else None


def _data_name(run: RunFiles) -> str:
    return _dataset(run) or str(_short(str(run.arguments.get("data") or "its data")))


def _short(value: Any) -> Any:
    """A value with paths as their last part: a place on this machine says nothing elsewhere."""
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../", "outputs/"))):
        return Path(value).name
    return re.sub(r"(?<![\w.])[~.]{0,2}/(?:[^\s/=:]+/)+", "", value) if isinstance(value, str) else value


def _table(rows: Sequence[tuple[str, str | None]]) -> str:
    return _rows(["", ""], [[name, str(value)] for name, value in rows])


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
