"""Read the examples of a data file once, and keep what the report needs: counts, hashes, lengths and a sample.

Memory grows by about two hundred bytes a row, whatever its length. Comparisons of rows with each other and other slow
checks use a random sample of at most 20,000 rows; the report says so.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from common.data.examples import Document, Feedback, Pair, Prompt, Rating
from common.data.rows import Faults
from common.rewards.outliers import FIX, NOTHING, find_outliers

from check_data import texts
from check_data.duplicates import NearDuplicates, Shingles, distinct
from check_data.findings import Findings
from check_data.limits import Limits
from check_data.parts import completions_of, identity, other_parts, prompt_of, text_of, turns_of, whole_text
from check_data.tasks import Example

SAMPLE_ROWS = 20_000
NGRAM_ROWS = 5_000
CLIP = 1_000  # characters of a completion whose n-grams are counted
LONG = 4_000  # characters of a row from which the sample holds the hashes of its shingles in its place
LANGUAGE = 200  # characters of a prompt and of a completion that tell the language
SPOKEN = ("user", "assistant")
NEARLY_IDENTICAL = 0.05  # the share of the longer completion in which a pair differs


class Drawn(NamedTuple):
    """A row that is drawn for the sample."""

    example: Example
    is_copy: bool  # an exact duplicate of an earlier row
    overlaps: bool  # its prompt is one of the evaluation data

    @property
    def place(self) -> str:
        return self.example.place

    @property
    def beginning(self) -> str:
        """Of the completion, or of the prompt where there is none."""
        return ("\n".join(completions_of(self.example)) or text_of(prompt_of(self.example)))[:CLIP]

    def sampled(self, with_prompt: bool) -> "Sampled":
        text = whole_text(self.example)
        prompt = Shingles.of(text_of(prompt_of(self.example))) if with_prompt else None
        parts = other_parts(self.example)
        return Sampled(
            self.place, Shingles.of(text), hash(text), prompt, self.beginning, parts, self.is_copy, self.overlaps
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row of the sample: what its likeness to others is judged by."""

    place: str
    text: Shingles  # of all that it says
    text_hash: int
    prompt: Shingles | None  # where it is compared with the evaluation data's
    beginning: str
    parts: dict[str, int]  # what it is graded and read with, by name
    is_copy: bool
    overlaps: bool


