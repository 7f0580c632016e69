"""What `make evaluate RUN=…` evaluates: the model of a run, what it is compared with, and the rows it never saw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment
from common.data.examples import Pair, Prompt, Rating
from common.data.feedback import LABELLED_OR_RATED, as_feedback
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, PROMPT_FORMATS, RATING_FORMATS, SFT_FORMATS, Formats
from common.data.hold_out import read_held_out
from common.data.prompts import as_prompt, distinct, with_system_prompt
from common.data.read import read_examples
from common.data.rows import find_source, source_identity
from common.errors import InputError
from common.lm.hub import Model, contents, find_model
from common.lm.load import base_of
from common.lm.own_code import check_trust_of
from common.pages.reading import read_run
from common.run.data_summary import from_ranges
from common.run.record import adapter_of, read_record

RunArgs = Any  # the Args of scripts/evaluate.py, a command, which nothing imports
FORMATS: dict[str, Formats] = {
    "sft": SFT_FORMATS,
    "dpo": PAIR_FORMATS,
    "kto": LABELLED_OR_RATED,
    "grpo": PROBLEM_FORMATS,
    "reward": {**PAIR_FORMATS, **RATING_FORMATS},
    "ppo": PROMPT_FORMATS,
}
# Of the sample data: the file of the same kind that nothing trains on.
SAMPLES = {
    "sft.jsonl": "heldout.jsonl",
    "arithmetic-train.jsonl": "arithmetic.jsonl",
    "preferences-train.jsonl": "preferences.jsonl",
    "scores.jsonl": "scores-heldout.jsonl",
}


@dataclass(frozen=True)
class Side:
    """A model to measure: what it is called, what is loaded, and the adapter on it."""

    name: str
    model: Model
    adapter: str | None

    def identity(self) -> dict[str, Any]:
        """What it is by its contents, to compare with another evaluation."""
        return {"name": self.name, "model": contents(self.model), "adapter": adapter_identity(self.adapter)}


@dataclass(frozen=True)
class Held:
    """Rows that the run did not train on: their examples, and where they are from, in words."""

    name: str
    examples: list[Any]


@dataclass(frozen=True)
class Subject:
    """A run to evaluate.

    Args:
        method: sft, dpo, kto, grpo, reward or ppo.
        arguments: the run's own.
        after: what it made.
        before: the model that `after` is compared with; None of a reward model, which is none before it is trained.
    """

    folder: Path
    method: str
    arguments: dict[str, Any]
    after: Side
    before: Side | None


def find_subject(run: str, base: str | None) -> Subject:
    """The run in a folder; `base` is what to compare it with, by default the model it was trained on.

    Raises InputError where the run has made nothing yet, or where its base is another model now.
    """
    folder = Path(run).expanduser()
    found = read_run(folder)
    method, arguments = found.recipe, found.arguments
    if method not in FORMATS:
        raise InputError(f"{folder}: is a run of {method}, and `make evaluate` knows {', '.join(FORMATS)}")
    if found.record.get("status") != "done":
        step = f" after step {found.record['step']}" if found.record.get("step") else ""
        raise InputError(f"{folder}: the run is {found.record.get('status')}{step}; its command resumes it")
    if method == "reward":
        return Subject(folder, method, arguments, Side(str(folder), find_model(arguments["model"]), None), None)
    after = side(str(folder))
    before = side(base) if base else Side(after.model.name, base_model(found.record, arguments), None)
    return Subject(folder, method, arguments, after, before)


def base_model(record: dict[str, Any], arguments: dict[str, Any]) -> Model:
    """The model that a run was trained on. Raises InputError where there is another one in its place."""
    base = find_model(arguments["model"])
    check_trust_of(arguments, base)
    if record["matters"]["base"] != contents(base):
        raise InputError(
            f"{base.source}: is another model, or another version of it, than the run was trained on; give what to "
            "compare with as --base"
        )
    return base


def side(name: str) -> Side:
    """A run's folder, an adapter's folder, or a model: a card's name, a local directory or a hub id."""
    path = Path(name).expanduser()
    if (path / "run.json").is_file():
        if (path / "model").is_dir():  # all weights were trained
            return Side(name, find_model(str(path / "model")), None)
        adapter = str(adapter_of(path))
        return Side(name, base_of(None, adapter), adapter)
    if (path / "adapter_config.json").is_file():
        return Side(name, base_of(None, str(path)), str(path))
    return Side(name, find_model(name), None)


def adapter_identity(adapter: str | None) -> str | None:
    return source_identity(sorted(Path(adapter).glob("*.safetensors"))) if adapter else None


def held_rows(subject: Subject, data: tuple[str, ...]) -> list[Held]:
    """The rows to measure on: the files `data`, else those that the run held out; [] where it held out none.

    Of the sample data, the sample file that nothing trains on is added. Raises InputError where the run's data is
    another one now.
    """
    given, record = subject.arguments, read_record(subject.folder)
    sources = list(data)
    found: list[Held] = []
    if not sources:
        sources = [given["eval_data"]] if given.get("eval_data") else []
        kept = from_ranges((record.get("data") or {}).get("held_out_rows", ""))
        if kept and not sources:
            found.append(Held(f"held-out rows of {Path(given['data']).name}", own_rows(subject, record, kept)))
        file = Path(given["data"]).absolute()
        if file.parent == environment.ROOT / "data_samples" and file.name in SAMPLES:
            sources.append(str(file.with_name(SAMPLES[file.name])))
    short = [Path(name).name for name in sources]
    for name in sources:
        rows = read_held_out(name)
        if subject.method in ("grpo", "ppo") and isinstance(rows[0], Prompt | Pair | Rating):
            rows = as_prompts(rows, given)
        elif subject.method == "kto" and isinstance(rows[0], Rating):
            rows = as_feedback(rows, given.get("threshold"))
        elif isinstance(rows[0], Rating) and subject.method != "reward":
            raise InputError(f"{name}: scores judge a reward model, not what {subject.method} trains")
        elif subject.method == "reward" and not isinstance(rows[0], Pair | Rating):
            raise InputError(f"{name}: expected pairs or scores to judge a reward model by")
        found.append(Held(Path(name).name if short.count(Path(name).name) == 1 else name, rows))
    return found


def own_rows(subject: Subject, record: dict[str, Any], kept: list[int]) -> list[Any]:
    """The rows at these indices of the run's data, as its recipe reads them."""
    given = subject.arguments
    source = find_source(given["data"])
    if source_identity(source) != record["matters"]["data"]:
        raise InputError(f"{given['data']}: has changed since the run; give rows that it did not train on with --data")
    formats = FORMATS[subject.method]
    examples = read_examples(source, formats, given.get("format") or "auto", given.get("columns") or ()).examples
    if subject.method == "kto":
        places = {examples[index].place for index in kept}
        return [row for row in as_feedback(examples, given.get("threshold")) if row.place in places]
    rows = [examples[index] for index in kept]
    return as_prompts(rows, given) if subject.method in ("grpo", "ppo") else rows


def as_prompts(rows: list[Any], given: dict[str, Any]) -> list[Prompt]:
    """Rows as the prompts that a run of GRPO or PPO samples from."""
    return with_system_prompt(distinct(map(as_prompt, rows)), given.get("system_prompt"))
