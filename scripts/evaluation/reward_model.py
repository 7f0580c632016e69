"""What is measured of a reward model: an adapter with its head by `make reward`, or a sequence classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import environment
from common.data.examples import Pair, Rating
from common.data.hold_out import read_held_out
from common.data.turns import Turns
from common.errors import InputError
from common.lm.hub import Model, fetch, find_model
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference
from common.rewards.report import Report, held_out_rows, report_on
from common.rewards.tokens import Tokens, answers_of, as_tokens
from common.run.files import read_object
from common.run.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8
SAMPLES = environment.ROOT / "data_samples"


@dataclass(frozen=True)
class Trained:
    """A reward model on the disk or the hub.

    Args:
        name: as the user gives it, or its folder.
        folder: of the adapter, None for a classifier.
        model: the base under the adapter, or the classifier.
        facts: about its head, {} where none are known.
    """

    name: str
    folder: Path | None
    model: Model
    facts: dict[str, Any]


def find(name: str, base: str | None) -> Trained:
    """The reward model of a run of `make reward`, in its folder or the adapter's; or a sequence classifier.

    Raises InputError when there is none, and when `base` is another one than it was trained on.
    """
    run = Path(name).expanduser()
    for folder in (run, run / "adapter", run / "model"):
        if not (folder / "head.json").is_file():
            continue
        facts = read_object(folder / "head.json")
        if (folder / "adapter_config.json").is_file():
            return Trained(name, folder, base_of(base, str(folder)), facts)
        return Trained(str(folder), None, find_model(str(folder)), facts)
    if (run / "adapter_config.json").is_file() or (run / "run.json").is_file():
        raise InputError(f"--reward-model {name}: there is no head.json, so it is no reward model; see `make reward`")
    return Trained(name, None, find_model(name), {})


def sample_data(trained: Trained) -> str:
    """Sample rows of the kind that it was trained on."""
    pairs = trained.facts.get("kind") == "bradley-terry"
    return str(SAMPLES / ("preferences.jsonl" if pairs else "scores-heldout.jsonl"))


def read(name: str) -> list[Pair] | list[Rating]:
    rows = read_held_out(name)
    if not isinstance(rows[0], Pair | Rating):
        raise InputError(f"{name}: expected pairs or scores to judge a reward model by")
    return rows


class LoadedRewardModel:
    """A reward model that is loaded: as it was trained, on its own chat template."""

    def __init__(self, trained: Trained, load_in_4bit: bool) -> None:
        self.facts = trained.facts
        self.folder = trained.folder
        base = fetch(trained.model)
        named = Model(self.folder.name, str(self.folder), None, base.card, local=True) if self.folder else base
        self.tokenizer: PreTrainedTokenizerBase = load_chat_tokenizer(named)[0]
        self.model: Any
        if self.folder:
            from common.lm.scalar_head import load_head

            self.model = load_for_inference(base, str(self.folder), load_in_4bit)
            self.head, _ = load_head(self.folder, self.model.device)
        else:
            from common.rewards.classifier import RewardModel

            self.model = RewardModel(trained.name)

    def tokens_of(self, rows: Sequence[Pair | Rating], max_length: int) -> tuple[list[Tokens], str | None]:
        """The rows as tokens, and lines about those that are not whole."""
        return as_tokens(self.tokenizer, rows, max_length, max_truncated=1.0, whole=self.folder is None)

    def report(self, rows: Sequence[Pair | Rating], tokens: list[Tokens], what: str) -> tuple[Report, list[dict]]:
        """The report, and what it is computed from."""
        outputs: list[float] = []
        usable = {row.place for row in tokens}
        read = [(row, answer) for row in rows if row.place in usable for answer in answers_of(row)]
        ids = [answer for row in tokens for answer in row.answers]
        with bar(what, len(read)) as advance:
            for first in range(0, len(read), BATCH):
                batch = slice(first, first + BATCH)
                outputs += self._score(ids[batch], read[batch])
                advance(len(ids[batch]))
        return report_on(tokens, outputs, self.facts), held_out_rows(tokens, outputs)

    def scores(self, ids: list[list[int]]) -> list[float]:
        """The outputs of an adapter with its head for texts in tokens, (T,) each, as PPO scores completions."""
        from common.lm.scalar_head import score_last

        return score_last(self.model, self.head, [(row, []) for row in ids], self.tokenizer.pad_token_id, BATCH)

    def _score(self, ids: list[list[int]], read: list[tuple[Pair | Rating, Turns]]) -> list[float]:
        if not self.folder:
            prompts, answers = [row.prompt for row, _ in read], [answer for _, answer in read]
            return self.model(prompts, answers, tools=[row.tools for row, _ in read])
        return self.scores(ids)
