"""One reader and one renderer: a row means the same to every method, and what one of them refuses, all refuse."""

import ast
import copy
import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import trl
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS, Formats
from common.data.prompts import as_prompt, render_prompts
from common.data.read import as_examples
from common.data.rows import Faults, Row
from common.lm.chat import tokenize, tokenize_pairs
from common.lm.feedback import tokenize_feedback
from common.rewards.tokens import as_tokens
from conftest import ROOT

CODE = [file for room in ("recipes", "scripts") for file in (ROOT / room).rglob("*.py")]
CODE = [
    file for file in CODE if file.parent != ROOT / "scripts" / "tiny"
]  # which makes the tiny model; no user runs it
# Who looks at rows without making examples of them, and why.
ROWS_ONLY = {
    "recipes/common/data/read.py": "the reader itself",
    "recipes/common/data/hold_out.py": "copies rows as they are, once they are read",
    "scripts/check-data.py": "reads by as_examples, and copies good rows",
    "scripts/choose.py": "shows the columns of a few rows",
    "scripts/preferences.py": "looks at the first row's columns, and keeps scores beside the examples",
}


@functools.cache
def names(file: Path) -> set[str]:
    """What a file imports, calls or takes from an object."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def users(name: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in CODE if name in names(file)} - {"recipes/common/data/rows.py"}


def test_one_module_calls_chat_templates():
    callers = {str(file.relative_to(ROOT)) for file in CODE if ".apply_chat_template(" in file.read_text()}
    # The latter takes a template apart, to write Ollama's.
    assert callers == {"recipes/common/lm/render.py", "scripts/exporting/turns.py"}


def test_every_recipe_reads_its_data_by_one_reader():
    recipes = {f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.py")}
    assert recipes <= users("read_examples")
    assert not recipes & (users("read_rows") | users("load_dataset") | users("DictReader"))


def test_rows_pass_the_reader_by_only_where_they_are_no_examples():
    assert users("read_rows") == set(ROWS_ONLY)


# The same turns in the form of every method.

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


class Case(NamedTuple):
    prompt: list[dict]
    answer: dict
    tools: list[dict] | None = None
    templates: str = "tiny qwen2_5 llama3"


CASES = {
    "text": Case([ASK], SAY),
    "system and several turns": Case([{"role": "system", "content": "Be brief."}, ASK, SAY, ASK], SAY),
    "parts, and space around": Case(
        [{**ASK, "content": [{"type": "text", "text": " 2 + 2? "}]}], {**SAY, "content": "\n4 "}
    ),
    "a call with arguments as text": Case(
        [ASK],
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
        ]},
        [ADD], "tiny qwen2_5",
    ),
    "a result": Case(
        [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
         {"role": "tool", "name": "add", "content": "4"}],
        SAY, [ADD], "tiny qwen2_5",
    ),
    "reasoning": Case([ASK], {**SAY, "reasoning_content": "Two and two."}, None, "qwen3"),
    "Chinese": Case([{**ASK, "content": "二加二？"}], {**SAY, "content": "四。"}),
}  # fmt: skip
EACH = [(name, template) for name, case in CASES.items() for template in case.templates.split()]


def examples(formats: Formats, row: dict) -> tuple[list, list[str]]:
    faults = Faults()
    return list(as_examples([Row("f:1", row)], faults, formats)), faults.shown


def forms(case: Case) -> dict[str, tuple[Formats, dict]]:
    """The row that each method has for a case."""
    prompt, answer = case.prompt, [case.answer]
    other = [{"role": "assistant", "content": "Another."}]
    rows = {
        "sft": (FORMATS, {"messages": prompt + answer}),
        "sft, prompt and completion": (FORMATS, {"prompt": prompt, "completion": answer}),
        "dpo": (PAIR_FORMATS, {"prompt": prompt, "chosen": answer, "rejected": other}),
        "dpo, rejected": (PAIR_FORMATS, {"prompt": prompt, "chosen": other, "rejected": answer}),
        "dpo, whole dialogues": (PAIR_FORMATS, {"chosen": prompt + answer, "rejected": prompt + other}),
        "kto": (FEEDBACK_FORMATS, {"prompt": prompt, "completion": answer, "label": True}),
        "kto, messages": (FEEDBACK_FORMATS, {"messages": prompt + answer, "label": False}),
        "reward": (RATING_FORMATS, {"prompt": prompt, "response": answer, "score": 1.0}),
    }
    tools = {"tools": case.tools} if case.tools else {}
    return {name: (formats, copy.deepcopy({**row, **tools})) for name, (formats, row) in rows.items()}


@pytest.fixture
def with_template(tokenizer, request):
    tokenizer = copy.deepcopy(tokenizer)
    name, template = request.param
    if template != "tiny":
        folder = Path(trl.__file__).parent / "chat_templates"
        tokenizer.chat_template = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    if template == "llama3":
        special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.bos_token = "<|endoftext|>"
    return tokenizer, CASES[name]


def read_by(method: str, tokenizer, formats: Formats, row: dict) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the answer, as `method` trains them."""
    (example,), shown = examples(formats, row)
    assert shown == []
    faults = Faults()
    if method.startswith("dpo"):
        (pair,) = tokenize_pairs(tokenizer, [example], 1000, faults)
        return pair.prompt_ids, pair.rejected_ids if "rejected" in method else pair.chosen_ids
    if method.startswith("kto"):
        (row,) = tokenize_feedback(tokenizer, [example], 1000, faults)
        return row.prompt_ids, row.completion_ids
    if method == "reward":
        (tokens,), _ = as_tokens(tokenizer, [example], 1000, 0.0, whole=False)
        return tokens.answers[0][: -tokens.lengths[0]], tokens.answers[0][-tokens.lengths[0] :]
    (sample,) = tokenize(tokenizer, [example], 1000, faults)
    stop = max(index for index, mark in enumerate(sample.completion_mask) if mark) + 1
    start = stop
    while sample.completion_mask[start - 1]:
        start -= 1
    return sample.input_ids[:start].tolist(), sample.input_ids[start:stop].tolist()


