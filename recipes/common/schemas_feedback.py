"""The forms of rows that carry feedback on an answer, as pydantic models: pairs, ratings, and problems to solve.

A pair says which of two answers is better, a rating gives one answer a number, and a problem is a prompt whose answers
are scored later, against its gold answer where it has one. What each form is made of, turns and texts, is in
schemas.py.
"""

import itertools
import math
import re
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, Tag

from .schemas import Form, Instruction, Text, TextOrMessages, Turn, as_turns

Turns = list[dict[str, Any]]

# One turn of a dialogue as Anthropic's HH-RLHF writes it, https://huggingface.co/datasets/Anthropic/hh-rlhf
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _check_prompt(prompt: Turns) -> Turns:
    """`prompt` itself; ValueError unless it ends where the assistant is to speak."""
    last = prompt[-1]["role"] if prompt else None
    if last not in ("user", "tool"):
        ends = f"ends in a turn of the {last}" if last else "is empty"
        raise ValueError(f"prompt: {ends}; expected it to end in a turn of the user or of a tool")
    return prompt


def _check_answer(name: str, answer: Turns) -> Turns:
    """`answer` itself; ValueError unless it is what an assistant says, with its tools' results in between."""
    if not answer:
        raise ValueError(f"{name}: is empty; expected an answer")
    for turn in answer:
        if turn["role"] not in ("assistant", "tool"):
            raise ValueError(f"{name}: holds a turn of the {turn['role']}; expected only what the assistant answers")
    if answer[-1]["role"] != "assistant":
        raise ValueError(f"{name}: ends in a turn of the tool; expected it to end in a turn of the assistant")
    return answer


class PairForm(Form):
    def pair(self) -> tuple[Turns, Turns, Turns]:
        """Prompt, chosen, rejected. Raises ValueError when they are no such three."""
        prompt, chosen, rejected = self.split()
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same; there is nothing to prefer")
        return _check_prompt(prompt), _check_answer("chosen", chosen), _check_answer("rejected", rejected)

    def split(self) -> tuple[Turns, Turns, Turns]:
        raise NotImplementedError


class PromptPair(PairForm):
    """A prompt and its two answers. Answers that repeat the prompt as their first turns are taken without it."""

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


class ShareGPTPair(PairForm):
    """A ShareGPT conversation up to the assistant's turn, and two ways to go on."""

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


class DialoguePair(PairForm):
    """Two whole dialogues, as messages or as HH-RLHF's text; what they begin with alike is the prompt."""

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


def _text_of_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"should be text or a finite number, found {value}")
    return str(value)


def _number_of_text(value: Any) -> Any:
    """A number that a CSV file holds as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


GoldAnswer = Annotated[Text, BeforeValidator(_text_of_number)]
LARGEST = 3e38  # about what float32 holds, in which rewards are computed
Score = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False), BeforeValidator(_number_of_text)]


class ProblemForm(Form):
    def asked(self) -> Turns:
        """The prompt. Raises ValueError when it does not end where the assistant is to speak."""
        return _check_prompt(as_turns("user", self.prompt))

    @classmethod
    def other_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What the row holds besides the problem itself, for the reward functions."""
        own = {field.validation_alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in fields.items() if name not in own}


class PromptAnswer(ProblemForm):
    columns: ClassVar = ("prompt", "answer")
    prompt: TextOrMessages
    answer: GoldAnswer
    tools: Any = None


class QuestionAnswer(ProblemForm):
    columns: ClassVar = ("question", "answer")
    prompt: TextOrMessages = Field(validation_alias="question")
    answer: GoldAnswer
    tools: Any = None


class ProblemAnswer(ProblemForm):
    columns: ClassVar = ("problem", "answer")
    prompt: TextOrMessages = Field(validation_alias="problem")
    answer: GoldAnswer
    tools: Any = None


class ProblemSolution(ProblemForm):
    columns: ClassVar = ("problem", "solution")
    prompt: TextOrMessages = Field(validation_alias="problem")
    answer: GoldAnswer = Field(validation_alias="solution")
    tools: Any = None


class PromptOnly(ProblemForm):
    columns: ClassVar = ("prompt",)
    prompt: TextOrMessages
    tools: Any = None


class InstructionOnly(Instruction, ProblemForm):
    columns: ClassVar = ("instruction",)

    def asked(self) -> Turns:
        return self.turns()


class RatingForm(Form):
    def asked(self) -> Turns:
        raise NotImplementedError

    def answered(self) -> Turns:
        """The answer that is rated. Raises ValueError when it is not what an assistant says."""
        return _check_answer("response", as_turns("assistant", self.response))


class PromptRating(RatingForm):
    columns: ClassVar = ("prompt", "response", "score")
    prompt: TextOrMessages
    response: TextOrMessages
    score: Score
    tools: Any = None

    def asked(self) -> Turns:
        return _check_prompt(as_turns("user", self.prompt))


class InstructionRating(Instruction, RatingForm):
    columns: ClassVar = ("instruction", "response", "score")
    response: TextOrMessages
    score: Score

    def asked(self) -> Turns:
        return self.turns()
