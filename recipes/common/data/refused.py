"""What a row holds that no method here trains, or another method: refused, with what to do about it."""

import re
from typing import Any

from common.data.messages import MARKS, MEDIA, is_empty
from common.data.turns import Turns

LABEL_COLUMNS = ("label", "kto_tag")
OTHERS = ("chat_template_kwargs", "chosen")
REFUSED = frozenset([*MEDIA, *MARKS, *LABEL_COLUMNS, *OTHERS])
LABELS = ("true", "false", "yes", "no", "good", "bad", "desirable", "undesirable", "up", "down", "0", "1")

# Where an image goes in the data of multimodal models: alone on a line, at the beginning or at the end of a turn.
TAG = r"(<\|?(?:image|video|audio)(?:_\d+)?\|?>)"
PLACEHOLDER = re.compile(rf"(?:\A|\n)\s*{TAG}|{TAG}\s*(?:\n|\Z)")


def refuse_columns(fields: dict[str, Any], own: frozenset[str], demonstrations: bool) -> None:
    """Raise ValueError for a column that changes what the row means and is not among the format's `own`.

    `demonstrations` is whether the rows are to be imitated: then a label of good and bad completions is refused too.
    """
    if REFUSED.isdisjoint(fields):
        return
    for column in MEDIA:
        if column not in own and not is_empty(fields.get(column)):
            raise ValueError(
                f"{column}: only text is trained, and the row would be learned without what it shows; for the text "
                f"alone, give the column another name, --columns unread={column}"
            )
    if not is_empty(fields.get("chat_template_kwargs")):
        raise ValueError(
            "chat_template_kwargs: not supported; set it in a template with --chat-template-path, or remove it"
        )
    if demonstrations and not {"conversations", "chosen", "rejected"} - fields.keys() and "chosen" not in own:
        raise ValueError(
            "chosen, rejected: the rows are pairs, which are data for make dpo; for the conversations without their "
            "last answer, give chosen another name, --columns unread=chosen"
        )
    for column in MARKS if demonstrations else ():
        if column not in own and str(fields.get(column)).strip().lower() in ("0", "0.0", "false"):
            raise ValueError(
                f"{column}: the row is marked as one not to learn from; remove the row, or to learn from it all the "
                f"same, give the column another name, --columns unread={column}"
            )
    label = label_column(fields) if demonstrations else None
    if label and label not in own:
        raise ValueError(
            f"{label}: the rows are completions with a label, good or bad, which are data for make kto; here the bad "
            f"ones would be imitated too. To imitate all, give the column another name, --columns unread={label}"
        )


def label_column(fields: dict[str, Any]) -> str | None:
    """The column that says whether the row's completion is good, as KTO's data have it, or None."""
    return next((column for column in LABEL_COLUMNS if is_label(fields.get(column))), None)


def is_label(value: Any) -> bool:
    """Whether a value says that something is good or bad."""
    return isinstance(value, bool | int | float | str) and str(value).strip().lower().removesuffix(".0") in LABELS


def refuse_placeholders(turns: Turns) -> None:
    """Raise ValueError for a user's turn with the place of an image in it, which would be learned as text."""
    for turn in turns:
        if turn["role"] == "user" and "<" in turn["content"] and (found := PLACEHOLDER.search(turn["content"])):
            tag = found[1] or found[2]
            if f"</{tag[1:]}" not in turn["content"]:  # else it is an element of HTML
                raise ValueError(f"a turn of the user has the place of a medium, {tag}, and only text is trained")
