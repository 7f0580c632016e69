"""How long examples are in a model's own tokens."""

from array import array
from collections.abc import Iterator

import jinja2
from common.data.examples import Conversation, Pair, Prompt, Rating
from common.data.rows import Faults
from common.lm.chat import end_token, set_chat_template, tokenize, tokenize_pairs
from common.lm.hub import Model, fetch, load_tokenizer

from .tasks import Example

SHOWN_PLACES = 5


class Lengths:
    """The lengths of examples in tokens of one model: prompt and answer together, of a pair the longer side.

    A problem is its prompt alone, up to where the model goes on. What the model could learn nothing from is a fault.
    """

    def __init__(self, model: Model, chat_template_path: str | None, max_length: int, faults: Faults) -> None:
        self.tokenizer = load_tokenizer(fetch(model))
        set_chat_template(self.tokenizer, chat_template_path, model.name)
        self.end = end_token(self.tokenizer)
        self.model = model.name
        self.max_length = max_length
        self.faults = faults
        self.tokens = array("I")
        self.cut = 0
        self.refused = 0  # examples of which there is nothing to learn, each a fault
        self.cut_places: list[str] = []

    def add(self, batch: list[Example]) -> None:
        before = len(self.tokens)
        for place, length in self._lengths(batch):
            self.tokens.append(length)
            if length > self.max_length:
                self.cut += 1
                self.cut_places += [place] if len(self.cut_places) < SHOWN_PLACES else []
        self.refused += len(batch) - (len(self.tokens) - before)

    def _lengths(self, batch: list[Example]) -> Iterator[tuple[str, int]]:
        if isinstance(batch[0], Pair):
            for pair in tokenize_pairs(self.tokenizer, batch, self.max_length, self.faults):
                yield pair.place, pair.full_length
        elif isinstance(batch[0], Prompt):
            for problem in batch:
                if ids := self.prompt_ids(problem):
                    yield problem.place, len(ids)
        else:
            for example in tokenize(self.tokenizer, map(as_conversation, batch), self.max_length, self.faults):
                yield example.place, example.full_length

    def prompt_ids(self, problem: Prompt) -> list[int]:
        """The tokens of a problem, up to where the model goes on; none, and a fault, if the template refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                problem.prompt, tools=problem.tools, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError) as error:
            self.faults.add(problem.place, str(error))
            return []
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def as_conversation(example: Conversation | Rating) -> Conversation:
    if isinstance(example, Conversation):
        return example
    return Conversation(example.place, example.prompt + example.response, example.tools)
