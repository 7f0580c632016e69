"""Raw text, the row format of continued pre-training: a column `text` without chat turns, or a .txt file.

A `text` column may also hold conversations that a chat template has rendered. As raw text they would carry loss on the
turns of the user too. So ChatML is read as its turns, and what other templates write is refused.
"""

import re
from typing import Any, ClassVar

from pydantic import field_validator

from common.data.turns import RowFormat, Text

CHATML = "<|im_start|>"
BEGIN = r"(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)"
# What the chat templates of other families write first, and messages as JSON; then a dialogue as plain text.
TEMPLATE = re.compile(
    rf"\s*{BEGIN}?\s*(\[INST\]|<<SYS>>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|start\|>|<｜User｜>"
    r"|<\|(?:user|assistant|system)\|>|\[\s*\{\s*[\"'](?:role|from)[\"'])"
)
DIALOGUE = re.compile(
    rf"(?:\A\s*{BEGIN}?\s*((?:Human|User|USER):)[^\n].*\n\s*(?:Assistant|ASSISTANT):"
    r"|^(### ?(?:Instruction|Human|User):).*^### ?(?:Response|Assistant):)",
    re.DOTALL | re.MULTILINE,
)


def is_chatml(text: Any) -> bool:
    """Is this the text of a conversation in ChatML, and no document?"""
    return isinstance(text, str) and CHATML in text


class DocumentText(RowFormat):
    columns: ClassVar = ("text",)
    text: Text

    @classmethod
    def own_columns(cls) -> frozenset[str]:
        return frozenset({"text"})  # what has no turns has no system prompt and no tools

    @field_validator("text")
    @classmethod
    def _is_no_conversation(cls, text: str) -> str:
        if found := TEMPLATE.match(text) or DIALOGUE.search(text):
            mark = next(filter(None, found.groups()))
            raise ValueError(
                f"is a conversation written as text ({mark}), and no document: as raw text, the turns of the user "
                "would carry loss too. Give its turns as messages, or as instruction and output"
            )
        return text


DOCUMENT_FORMATS: dict[str, type[RowFormat]] = {"text": DocumentText}
