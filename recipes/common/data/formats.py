"""The row formats, as pydantic models: the columns that identify each, and how a row becomes chat messages."""

import itertools
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from common.data.documents import DOCUMENT_FORMATS, is_chatml
from common.data.turns import (
    GoldAnswer,
    Instruction,
    Message,
    RowFormat,
    Score,
    Text,
    TextOrMessages,
    Turn,
    Turns,
    as_turns,
    check_completion,
    check_prompt,
)


class ConversationFormat(RowFormat):
    def messages(self) -> Turns:
        raise NotImplementedError


class Alpaca(Instruction, ConversationFormat):
    columns: ClassVar = ("instruction", "output")
    output: Text

    def messages(self) -> Turns:
        return [*self.turns(), {"role": "assistant", "content": self.output}]


class ShareGPT(ConversationFormat):
    columns: ClassVar = ("conversations",)
    conversations: list[Turn]
    system: str | None = None
    tools: Any = None

    def messages(self) -> Turns:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [turn.as_dict() for turn in self.conversations]


class Messages(ConversationFormat):
    columns: ClassVar = ("messages",)
    conversation: list[Message] = Field(validation_alias="messages")
    tools: Any = None

    def messages(self) -> Turns:
        return [message.as_dict() for message in self.conversation]


class PromptCompletion(ConversationFormat):
    columns: ClassVar = ("prompt", "completion")
    prompt: TextOrMessages
    completion: TextOrMessages
    tools: Any = None

    def messages(self) -> Turns:
        return as_turns("user", self.prompt) + as_turns("assistant", self.completion)


class ChatMLText(ConversationFormat):
    columns: ClassVar = ("text",)
    text: Text

    @classmethod
    def fits(cls, fields: dict[str, Any]) -> bool:
        return super().fits(fields) and is_chatml(fields["text"])

    def messages(self) -> Turns:
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", self.text, flags=re.DOTALL)
        rest = re.sub(r"<\|im_start\|>\w+\n.*?<\|im_end\|>\s*", "", self.text, flags=re.DOTALL)
        if rest.strip():
            raise ValueError(f"not ChatML from end to end: {rest.strip()[:40]!r} stands outside its turns")
        return [Message(role=role, content=content).as_dict() for role, content in turns]


# One turn of a dialogue as Anthropic's HH-RLHF writes it, https://huggingface.co/datasets/Anthropic/hh-rlhf
HH_TURN = re.compile(r"\n\n(Human|Assistant):")

HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class PairFormat(RowFormat):
    def pair(self) -> tuple[Turns, Turns, Turns]:
        """Prompt, chosen, rejected. Raises ValueError when one of them is not what its name says."""
        prompt, chosen, rejected = self.split()
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same; there is nothing to prefer")
        return check_prompt(prompt), check_completion("chosen", chosen), check_completion("rejected", rejected)

    def split(self) -> tuple[Turns, Turns, Turns]:
        raise NotImplementedError


class PromptPair(PairFormat):
    """A prompt and its two completions. Where both repeat the prompt as their first turns, it is removed from them."""

    columns: ClassVar = ("prompt", "chosen", "rejected")
    prompt: TextOrMessages
    chosen: TextOrMessages
    rejected: TextOrMessages
    tools: Any = None

    def split(self) -> tuple[Turns, Turns, Turns]:
        prompt = as_turns("user", self.prompt)
        chosen, rejected = as_turns("assistant", self.chosen), as_turns("assistant", self.rejected)
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, chosen, rejected


TextOrTurn = Annotated[
    Annotated[Text, Tag("as text")] | Annotated[Turn, Tag("as turn")],
    Discriminator(lambda value: "as text" if isinstance(value, str) else "as turn"),
]


class ShareGPTPair(PairFormat):
    """A ShareGPT conversation up to the assistant's turn, and its two completions."""

    columns: ClassVar = ("conversations", "chosen", "rejected")
    conversations: list[Turn]
    chosen: TextOrTurn
    rejected: TextOrTurn
    system: str | None = None
    tools: Any = None

    def split(self) -> tuple[Turns, Turns, Turns]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = system + [turn.as_dict() for turn in self.conversations]
        return prompt, self._answer(self.chosen), self._answer(self.rejected)

    @staticmethod
    def _answer(answer: str | Turn) -> Turns:
        return as_turns("assistant", answer) if isinstance(answer, str) else [answer.as_dict()]


