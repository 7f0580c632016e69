"""The row formats, as pydantic models: the columns that identify each, and how a row becomes chat messages."""

import re
from typing import Any, ClassVar

from pydantic import Field

from common.data.documents import DOCUMENT_FORMATS, is_chatml
from common.data.messages import Message
from common.data.pairs import DialoguePair, InstructionPair, PromptPair, ShareGPTPair
from common.data.problems import (
    MBPP,
    HumanEval,
    InstructionOnly,
    MBPPText,
    ProblemAnswer,
    ProblemSolution,
    PromptAnswer,
    PromptOnly,
    QuestionAnswer,
    Verl,
)
from common.data.turns import (
    Instruction,
    MessageList,
    RowFormat,
    Score,
    Text,
    TextOrMessages,
    Turns,
    as_turns,
    check_completion,
    check_prompt,
    without_prompt,
)


class ConversationFormat(RowFormat):
    """`functions` are tools as the OpenAI API had them before `tools`."""

    functions: Any = None

    def messages(self) -> Turns:
        """The conversation with its system prompt. `train` is False in a turn of the assistant that carries no loss."""
        return self.with_system(self.conversation())

    def conversation(self) -> Turns:
        raise NotImplementedError


class Alpaca(Instruction, ConversationFormat):
    """The answers in `history` carry loss too, as in LLaMA-Factory, which defines the column."""

    columns: ClassVar = ("instruction", "output")
    output: Text

    def conversation(self) -> Turns:
        return [*self.turns(), {"role": "assistant", "content": self.output}]


class ShareGPT(ConversationFormat):
    columns: ClassVar = ("conversations",)
    turns: MessageList = Field(validation_alias="conversations")

    def conversation(self) -> Turns:
        return as_turns("user", self.turns)


class Messages(ShareGPT):
    columns: ClassVar = ("messages",)
    turns: MessageList = Field(validation_alias="messages")


class PromptCompletion(ConversationFormat):
    """The turns of the assistant in `prompt` are context, as in TRL, unless the row marks them to carry loss."""

    columns: ClassVar = ("prompt", "completion")
    prompt: TextOrMessages
    completion: TextOrMessages

    def conversation(self) -> Turns:
        context, completion = as_turns("user", self.prompt), as_turns("assistant", self.completion)
        return [{"train": False, **turn} for turn in context] + without_prompt(context, completion)


class ChatMLText(ConversationFormat):
    columns: ClassVar = ("text",)
    text: Text

    @classmethod
    def fits(cls, fields: dict[str, Any]) -> bool:
        return super().fits(fields) and is_chatml(fields["text"])

    def conversation(self) -> Turns:
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", self.text, flags=re.DOTALL)
        rest = re.sub(r"<\|im_start\|>\w+\n.*?<\|im_end\|>\s*", "", self.text, flags=re.DOTALL)
        if rest.strip():
            raise ValueError(f"not ChatML from end to end: {rest.strip()[:40]!r} stands outside its turns")
        return [Message(role=role, content=content).as_dict() for role, content in turns]


class RatingFormat(RowFormat):
    response: TextOrMessages
    score: Score

    def prompt_turns(self) -> Turns:
        """The prompt with its system prompt. Raises ValueError unless it ends in a turn of the user or of a tool."""
        return check_prompt(self.with_system(self.context()))

    def context(self) -> Turns:
        raise NotImplementedError

    def response_turns(self) -> Turns:
        """The completion that is rated. Raises ValueError when it is not made of turns of the assistant."""
        return check_completion("response", as_turns("assistant", self.response))


class PromptRating(RatingFormat):
    columns: ClassVar = ("prompt", "response", "score")
    prompt: TextOrMessages

    def context(self) -> Turns:
        return as_turns("user", self.prompt)


class InstructionRating(Instruction, RatingFormat):
    columns: ClassVar = ("instruction", "response", "score")

    def context(self) -> Turns:
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
    "instruction-preference": InstructionPair,
    "sharegpt-preference": ShareGPTPair,
    "dialogue-preference": DialoguePair,
}

RATING_FORMATS: Formats = {
    "prompt-rating": PromptRating,
    "instruction-rating": InstructionRating,
}

# Problems in the words of a benchmark or of another trainer, with tests or with a gold answer inside a column.
GRADED_FORMATS: Formats = {
    "humaneval": HumanEval,
    "mbpp": MBPP,
    "mbpp-text": MBPPText,
    "verl": Verl,
}

PROBLEM_FORMATS: Formats = {
    **GRADED_FORMATS,
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
