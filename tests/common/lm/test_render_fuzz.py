"""Well-formed rows under every chat format: each is trained as it says, or refused with a reason.

For each, text, token ids and loss mask are those of an independent implementation of the format, and what the format
drops is named as there. The suite tries a few hundred rows. The whole of it, with as many as wanted:

    python tests/common/lm/test_render_fuzz.py 5000
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3] / name) for name in ("recipes", "tests")]

import pytest
from common.data.formats import FORMATS
from common.data.messages import MARKS
from common.data.read import as_examples
from common.data.rows import Faults, Row
from common.lm import pieces
from common.lm.chat import tokenize
from common.lm.render import ChatFormat
from references.chat_families import FAMILIES, Family, RefusedError, Text

ROWS = 300  # in the suite, each under a few of the formats
NAMES = {
    "thoughts": pieces.THOUGHTS,
    "beside": pieces.BESIDE_CALLS,
    "system": pieces.SYSTEM,
    "results": pieces.RESULTS,
    "tools": pieces.TOOLS,
    "history": pieces.HISTORY,
    "old thoughts": pieces.OLD_THOUGHTS,
    "opening": pieces.OPENING,
    "opened": pieces.OPENED,
    "special": pieces.SPECIAL,
}

# 1. Rows. No word is part of another one or of what a template writes, so that what is dropped is not found by chance.

WORDS = ["Oslo", "weather", "eleven", "blue", "天气", "晴れ", "naïve", "Zürich", "ελλάδα", "кот", "🙂", "x=1;", "f(y)"]
WORDS += ["{{z}}", "{%q%}", "50%", "\\n", '"quoted"', "it's", "a&b"]
SPACES = [" "] * 12 + ["\n", "\n\n", "\t", "  ", "\r\n", "\u3000", "\u00a0", "\u200b", "\u2028"]
EDGES = [""] * 12 + [" ", "\n", "\n\n", "  \n", "\t", "\u3000", "\u00a0"]
SPECIAL = sorted({token for family in FAMILIES.values() for token in family.special})
ODD_MARKS = ["<|endoftext|>", "<tool_call>", "</tools>", "[INST]", "<s>", "<|im_", "im_end|>", "<tool_response>"]


def text(rng: random.Random, marks: bool = True) -> str:
    words = [f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(rng.choice([1, 1, 2, 3, 5, 12]))]
    if marks and rng.random() < 0.03:
        words.insert(rng.randrange(len(words) + 1), rng.choice([rng.choice(SPECIAL), rng.choice(ODD_MARKS)]))
    inner = "".join(word + rng.choice(SPACES) for word in words[:-1]) + words[-1]
    return rng.choice(EDGES) + inner + rng.choice(EDGES)


def value(rng: random.Random, depth: int = 0):
    kinds = ["text", "text", "number", "flag", "null"] + ([] if depth > 1 else ["list", "object"])
    match rng.choice(kinds):
        case "text":
            return text(rng)
        case "number":
            return rng.choice([0, -1, 7, 2.5, 1e9, 123456789])
        case "flag":
            return rng.random() < 0.5
        case "null":
            return None
        case "list":
            return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {f"key{rng.randrange(100)}": value(rng, depth + 1) for _ in range(rng.randrange(3))}


def answer(rng: random.Random, thinks: bool, calls: bool) -> dict:
    turn: dict = {"role": "assistant", "content": text(rng)}
    if thinks and rng.random() < 0.7:
        turn["reasoning_content"] = rng.choice(["", " "]) if rng.random() < 0.1 else text(rng)
    elif thinks:
        before = text(rng) if rng.random() < 0.1 else ""
        turn["content"] = f"{before}<think>{text(rng)}</think>{turn['content']}"
        if rng.random() < 0.1:
            turn["content"] = f"{text(rng)}</think>{turn['content']}"
    if calls:
        turn["content"] = rng.choice(["", "", "\n", turn["content"]])
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": f"call_{rng.randrange(10)}",
                    "arguments": {f"key{n}": value(rng) for n in range(rng.randrange(3))},
                },
            }
            for _ in range(rng.choice([1, 1, 1, 2, 3]))
        ]
    return turn


def row(rng: random.Random) -> tuple[dict, frozenset[int]]:
    """The columns of a row of messages, and the indices of its turns of the assistant that carry no loss."""
    thinks, calls = rng.random() < 0.4, rng.random() < 0.3
    turns = [{"role": "system", "content": text(rng)}] if rng.random() < 0.3 else []
    if rng.random() < 0.03 and not calls:
        turns.append(answer(rng, thinks, calls=False))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        turns.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.02:
            turns.append({"role": "user", "content": text(rng)})
        while calls and rng.random() < 0.5:
            turns.append(answer(rng, thinks, calls=True))
            turns += [{"role": "tool", "content": text(rng), "name": "call_1"} for _ in turns[-1]["tool_calls"]]
        if rng.random() < 0.03:
            turns.append({"role": "system", "content": text(rng)})
        turns.append(answer(rng, thinks and rng.random() < 0.8, calls=calls and rng.random() < 0.2))
    untrained = frozenset(
        index for index, turn in enumerate(turns) if turn["role"] == "assistant" and rng.random() < 0.15
    )
    for index, turn in enumerate(turns):
        if index in untrained:
            turn |= {rng.choice(MARKS): rng.choice([0, False])}
        elif turn["role"] == "assistant" and rng.random() < 0.1:
            turn |= {rng.choice(MARKS): rng.choice([1, True])}
    fields: dict = {"messages": turns}
    if calls or rng.random() < 0.05:
        parameters = {"type": "object", "properties": {f"key{n}": {"type": "string"} for n in range(2)}}
        described = {"name": f"call_{rng.randrange(10)}", "description": text(rng), "parameters": parameters}
        fields["tools"] = [{"type": "function", "function": described} for _ in range(rng.choice([1, 2]))]
    return fields, untrained


# 2. What must become of a row, by the independent implementation.


def expected(family: Family, conversation) -> Text | str:
    """The row as the family writes it; or the reason for which it cannot be trained."""
    whole = repr((conversation.messages, conversation.tools))
    if family.end in whole:
        return "the end token in a text"
    text = Text(conversation.messages, conversation.untrained)
    try:
        family.write(text, conversation.tools)
    except RefusedError as reason:
        return str(reason)
    if any(token in whole for token in (*family.special, "<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        text.lost.add("special")
    return text if any(loss for _, loss in text.parts) else "no answer with loss"


def difference(tokenizer, family: Family, conversation) -> tuple[str, str | None]:
    """What became of the row, a word to count by; and what is wrong with that, or None."""
    faults = Faults()
    wanted = expected(family, conversation)
    got = list(tokenize(tokenizer, [conversation], 100_000, faults))
    if isinstance(wanted, str):
        return "refused", f"trained, but {wanted}" if got else None
    if not got:
        return "refused", f"refused: {faults.shown}"
    ids, mask, context = [], [], ""
    for part, loss in [*wanted.parts, ("", True)]:  # neighbouring parts without loss are one text
        if not loss:
            context += part
            continue
        for piece, mark in ((context, 0), (part, 1)):
            own = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids, mask = ids + own, mask + [mark] * len(own)
        context = ""
    example = got[0]
    rendered = ChatFormat(tokenizer).render(conversation)
    if rendered.text != "".join(part for part, _ in wanted.parts):
        return "trained", "the text differs"
    if example.input_ids.tolist() != ids or example.completion_mask.tolist() != mask:
        learned = [rendered.text[start:stop] for start, stop in rendered.spans]
        return "trained", f"the tokens differ: {learned} is not {[part for part, loss in wanted.parts if loss]}"
    if set(example.lost) != {NAMES[name] for name in wanted.lost}:
        return "trained", f"named as lost: {example.lost}, not {sorted(wanted.lost)}"
    return "trained with a part lost" if example.lost else "trained whole", None


def try_rows(tiny, count: int, seed: int, formats_of_a_row: int) -> tuple[Counter, list[str]]:
    families = {name: (family, family.tokenizer(tiny)) for name, family in FAMILIES.items()}
    outcomes, failures = Counter(), []
    for number in range(count):
        fields, untrained = row(random.Random(f"{seed} {number}"))
        faults = Faults()
        read = list(as_examples([Row(f"row:{number}", fields)], faults, FORMATS))
        answers = {index for index, turn in enumerate(fields["messages"]) if turn["role"] == "assistant"}
        untrained |= answers & {0}  # it answers no prompt
        if not read:
            outcomes["refused by the reader"] += formats_of_a_row
            if untrained != answers:
                failures.append(f"row {number}: refused by the reader: {faults.shown}\n    {fields}")
            continue
        conversation = read[0]
        if conversation.untrained != untrained:
            failures.append(f"row {number}: {set(conversation.untrained)} carry no loss, not {set(untrained)}")
        for offset in range(formats_of_a_row):
            name = list(families)[(number + offset * 5) % len(families)]
            family, tokenizer = families[name]
            outcome, wrong = difference(tokenizer, family, conversation)
            outcomes[outcome] += 1
            if wrong:
                failures.append(f"row {number}, {name}: {wrong}\n    {conversation}")
    return outcomes, failures


@pytest.mark.slow
def test_well_formed_rows_are_trained_as_they_say_or_refused(tokenizer):
    outcomes, failures = try_rows(tokenizer, ROWS, 0, formats_of_a_row=2)
    assert not failures, "\n".join(failures[:3])
    assert min(outcomes[name] for name in ("trained whole", "trained with a part lost", "refused")) > ROWS / 10


def main(count: int, seed: int) -> int:
    from transformers import AutoTokenizer

    tiny = AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "data_samples" / "tiny")
    started = time.process_time()
    outcomes, failures = try_rows(tiny, count, seed, len(FAMILIES))
    print(f"{count} rows under {len(FAMILIES)} formats: {dict(outcomes)}; {time.process_time() - started:.0f} s")
    print("\n".join(failures[:10]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
