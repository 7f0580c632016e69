"""How many rows and tokens a data file has, for the time of a run."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.examples import Conversation, Document, Example, Feedback, Pair, Prompt, Rating
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, PROMPT_FORMATS, RATING_FORMATS, SFT_FORMATS
from common.data.read import read_examples
from common.data.rows import find_source
from common.lm.hub import Model

FORMATS = {
    "sft": SFT_FORMATS,
    "dpo": PAIR_FORMATS,
    "kto": {**FEEDBACK_FORMATS, **RATING_FORMATS},
    "grpo": PROBLEM_FORMATS,
    "ppo": PROMPT_FORMATS,
    "reward": {**PAIR_FORMATS, **RATING_FORMATS},
}
TURN = 5  # tokens that a chat template puts around a turn, about
# Without a tokenizer: letters of a token, in text of the Latin alphabet and of others.
LATIN, OTHER = 4.0, 1.4


@dataclass(frozen=True)
class Rows:
    """The rows of a data source. `lengths` are the tokens of each sequence; a pair has two, of a prompt it is one."""

    count: int
    lengths: list[int]
    pairs: bool
    counted: bool  # by the model's tokenizer; else from the number of letters

    def cut(self, longest: int) -> list[int]:
        return [min(length, longest) for length in self.lengths]

    def padded_share(self, longest: int, together: int) -> float:
        """Useful tokens divided by those of batches of `together` sequences, padded to the longest of each."""
        lengths = self.cut(longest)
        random.Random(0).shuffle(lengths)
        batches = [lengths[first : first + together] for first in range(0, len(lengths), together)]
        return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def count(data: str, method: str, base: Model) -> Rows:
    """The rows of `data` as `method` reads them. Raises InputError as the recipe does."""
    examples: list[Example] = read_examples(find_source(data), FORMATS[method]).examples
    sequences = [sequence for example in examples for sequence in texts(example, method)]
    tokenizer = own_tokenizer(base)
    if tokenizer is None:
        lengths = [TURN * turns + guess(text) for turns, text in sequences]
    else:
        encoded = tokenizer.encode_batch([text for _, text in sequences], add_special_tokens=False)
        lengths = [TURN * turns + len(one.ids) for (turns, _), one in zip(sequences, encoded, strict=True)]
    return Rows(len(examples), lengths, isinstance(examples[0], Pair) and method != "ppo", tokenizer is not None)


def texts(example: Example, method: str) -> list[tuple[int, str]]:
    """The sequences of an example: how many turns each has, and their text."""
    match example:
        case Document(text=text):
            return [(0, text)]
        case Conversation(messages=messages):
            turns = [messages]
        case Pair() if method != "ppo":
            turns = [[*example.prompt, *example.chosen], [*example.prompt, *example.rejected]]
        case Rating() if method != "ppo":
            turns = [[*example.prompt, *example.response]]
        case Feedback():
            turns = [[*example.prompt, *example.completion]]
        case Prompt() | Pair() | Rating():
            turns = [list(example.prompt)]
    return [(len(one), "\n".join(str(turn.get("content") or "") for turn in one)) for one in turns]


def guess(text: str) -> int:
    """About how many tokens `text` has."""
    latin = sum(letter < "ɐ" for letter in text)
    return round(latin / LATIN + (len(text) - latin) / OTHER)


def own_tokenizer(base: Model) -> Any | None:
    """The model's tokenizer where it is on this machine; None elsewhere."""
    file: str | Path | None = Path(base.source, "tokenizer.json")
    if not base.local:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base.source, "tokenizer.json", revision=base.revision)
        file = cached if isinstance(cached, str) else None
    if file is None or not Path(file).is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))