class Prompts:
    """The prompts of the evaluation data: by hash to find the same, and by likeness to find similar ones."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.places: dict[int, str] = {}
        self.similar = NearDuplicates()
        for count, example in enumerate(examples):
            prompt = text_of(prompt_of(example))
            self.places.setdefault(hash(texts.normalized(prompt)), example.place)
            if count < SAMPLE_ROWS:
                self.similar.find_or_keep(example.place, prompt)


class Survey:
    """What is known of the data so far. `add` takes the next example, `finish` compares those of the sample."""

    def __init__(self, findings: Findings, evaluation: Prompts | None = None, estimate: Limits | None = None) -> None:
        self.findings = findings
        self.evaluation = evaluation
        self.estimate = estimate  # of lengths, where no model says them
        self.rows = 0
        self.characters = array("I")
        self.prompt_hashes = array("q")
        self.languages: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.layouts: Counter[str] = Counter()
        self.systems = 0
        self.scores = array("d")
        self.score_places = array("q")
        self.refused = 0  # rows that a recipe refuses next to the others
        self.labels: Counter[bool] = Counter()
        self.longer = Counter({"chosen": 0, "rejected": 0, "same": 0})
        self.pair_characters = [0, 0]
        self.gold_answers = 0
        self.gold_words = 0
        self.diversity: dict[str, float | None] = {}
        self.sample: list[Drawn | Sampled] = []
        self._random = random.Random(42)
        self._files: dict[str, int] = {}
        self._seen: dict[int, int] = {}

    def add(self, example: Example) -> None:
        """Count an example, and look at it alone and next to those before it."""
        self.rows += 1
        place, prompt, completions = example.place, prompt_of(example), completions_of(example)
        prompt_text, completion_text = text_of(prompt), "\n".join(completions)
        self.characters.append(min(len(prompt_text) + len(completion_text), 2**32 - 1))
        self.languages[texts.language(f"{prompt_text[:LANGUAGE]} {completion_text[:LANGUAGE]}")] += 1
        self.systems += bool(prompt) and prompt[0]["role"] == "system"

        prompt_hash = hash(texts.normalized(prompt_text))
        self.prompt_hashes.append(prompt_hash)
        held_out = self.evaluation.places.get(prompt_hash) if self.evaluation else None
        if held_out:
            self.findings.add("overlap", place, f"the same prompt as {held_out}")
        is_copy = self._look_for_the_same(place, everything := identity(example))
        if self.estimate and not isinstance(example, Document):  # a long document becomes several rows
            self.estimate.estimate(example, len(everything))
        turns = turns_of(example)
        self.turns[sum(turn["role"] in SPOKEN for turn in turns)] += 1
        in_order = self._look_at_order(place, turns)
        if not (isinstance(example, Prompt) or (isinstance(example, Feedback) and not example.label)):
            self._look_at_completions(place, prompt, completions)
        match example:
            case Pair():
                if in_order:  # else the row has its finding
                    self._look_at_order(place, example.prompt + example.rejected)
                self._look_at_pair(place, completions[0], text_of(example.rejected))
            case Feedback():
                self.labels[example.label] += 1
                if (first := self._seen.get(hash(identity(replace(example, label=not example.label))))) is not None:
                    self.findings.add("contradiction", place, f"the other way round in {self._place(first)}")
                    is_copy = True  # of a row that is compared with the others
            case Rating():
                self.scores.append(example.score)
                self.score_places.append(self._here(place))
            case Prompt(answer=str()) if "tests" not in example.fields:  # else it is a program, which the tests grade
                self._look_at_gold_answer(place, example.answer)
        if (index := self._drawn()) is not None:
            row = Drawn(example, is_copy, held_out is not None)
            # A short row waits as it is, as another may be drawn in its place; a long one would take memory.
            self.sample[index : index + 1] = [
                row if len(everything) <= LONG else row.sampled(self.evaluation is not None)
            ]

    def _look_for_the_same(self, place: str, identity: str) -> bool:
        here = self._here(place)
        first = self._seen.setdefault(hash(identity), here)
        if same := first != here:
            self.findings.add("duplicate", place, f"the same as {self._place(first)}")
        return same

    def _here(self, place: str) -> int:
        """A place as a number, the smallest there is."""
        file, _, line = place.rpartition(":")
        return self._files.setdefault(file, len(self._files)) << 40 | int(line)

    def _place(self, number: int) -> str:
        file = next(name for name, index in self._files.items() if index == number >> 40)
        return f"{file}:{number & (1 << 40) - 1}"

    def look_at_scores(self, data: str, faults: Faults) -> None:
        """Name the scores far outside the others; they are faults where they leave a reward model nothing to learn."""
        if len(self.scores) < 2:
            return
        found = find_outliers(self.scores)
        places = [self._place(self.score_places[index]) for index in found.indices]
        named = [(place, f"score {self.scores[index]:g}") for place, index in zip(places, found.indices, strict=True)]
        if found.reason and len(set(np.delete(self.scores, found.indices))) < 2:  # the fault of no row
            which = f": {', '.join(f'{place} ({score})' for place, score in named)}" if named else ""
            Faults.add(faults, data, f"{found.reason}; {NOTHING}{which}")
            return
        for place, score in named:
            self.findings.add("outlier", place, f"{score} is far outside the others")
            if found.reason:
                faults.add(place, f"{score}: {found.reason}; {NOTHING}. {FIX}")
                self.refused += 1

    def _look_at_order(self, place: str, turns: list[dict[str, Any]]) -> bool:
        roles = [turn["role"] for turn in turns]
        spoken = [role for role in roles if role in SPOKEN]
        if "tool" in roles:
            return True  # calls and results come between
        if "system" in roles[1:] or spoken[:1] == ["assistant"] or any(map(str.__eq__, spoken, spoken[1:])):
            order = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
            self.findings.add("turn-order", place, f"turns of user and assistant do not alternate: {order}")
            return False
        return True

    def _look_at_completions(self, place: str, prompt: list[dict[str, Any]], completions: list[str]) -> None:
        for index, completion in enumerate(completions):
            found = texts.marks(completion)
            if index == 0:
                self.layouts[texts.layout(found)] += 1
            if found and (tag := texts.unbalanced(found)):
                self.findings.add("unbalanced-tags", place, f"{tag} has no counterpart")
            if found and texts.EMPTY_THOUGHT.search(completion):
                self.findings.add("empty-thought", place)
            if texts.refuses(completion):
                self.findings.add("refusal", place, f"a refusal: {_brief(completion)}")
        if completions and prompt and texts.repeats(prompt[-1]["content"], completions[0]):
            self.findings.add("repeats-prompt", place)

    def _look_at_pair(self, place: str, chosen: str, rejected: str) -> None:
        self.pair_characters[0] += len(chosen)
        self.pair_characters[1] += len(rejected)
        longer = "chosen" if len(chosen) > len(rejected) else "rejected" if len(rejected) > len(chosen) else "same"
        self.longer[longer] += 1
        if (share := texts.difference(chosen, rejected)) <= NEARLY_IDENTICAL:
            self.findings.add("near-identical", place, f"chosen and rejected differ in {share:.1%} of their characters")

    def _look_at_gold_answer(self, place: str, answer: str) -> None:
        from common.rewards.answers import gold

        self.gold_answers += 1
        try:
            self.gold_words += gold(answer).words
        except ValueError as error:
            self.findings.add("gold-answer", place, f"gold answer: {error}")

    def _drawn(self) -> int | None:
        """Where in the sample the row belongs; None if it is not drawn. Every row has the same chance (algorithm R)."""
        if len(self.sample) < SAMPLE_ROWS:
            return len(self.sample)
        index = self._random.randrange(self.rows)
        return index if index < SAMPLE_ROWS else None

    def finish(self) -> None:
        """Look for near duplicates, in the sample and of the evaluation data, and for repeated n-grams."""
        similar = NearDuplicates()
        kept: dict[str, Sampled] = {}
        for drawn in self.sample:
            if drawn.is_copy:
                continue
            row = drawn if isinstance(drawn, Sampled) else drawn.sampled(self.evaluation is not None)
            if near := similar.find_or_keep(row.place, row.text):
                self._add_near_duplicate(row, kept[near[0]], near[1])
            else:
                kept[row.place] = row
            if (
                self.evaluation
                and row.prompt
                and not row.overlaps
                and (near := self.evaluation.similar.find(row.prompt))
            ):
                self.findings.add("overlap", row.place, f"its prompt is {_percent(near[1])} the same as {near[0]}")
        some = self._random.sample(self.sample, min(NGRAM_ROWS, len(self.sample)))
        completions = [row.beginning for row in some]
        self.diversity = {f"distinct {n}-grams": distinct(completions, n) for n in (1, 2, 3)}

    def _add_near_duplicate(self, row: Sampled, other: Sampled, similarity: float) -> None:
        """Name a near duplicate. One that is graded or read in another way is no reason to drop the row."""
        names = [name for name in row.parts | other.parts if row.parts.get(name) != other.parts.get(name)]
        alike = "the same text" if row.text_hash == other.text_hash else f"{_percent(similarity)} the same"
        but = f", with another {' and '.join(names)}," if names else ""
        self.findings.add("near-duplicate", row.place, f"{alike}{but} as {other.place}", reason_to_drop=not names)

    def distinct_prompts(self) -> float:
        """The share of distinct prompts, whatever their spaces and case."""
        return len(np.unique(np.frombuffer(self.prompt_hashes, dtype=np.int64))) / max(self.rows, 1)


def _percent(similarity: float) -> str:
    """A similarity as whole percent, rounded down, so that what differs is not called 100 % the same."""
    return f"{int(similarity * 100)}%" if similarity < 1 else "nearly 100%"


def _brief(text: str) -> str:
    text = " ".join(text[:120].split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
