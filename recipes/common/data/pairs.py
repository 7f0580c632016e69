"""The row formats of preference pairs: a prompt, a better completion and a worse one."""

import itertools
import re
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Tag

from common.data.messages import Turn
from common.data.turns import (
    Instruction,
    MessageList,
    RowFormat,
    Text,
    TextOrMessages,
    Turns,
    as_turns,
    check_completion,
    check_prompt,
    take_marks,
    without_prompt,
)

# One turn of a dialogue as Anthropic's HH-RLHF writes it, https://huggingface.co/datasets/Anthropic/hh-rlhf
HH_TURN = re.compile(r"\n\n(Human|Assistant):")

HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class PairFormat(RowFormat):
    def pair(self) -> tuple[Turns, Turns, Turns]:
        """Prompt, chosen, rejected. Raises ValueError when one of them is not what its name says."""
        prompt, chosen, rejected = self.split()
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same; there is nothing to prefer")
        return (
            check_prompt(self.with_system(prompt)),
            check_completion("chosen", chosen),
            check_completion("rejected", rejected),
        )

    def split(self) -> tuple[Turns, Turns, Turns]:
        raise NotImplementedError


class CompletionPair(PairFormat):
    """A prompt and its two completions. Where they repeat the prompt as their first turns, it is removed from them."""

    chosen: TextOrMessages
    rejected: TextOrMessages

    def split(self) -> tuple[Turns, Turns, Turns]:
        prompt = self.context()
        chosen, rejected = as_turns("assistant", self.chosen), as_turns("assistant", self.rejected)
        return prompt, without_prompt(prompt, chosen), without_prompt(prompt, rejected)

    def context(self) -> Turns:
        raise NotImplementedError


class PromptPair(CompletionPair):
    columns: ClassVar = ("prompt", "chosen", "rejected")
    prompt: TextOrMessages

    def context(self) -> Turns:
        return as_turns("user", self.prompt)


class InstructionPair(Instruction, CompletionPair):
    """As LLaMA-Factory has pairs."""

    columns: ClassVar = ("instruction", "chosen", "rejected")

    def context(self) -> Turns:
        return self.turns()


TextOrTurn = Annotated[
    Annotated[Text, Tag("as text")] | Annotated[Turn, Tag("as turn")],
    Discriminator(lambda value: "as text" if isinstance(value, str) else "as turn"),
]


class ShareGPTPair(PairFormat):
    """A ShareGPT conversation up to the assistant's turn, and its two completions."""

    columns: ClassVar = ("conversations", "chosen", "rejected")
    conversations: MessageList
    chosen: TextOrTurn
    rejected: TextOrTurn

    def split(self) -> tuple[Turns, Turns, Turns]:
        return as_turns("user", self.conversations), self._answer(self.chosen), self._answer(self.rejected)

    @staticmethod
    def _answer(answer: str | Turn) -> Turns:
        return as_turns("assistant", answer if isinstance(answer, str) else [answer])


class DialoguePair(PairFormat):
    """Two whole dialogues, as messages or as HH-RLHF's text; the turns that they share at the start are the prompt."""

    columns: ClassVar = ("chosen", "rejected")
    chosen: TextOrMessages
    rejected: TextOrMessages

    def split(self) -> tuple[Turns, Turns, Turns]:
        chosen, rejected = self._dialogue("chosen", self.chosen), self._dialogue("rejected", self.rejected)
        both = zip(take_marks(chosen)[0], take_marks(rejected)[0], strict=False)
        alike = itertools.takewhile(lambda turns: turns[0] == turns[1], both)
        shared = len(list(alike))
        if not shared:
            raise ValueError("chosen and rejected share no prompt: their first turns differ")
        if shared == len(chosen) == len(rejected):
            raise ValueError("chosen and rejected are the same; there is nothing to prefer")
        return chosen[:shared], chosen[shared:], rejected[shared:]

    @staticmethod
    def _dialogue(name: str, dialogue: Any) -> Turns:
        if not isinstance(dialogue, str):
            return as_turns("assistant", dialogue)
        before, *parts = HH_TURN.split("\n\n" + dialogue.lstrip())
        if before.strip() or not parts:
            raise ValueError(
                f"{name}: expected a whole dialogue, messages or text like '\\n\\nHuman: ...\\n\\nAssistant: ...'; "
                "for single answers add a column prompt"
            )
        turns = [
            {"role": HH_ROLES[role], "content": text.strip()}
            for role, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        for turn in turns:
            if not turn["content"]:
                raise ValueError(f"{name}: the turn of the {turn['role']} is empty; expected text")
        return turns
