"""How long examples are in a model's own tokens."""

import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields

from common.data.examples import Conversation, Document, Feedback, Pair, Prompt, Rating
from common.data.rows import Faults
from common.lm.chat import Tokenized, tokenize, tokenize_pairs
from common.lm.documents import document_ids
from common.lm.feedback import tokenize_feedback
from common.lm.hub import Model, fetch
from common.lm.load import load_chat_tokenizer, load_text_tokenizer
from common.lm.pieces import SPECIAL, in_words
from common.lm.render import ChatFormat

from check_data.limits import Limits
from check_data.parts import leaves
from check_data.tasks import Example


class Lengths:
    """The lengths of examples in tokens of one model: prompt and completion together, of a pair the longer one.

    Of a prompt without a completion, the prompt; of a document, all of it, with its end token. An example that the
    model could learn nothing from is a fault.
    """

    def __init__(
        self, model: Model, chat_template_path: str | None, limits: Limits, faults: Faults, raw_text: bool = False
    ) -> None:
        load = load_text_tokenizer if raw_text else load_chat_tokenizer
        self.tokenizer, _ = load(fetch(model, weights=False), chat_template_path)
        self.chat = None if raw_text else ChatFormat(self.tokenizer)
        self.tokenizer.model_max_length = sys.maxsize  # else it warns of long rows, which the report counts
        self.model = model.name
        self.chat_template = chat_template_path or "its own"
        self.limits = limits
        self.max_length = limits.rows.limit
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special_token = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "$^")
        self.faults = faults
        self.tokens = array("I")
        self.refused = 0  # examples of which there is nothing to learn, each a fault

    def add(self, batch: list[Example]) -> None:
        before = len(self.tokens)
        documents = {example.place for example in batch if isinstance(example, Document)}
        for place, length in self._lengths(batch):
            self.tokens.append(length)
            if place not in documents:  # a long document becomes several rows
                self.limits.rows.add(place, length)
        for example in batch:
            self._look_for_special_tokens(example)
        self.refused += len(batch) - (len(self.tokens) - before)

    def _lengths(self, batch: list[Example]) -> Iterator[tuple[str, int]]:
        pairs = [example for example in batch if isinstance(example, Pair)]
        for pair in tokenize_pairs(self.tokenizer, pairs, self.max_length, self.faults) if pairs else ():
            yield self._row(pair)
        for prompt in (example for example in batch if isinstance(example, Prompt)):
            if ids := self.prompt_ids(prompt, self.faults):
                self.limits.add_prompt(prompt.place, len(ids))
                yield prompt.place, len(ids)
        documents = [example for example in batch if isinstance(example, Document)]
        for place, ids in document_ids(self.tokenizer, documents, self.faults) if documents else ():
            yield place, len(ids)
        feedback = [example for example in batch if isinstance(example, Feedback)]
        for row in tokenize_feedback(self.tokenizer, feedback, self.max_length, self.faults) if feedback else ():
            yield self._row(row)
        conversations = [as_conversation(example) for example in batch if isinstance(example, Conversation | Rating)]
        for row in tokenize(self.tokenizer, conversations, self.max_length, self.faults) if conversations else ():
            yield self._row(row)

    def _row(self, row: Tokenized) -> tuple[str, int]:
        if not row.teaches:
            self.limits.add_without_loss(row.place, row.full_length)
        self._note(row.place, row.lost)
        return row.place, row.full_length

    def _note(self, place: str, lost: Iterable[str]) -> None:
        """Note what the chat template drops of a row, in the words of the recipes."""
        for kind in lost:
            if kind != SPECIAL:  # a finding of its own, which has the token
                self.faults.note(place, in_words(kind))

    def _look_for_special_tokens(self, example: Example) -> None:
        """A special token in a text is one to the model too, whoever wrote it: the end of a turn, or of the text."""
        for text in leaves({field.name: getattr(example, field.name) for field in fields(example)}):
            if found := self.special_token.search(text):
                self.limits.findings.add("special-token", example.place, f"a text holds {found[0]}")
                return

    def prompt_ids(self, prompt: Prompt, faults: Faults) -> list[int]:
        """The tokens of a prompt, up to where its completion begins; none, and a fault, if the template refuses it."""
        assert self.chat is not None  # raw text has no prompts
        try:
            rendered = self.chat.render_prompt(prompt.prompt, prompt.tools)
        except ValueError as error:
            faults.add(prompt.place, str(error))
            return []
        self._note(prompt.place, rendered.lost)
        return self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def as_conversation(example: Conversation | Rating) -> Conversation:
    if isinstance(example, Conversation):
        return example
    context = frozenset(range(len(example.prompt)))  # only the completion is rated
    return Conversation(example.place, example.prompt + example.response, example.tools, context)
