"""The row formats of problems: prompts whose completions are scored, with or without a gold answer."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from common.data.turns import (
    GoldAnswer,
    Instruction,
    RowFormat,
    Text,
    TextOrMessages,
    Turns,
    as_turns,
    check_prompt,
    list_of_json,
)


class PromptFormat(RowFormat):
    """A prompt, and in `answer` its gold answer, if it has one."""

    if TYPE_CHECKING:  # a column of every one but InstructionOnly
        prompt: TextOrMessages

    def prompt_turns(self) -> Turns:
        """The prompt with its system prompt. Raises ValueError unless it ends in a turn of the user or of a tool."""
        return check_prompt(self.with_system(self.context()))

    def context(self) -> Turns:
        return as_turns("user", self.prompt)

    def other_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The row's other columns, for the reward functions."""
        own = self.own_columns()
        return {name: value for name, value in fields.items() if name not in own}


class PromptOnly(PromptFormat):
    columns: ClassVar = ("prompt",)
    prompt: TextOrMessages


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

    def context(self) -> Turns:
        return self.turns()


class Graded(PromptOnly):
    """A prompt with what grades its completions in columns of its own, which reward functions get as well."""

    def tests(self) -> list[str] | None:
        """The tests for the reward `code`, if the row has any."""
        return None

    def other_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The row's other columns, and `tests` where it has none of this name."""
        own = PromptOnly.own_columns() | set(self.columns[:1])
        tests = {"tests": tests} if (tests := self.tests()) else {}
        return tests | {name: value for name, value in fields.items() if name not in own}


class HumanEval(Graded):
    """The beginning of a program and a function `check` that tests it, https://github.com/openai/human-eval."""

    columns: ClassVar = ("prompt", "test", "entry_point")
    test: Text
    entry_point: Text
    canonical_solution: str | None = None

    @property
    def answer(self) -> str | None:
        is_code = isinstance(self.prompt, str) and self.canonical_solution
        return f"{self.prompt}{self.canonical_solution}" if is_code else None

    def tests(self) -> list[str]:
        return [f"{self.test}\n\ncheck({self.entry_point})"]


class MBPP(Graded):
    """A task in words and a list of tests, as in the sanitized data of https://arxiv.org/abs/2108.07732."""

    columns: ClassVar = ("prompt", "test_list")
    test_list: Annotated[list[Text], BeforeValidator(list_of_json)]
    test_imports: Annotated[list[str] | None, BeforeValidator(list_of_json)] = None
    test_setup_code: str | None = None
    code: str | None = None

    @property
    def answer(self) -> str | None:
        return self.code or None

    def tests(self) -> list[str]:
        before = "\n".join([*(self.test_imports or ()), self.test_setup_code or ""]).strip()
        return [f"{before}\n{test}" if before else test for test in self.test_list]


class MBPPText(MBPP):
    columns: ClassVar = ("text", "test_list")
    prompt: TextOrMessages = Field(validation_alias="text")


class Verl(Graded):
    """The gold answer in `reward_model`, as verl has it, https://verl.readthedocs.io/en/latest/preparation/."""

    columns: ClassVar = ("prompt", "reward_model")
    reward_model: dict[str, Any]

    @property
    def answer(self) -> str | None:
        """The ground truth that is text or a number; of another kind, such as tests, it is for reward functions."""
        truth = self.reward_model.get("ground_truth")
        if isinstance(truth, bool) or not isinstance(truth, str | int | float):
            return None
        return str(truth) if str(truth).strip() else None
