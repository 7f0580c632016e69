"""The row formats of thumbs up and down: a completion and whether it is good. And ratings, read as such."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from common.data.examples import Feedback, Rating
from common.data.formats import (
    RATING_FORMATS,
    Alpaca,
    ConversationFormat,
    Formats,
    Messages,
    PromptCompletion,
    ShareGPT,
)
from common.data.refused import LABEL_COLUMNS, is_label
from common.data.rows import Faults
from common.data.turns import Turns, as_turns, check_completion, check_prompt, without_prompt
from common.errors import InputError

WORDS = {"true": True, "yes": True, "good": True, "desirable": True, "up": True}
WORDS |= {"false": False, "no": False, "bad": False, "undesirable": False, "down": False}
SEVERAL = "holds {} turns, of which only the last can be good or bad; move the others to the prompt"


def _as_label(value: Any) -> bool:
    """A label as files have it: true or false, 1 or 0, or one of a few words, in CSV all of them as text."""
    word = value.strip().lower() if isinstance(value, str) else None
    if word in WORDS:
        return WORDS[word]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number in (0, 1):
        return number == 1
    hint = "; read other numbers as scores: --columns response=completion score=label, with --threshold"
    raise ValueError(f"expected true or false (or 1 or 0), found {value!r:.60}{hint if number is not None else ''}")


Label = Annotated[bool, BeforeValidator(_as_label)]


class FeedbackFormat(ConversationFormat):
    """A conversation whose last turn, the assistant's, is the completion that the label is about."""

    label: Label

    @model_validator(mode="before")
    @classmethod
    def _has_one_label(cls, fields: Any) -> Any:
        """The fields. Raises ValueError when label and kto_tag say different things."""
        given = [fields[column] for column in LABEL_COLUMNS if fields.get(column) is not None]
        if len(given) == 2 and all(map(is_label, given)) and _as_label(given[0]) != _as_label(given[1]):
            raise ValueError(f"{' and '.join(LABEL_COLUMNS)} contradict each other; remove one")
        return fields

    def feedback(self) -> tuple[Turns, Turns]:
        """Prompt and completion. Raises ValueError when one of them is not what its name says."""
        turns = self.messages()
        prompt, completion = turns[:-1], turns[-1:]
        if not completion or completion[0]["role"] != "assistant":
            last = f"ends in a turn of the {completion[0]['role']}" if completion else "holds no turns"
            raise ValueError(f"the conversation {last}; expected the completion that the label is about at its end")
        return check_prompt(prompt), check_completion("completion", completion)


class MessagesLabel(FeedbackFormat, Messages):
    columns: ClassVar = ("messages", "label")


class ShareGPTLabel(FeedbackFormat, ShareGPT):
    columns: ClassVar = ("conversations", "label")


class PromptLabel(FeedbackFormat, PromptCompletion):
    columns: ClassVar = ("prompt", "completion", "label")

    def feedback(self) -> tuple[Turns, Turns]:
        completion = without_prompt(as_turns("user", self.prompt), as_turns("assistant", self.completion))
        check_completion("completion", completion)
        if len(completion) > 1:
            raise ValueError(f"completion: {SEVERAL.format(len(completion))}")
        return super().feedback()


class AlpacaLabel(FeedbackFormat, Alpaca):
    columns: ClassVar = ("instruction", "output", "label")


# LLaMA-Factory's name of the label.
class MessagesTag(MessagesLabel):
    columns: ClassVar = ("messages", "kto_tag")
    label: Label = Field(validation_alias="kto_tag")


class ShareGPTTag(ShareGPTLabel):
    columns: ClassVar = ("conversations", "kto_tag")
    label: Label = Field(validation_alias="kto_tag")


class PromptTag(PromptLabel):
    columns: ClassVar = ("prompt", "completion", "kto_tag")
    label: Label = Field(validation_alias="kto_tag")


class AlpacaTag(AlpacaLabel):
    columns: ClassVar = ("instruction", "output", "kto_tag")
    label: Label = Field(validation_alias="kto_tag")


FEEDBACK_FORMATS: Formats = {
    "messages-label": MessagesLabel,
    "messages-kto-tag": MessagesTag,
    "sharegpt-label": ShareGPTLabel,
    "sharegpt-kto-tag": ShareGPTTag,
    "prompt-label": PromptLabel,
    "prompt-kto-tag": PromptTag,
    "alpaca-label": AlpacaLabel,
    "alpaca-kto-tag": AlpacaTag,
}

LABELLED_OR_RATED: Formats = {**FEEDBACK_FORMATS, **RATING_FORMATS}


def as_feedback(examples: Sequence[Feedback | Rating], threshold: float | None) -> list[Feedback]:
    """Examples of one kind as feedback: a rating is good when its score is `threshold` or more.

    Raises InputError for ratings without a threshold, for labels with one, and when all are good or all are bad.
    """
    scores = [example.score for example in examples if isinstance(example, Rating)]
    if scores and threshold is None:
        raise InputError(
            f"these rows have scores, from {min(scores):g} to {max(scores):g}; give the score from which on a "
            "completion is good with --threshold"
        )
    if threshold is not None and not scores:
        raise InputError(f"--threshold {threshold:g}: these rows have labels, no scores; leave it out")
    faults, feedback = Faults(), []
    for example in examples:
        if isinstance(example, Rating):
            if len(example.response) > 1:
                faults.add(example.place, f"response: {SEVERAL.format(len(example.response))}")
            good = example.score >= (threshold or 0)
            feedback.append(Feedback(example.place, example.prompt, example.response, good, example.tools))
        else:
            feedback.append(example)
    faults.stop()
    check_both((example.label for example in feedback), "" if threshold is None else f" by --threshold {threshold:g}")
    return feedback


def check_both(labels: Iterable[bool], why: str = "") -> None:
    """Raise InputError unless there are good and bad completions."""
    found = set(labels)
    if len(found) == 2:
        return
    rest = (
        "good ones alone are data for make sft, without the label"
        if True in found
        else "from bad ones alone a model only unlearns; add good ones"
    )
    what = f"every completion is {'good' if True in found else 'bad'}{why}" if found else "no completion is left"
    raise InputError(f"{what}; KTO learns what sets good ones apart from bad ones: {rest}")
