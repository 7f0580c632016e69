"""Read the examples of a data file once, and keep what the report needs: counts, hashes, lengths and a sample.

Memory grows by about two hundred bytes a row, whatever its length. Comparisons of rows with each other and other slow
checks use a random sample of at most 20,000 rows; the report says so.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from common.data.examples import Conversation, Document, Feedback, Pair, Prompt, Rating

from check_data import texts
from check_data.duplicates import NearDuplicates, distinct
from check_data.findings import Findings
from check_data.tasks import Example

SAMPLE_ROWS = 20_000
NGRAM_ROWS = 5_000
CLIP = 1_000  # characters of a prompt and of a completion in the sample
LANGUAGE = 200  # characters of a prompt and of a completion that tell the language
NEARLY_IDENTICAL = 0.05  # the share of the longer completion in which a pair differs


@dataclass(frozen=True, slots=True)
class Sampled:
    """The beginning of a row's prompt and completion."""

    place: str
    prompt: str
    completion: str
    is_copy: bool  # an exact duplicate of an earlier row
    overlaps: bool  # its prompt is one of the evaluation data


class Prompts:
    """The prompts of the evaluation data: by hash to find the same, and by likeness to find similar ones."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.places: dict[int, str] = {}
        self.similar = NearDuplicates()
        for count, example in enumerate(examples):
            prompt = _text(_prompt(example))
            self.places.setdefault(hash(texts.normalized(prompt)), example.place)
            if count < SAMPLE_ROWS:
                self.similar.find_or_keep(example.place, prompt[:CLIP])


class Survey:
    """What is known of the data so far. `add` takes the next example, `finish` compares those of the sample."""

    def __init__(self, findings: Findings, evaluation: Prompts | None = None) -> None:
        self.findings = findings
        self.evaluation = evaluation
        self.rows = 0
        self.characters = array("I")
        self.prompt_hashes = array("q")
        self.languages: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.layouts: Counter[str] = Counter()
        self.systems = 0
        self.scores = array("d")
        self.labels: Counter[bool] = Counter()
        self.longer = Counter({"chosen": 0, "rejected": 0, "same": 0})
        self.pair_characters = [0, 0]
        self.gold_answers = 0
        self.gold_words = 0
        self.diversity: dict[str, float | None] = {}
        self.sample: list[Sampled] = []
        self._random = random.Random(42)
        self._files: dict[str, int] = {}
        self._seen: dict[int, int] = {}

    def add(self, example: Example) -> None:
        """Count an example, and look at it alone and next to those before it."""
        self.rows += 1
        place, prompt, completions = example.place, _prompt(example), _completions(example)
        prompt_text, completion_text = _text(prompt), "\n".join(completions)
        self.characters.append(min(len(prompt_text) + len(completion_text), 2**32 - 1))
        self.languages[texts.language(f"{prompt_text[:LANGUAGE]} {completion_text[:LANGUAGE]}")] += 1
        self.systems += bool(prompt) and prompt[0]["role"] == "system"

        prompt_hash = hash(texts.normalized(prompt_text))
        self.prompt_hashes.append(prompt_hash)
        held_out = self.evaluation.places.get(prompt_hash) if self.evaluation else None
        if held_out:
            self.findings.add("overlap", place, f"the same prompt as {held_out}")
        is_copy = self._look_for_the_same(place, _identity(example))
        self._look_at_turns(place, _turns(example))
        if not (isinstance(example, Prompt) or (isinstance(example, Feedback) and not example.label)):
            self._look_at_completions(place, prompt, completions)
        match example:
            case Pair():
                self._look_at_pair(place, completions[0], _text(example.rejected))
            case Feedback():
                self.labels[example.label] += 1
                if first := self._place_of(_identity(replace(example, label=not example.label))):
                    self.findings.add("contradiction", place, f"the other way round in {first}")
                    is_copy = True  # of a row that is compared with the others
            case Rating():
                self.scores.append(example.score)
            case Prompt(answer=str()) if "tests" not in example.fields:  # else it is a program, which the tests grade
                self._look_at_gold_answer(place, example.answer)
        self._draw(Sampled(place, prompt_text[:CLIP], completion_text[:CLIP], is_copy, held_out is not None))

    def _look_for_the_same(self, place: str, identity: str) -> bool:
        file, _, line = place.rpartition(":")
        here = self._files.setdefault(file, len(self._files)) << 40 | int(line)  # an int is the smallest there is
        first = self._seen.setdefault(hash(identity), here)
        if same := first != here:
            self.findings.add("duplicate", place, f"the same as {self._place_of(identity)}")
        return same

    def _place_of(self, identity: str) -> str | None:
        """Where that was first."""
        first = self._seen.get(hash(identity))
        if first is None:
            return None
        file = next(name for name, index in self._files.items() if index == first >> 40)
        return f"{file}:{first & (1 << 40) - 1}"

    def _look_at_turns(self, place: str, turns: list[dict[str, Any]]) -> None:
        roles = [turn["role"] for turn in turns]
        spoken = [role for role in roles if role in ("user", "assistant")]
        self.turns[len(spoken)] += 1
        if "tool" in roles:
            return  # calls and results come between
        if "system" in roles[1:] or spoken[:1] == ["assistant"] or any(map(str.__eq__, spoken, spoken[1:])):
            order = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
            self.findings.add("turn-order", place, f"turns of user and assistant do not alternate: {order}")

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

    def _draw(self, row: Sampled) -> None:
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append(row)
        elif (index := self._random.randrange(self.rows)) < SAMPLE_ROWS:  # algorithm R: every row has the same chance
            self.sample[index] = row

    def finish(self) -> None:
        """Look for near duplicates, in the sample and of the evaluation data, and for repeated n-grams."""
        kept = NearDuplicates()
        for row in self.sample:
            if row.is_copy:
                continue
            if near := kept.find_or_keep(row.place, f"{row.prompt}\n{row.completion}"):
                self.findings.add("near-duplicate", row.place, f"{near[1]:.0%} the same as {near[0]}")
            if self.evaluation and not row.overlaps and (near := self.evaluation.similar.find(row.prompt)):
                self.findings.add("overlap", row.place, f"its prompt is {near[1]:.0%} the same as {near[0]}")
        some = self._random.sample(self.sample, min(NGRAM_ROWS, len(self.sample)))
        completions = [row.completion or row.prompt for row in some]
        self.diversity = {f"distinct {n}-grams": distinct(completions, n) for n in (1, 2, 3)}

    def distinct_prompts(self) -> float:
        """The share of distinct prompts, whatever their spaces and case."""
        return len(np.unique(np.frombuffer(self.prompt_hashes, dtype=np.int64))) / max(self.rows, 1)


def _prompt(example: Example) -> list[dict[str, Any]]:
    """The turns before the first completion. A document is looked at like a prompt, which has no completion."""
    if isinstance(example, Document):
        return [{"role": "user", "content": example.text}]
    if isinstance(example, Conversation):
        return [*takewhile(lambda turn: turn["role"] != "assistant", example.messages)]
    return example.prompt


def _completions(example: Example) -> list[str]:
    """The completions that an example teaches; of a pair the chosen one. A prompt teaches none by itself."""
    match example:
        case Conversation():
            turns = example.messages
        case Pair():
            turns = example.chosen
        case Feedback():
            turns = example.completion
        case Rating():
            turns = example.response
        case Prompt() | Document():
            return []
    return [turn["content"] for turn in turns if turn["role"] == "assistant" and turn["content"]]


def _turns(example: Example) -> list[dict[str, Any]]:
    match example:
        case Conversation():
            return example.messages
        case Pair():
            return example.prompt + example.chosen
        case Feedback():
            return example.prompt + example.completion
        case Rating():
            return example.prompt + example.response
        case Prompt():
            return example.prompt
        case Document():
            return []


def _identity(example: Example) -> str:
    """All that makes an example what it is, as one text."""
    match example:
        case Conversation():
            parts = example.messages
        case Pair():
            parts = [*example.prompt, example.chosen, example.rejected]
        case Feedback():
            parts = [*example.prompt, example.completion, example.label]
        case Rating():
            parts = [*example.prompt, example.response, example.score]
        case Prompt():
            parts = [*example.prompt, example.answer]
        case Document():
            parts = [example.text]
    return repr(parts)


def _text(turns: list[dict[str, Any]]) -> str:
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def _brief(text: str) -> str:
    text = " ".join(text[:120].split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