class DialoguePair(PairFormat):
    """Two whole dialogues, as messages or as HH-RLHF's text; the turns that they share at the start are the prompt."""

    columns: ClassVar = ("chosen", "rejected")
    chosen: TextOrMessages
    rejected: TextOrMessages
    tools: Any = None

    def split(self) -> tuple[Turns, Turns, Turns]:
        chosen, rejected = self._dialogue("chosen", self.chosen), self._dialogue("rejected", self.rejected)
        alike = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False))
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


class PromptFormat(RowFormat):
    if TYPE_CHECKING:  # a column of every one but InstructionOnly
        prompt: TextOrMessages

    def prompt_turns(self) -> Turns:
        """The prompt. Raises ValueError when it does not end with a turn of the user or of a tool."""
        raise NotImplementedError

    @classmethod
    def other_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The row's other columns, for the reward functions."""
        own = {field.validation_alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in fields.items() if name not in own}


class PromptOnly(PromptFormat):
    columns: ClassVar = ("prompt",)
    prompt: TextOrMessages
    tools: Any = None

    def prompt_turns(self) -> Turns:
        return check_prompt(as_turns("user", self.prompt))


class PromptAnswer(PromptOnly):
    columns: ClassVar = ("prompt", "answer")
    answer: GoldAnswer


class QuestionAnswer(PromptAnswer):
    columns: ClassVar = ("question", "answer")
    prompt: TextOrMessages = Field(validation_alias="question")


class ProblemAnswer(PromptAnswer):
    columns: ClassVar = ("problem", "answer")
    prompt: TextOrMessages = Field(validation_alias="problem")


class ProblemSolution(ProblemAnswer):
    columns: ClassVar = ("problem", "solution")
    answer: GoldAnswer = Field(validation_alias="solution")


class InstructionOnly(Instruction, PromptFormat):
    columns: ClassVar = ("instruction",)

    def prompt_turns(self) -> Turns:
        return self.turns()


class RatingFormat(RowFormat):
    response: TextOrMessages
    score: Score

    def prompt_turns(self) -> Turns:
        raise NotImplementedError

    def response_turns(self) -> Turns:
        """The completion that is rated. Raises ValueError when it is not made of turns of the assistant."""
        return check_completion("response", as_turns("assistant", self.response))


class PromptRating(RatingFormat):
    columns: ClassVar = ("prompt", "response", "score")
    prompt: TextOrMessages
    tools: Any = None

    def prompt_turns(self) -> Turns:
        return check_prompt(as_turns("user", self.prompt))


class InstructionRating(Instruction, RatingFormat):
    columns: ClassVar = ("instruction", "response", "score")

    def prompt_turns(self) -> Turns:
        return self.turns()


Formats = dict[str, type[RowFormat]]

# In each table, the first format whose columns a row has wins: a row with `messages` and a stray `text` is messages.
FORMATS: Formats = {
    "messages": Messages,
    "sharegpt": ShareGPT,
    "prompt-completion": PromptCompletion,
    "alpaca": Alpaca,
    "chatml-text": ChatMLText,
}

SFT_FORMATS: Formats = {**FORMATS, **DOCUMENT_FORMATS}
PAIR_FORMATS: Formats = {
    "preference": PromptPair,
    "sharegpt-preference": ShareGPTPair,
    "dialogue-preference": DialoguePair,
}

RATING_FORMATS: Formats = {
    "prompt-rating": PromptRating,
    "instruction-rating": InstructionRating,
}

PROBLEM_FORMATS: Formats = {
    "prompt-answer": PromptAnswer,
    "question-answer": QuestionAnswer,
    "problem-answer": ProblemAnswer,
    "problem-solution": ProblemSolution,
    "prompt": PromptOnly,
    "instruction": InstructionOnly,
}

PROMPT_FORMATS: Formats = {**PAIR_FORMATS, **RATING_FORMATS, **PROBLEM_FORMATS}


def detect(fields: dict[str, Any], formats: Formats = FORMATS) -> str | None:
    """The name of the first of the `formats` that a row of these fields fits, or None."""
    return next((name for name, row in formats.items() if row.fits(fields)), None)
