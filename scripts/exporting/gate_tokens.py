"""The gate for tokens: conversations become the same ids everywhere, and the token that ends an answer stops.

Everywhere is the merged folder, as transformers reads it, and every GGUF file, as llama.cpp and Ollama do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError
from common.lm.hub import find_model, load_tokenizer
from common.lm.render import end_token, render_turns
from common.run.files import read_object

from exporting import llama_cpp
from exporting.conversations import CONVERSATIONS, PLAIN
from exporting.modelfile import comparable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Difference(InputError):
    """What leaves is not what was trained: the message shows the first difference."""


@dataclass
class Texts:
    """The conversations of the gate as the trained model reads them: {name: (text, token ids)}."""

    tokenizer: "PreTrainedTokenizerBase"
    end: str
    found: dict[str, tuple[str, list[int]]]
    refused: list[str]


def read_conversations(tokenizer: "PreTrainedTokenizerBase") -> Texts:
    """CONVERSATIONS as a tokenizer reads them; PLAIN without a chat template. Raises InputError without an end."""
    found, refused = {}, []
    if not tokenizer.chat_template:
        for name, text in PLAIN.items():
            found[name] = (text, tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither a chat template nor an end token: nothing tells when to stop")
        return Texts(tokenizer, str(tokenizer.eos_token), found, refused)
    for name, (turns, tools) in CONVERSATIONS.items():
        try:
            text = render_turns(tokenizer, turns, tools, add_generation_prompt=True)
        except ValueError:  # Gemma takes no system turn, others no tools: nobody can send them one
            refused.append(name)
            continue
        found[name] = (text, tokenizer(text, add_special_tokens=False)["input_ids"])
    return Texts(tokenizer, end_token(tokenizer), found, refused)


def check_folder(folder: Path, texts: Texts) -> None:
    """Raise Difference unless the merged folder reads conversations as the trained model does, and stops as it does."""
    model = find_model(str(folder.resolve()))
    tokenizer = load_tokenizer(model)
    ours, theirs = texts.tokenizer.get_vocab(), tokenizer.get_vocab()
    for token in sorted(ours.keys() - theirs.keys(), key=ours.__getitem__):
        raise Difference(f"{folder}: its tokenizer has lost the token {token}, of id {ours[token]} in training")
    for token, number in ours.items():
        if theirs[token] != number:
            raise Difference(f"{folder}: the token {token} has the id {theirs[token]} there, and {number} in training")
    other = read_conversations(tokenizer)
    for name, (text, ids) in texts.found.items():
        if name not in other.found:
            raise Difference(f"{folder}: its chat template refuses the conversation {name!r}, which training reads")
        _compare(f"{folder}, read by transformers", name, texts, (text, ids), other.found[name])
    end = texts.tokenizer.convert_tokens_to_ids(texts.end)
    file = folder / "generation_config.json"
    config = read_object(file) if file.is_file() else {}
    ends = config.get("eos_token_id", texts.tokenizer.eos_token_id)
    if end not in (ends if isinstance(ends, list) else [ends]):
        raise Difference(
            f"{file}: eos_token_id is {ends}, and training ended answers with {texts.end}, {end}: transformers and "
            "vLLM would not stop"
        )


def check_file(file: Path, texts: Texts, modelfile: str | None = None) -> None:
    """Raise Difference unless llama.cpp, with `file`, reads conversations and stops as the trained model does."""
    tokenizer, end = texts.tokenizer, texts.tokenizer.convert_tokens_to_ids(texts.end)
    with llama_cpp.server(file) as server:
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        for token, number in added.items():
            if (read := server.tokenize(token, special=False)) != [number]:
                raise Difference(
                    f"{file.name}: llama.cpp reads the token {token} as {read}, and training as [{number}]: it is lost "
                    "in this file"
                )
        for name, (text, ids) in texts.found.items():
            if not tokenizer.chat_template:
                _compare(file.name, name, texts, (text, ids), (text, server.tokenize(text, special=False)))
                continue
            turns, tools = CONVERSATIONS[name]
            try:
                rendered = server.render(turns, tools)
            except ValueError as error:
                raise Difference(
                    f"{file.name}: its chat template refuses the conversation {name!r} in llama.cpp: {error}"
                ) from None
            _compare(f"{file.name}, read by llama.cpp", name, texts, (text, ids), (rendered, server.tokenize(rendered)))
            if modelfile and (other := comparable(modelfile, turns, tools)) is not None:  # else it has other blanks
                read = (other, server.tokenize(other, special=False))
                _compare("the Modelfile, read as Ollama does", name, texts, (text, ids), read)
        ids = next(iter(texts.found.values()))[1]
        done = server.complete(ids, 4, forced=end)
    if done["stop_type"] != "eos" or done["tokens_predicted"] != 1:
        raise Difference(
            f"{file.name}: llama.cpp does not stop at {texts.end} ({end}), which ends an answer in training: it "
            f"continued after it, up to {done['tokens_predicted']} tokens ({done['stop_type']})"
        )


def _compare(
    where: str, name: str, texts: Texts, ours: tuple[str, list[int]], theirs: tuple[str, Sequence[int]]
) -> None:
    """Raise Difference where token ids differ, with the first place in which text or ids do."""
    (text, ids), (other, read) = ours, theirs
    if list(read) == ids:
        return
    first = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    if text != other and first < max(len(text), len(other)):
        start = max(first - 20, 0)
        raise Difference(
            f"{where}: the conversation {name!r} is another prompt than in training, from character {first + 1} on: "
            f"...{other[start : first + 40]!r} there, ...{text[start : first + 40]!r} in training"
        )
    first = next((n for n, (a, b) in enumerate(zip(ids, read, strict=False)) if a != b), min(len(ids), len(read)))
    tokens = texts.tokenizer.convert_ids_to_tokens
    raise Difference(
        f"{where}: the conversation {name!r} has other tokens than in training, from token {first + 1} on: "
        f"{tokens(list(read)[first : first + 5])} there, {tokens(ids[first : first + 5])} in training"
    )
