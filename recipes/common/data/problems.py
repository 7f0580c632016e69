"""The row formats of problems: prompts whose completions are scored, with or without a gold answer."""

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from common.data.turns import GoldAnswer, Instruction, RowFormat, TextOrMessages, Turns, as_turns, check_prompt


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