@pytest.mark.parametrize("with_template", EACH, indirect=True, ids=" ".join)
def test_every_method_reads_the_same_tokens(with_template):
    tokenizer, case = with_template
    read = {name: read_by(name, tokenizer, *form) for name, form in forms(case).items()}
    assert all(tokens == read["sft"] for tokens in read.values()), read
    # What GRPO and PPO sample from: the prompt alone, and that of a pair or a rating.
    tools = {"tools": case.tools} if case.tools else {}
    (prompt,), _ = examples(PROBLEM_FORMATS, copy.deepcopy({"prompt": case.prompt, "answer": "4", **tools}))
    others = [examples(*forms(case)[name])[0][0] for name in ("dpo", "reward")]
    texts, _ = render_prompts(tokenizer, [prompt, *map(as_prompt, others)])
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == [read["sft"][0]] * 3


BAD = {
    "an image": ({**ASK, "content": [{"type": "image", "image": "a.png"}]}, SAY),
    "an unknown role": ({**ASK, "role": "narrator"}, SAY),
    "no text": ({**ASK, "content": " "}, SAY),
    "a number for text": ({**ASK, "content": 5}, SAY),
    "an answer without text": (ASK, {**SAY, "content": ""}),
    "a call that is no JSON": (ASK, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": "{a: 2}"}}
    ]}),
    "a call of nothing": (ASK, {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_one_method_refuses_all_refuse_with_the_same_reason(fault):
    ask, say = BAD[fault]
    reasons = {}
    for name, form in forms(Case([ask], say)).items():
        found, shown = examples(*form)
        assert found == [], name
        reasons[name] = {message.rpartition(": ")[2] for message in shown}  # a dialogue's prompt is in both sides
    assert all(reason == reasons["sft"] for reason in reasons.values()), reasons
    if say is SAY:
        found, shown = examples(PROBLEM_FORMATS, {"prompt": [ask], "answer": "4"})
        assert (found, {message.rpartition(": ")[2] for message in shown}) == ([], reasons["sft"])
