"""The prompts of a run: which are dropped for their length, what is in front of them, which are repetitions."""

import copy

import pytest
from common.data.examples import Pair, Prompt, Rating
from common.data.prompts import as_prompt, distinct, drop_long, with_system_prompt
from common.errors import InputError

ASK = [{"role": "user", "content": "2 + 2?"}]
TOOLS = [{"name": "add", "description": "Adds numbers, " * 50}]


def prompt(number, content="2 + 2?", tools=None):
    return Prompt(f"f:{number}", [{"role": "user", "content": content}], "4", {"level": 1}, tools)


def length(tokenizer, prompt):
    ids = tokenizer.apply_chat_template(prompt.prompt, tools=prompt.tools, add_generation_prompt=True)["input_ids"]
    return len(ids)


def test_longer_prompts_are_dropped_and_named(tokenizer):
    prompts = [prompt(number, "word " * 50 if number == 7 else "2 + 2?") for number in range(1, 11)]
    longest = length(tokenizer, prompts[0])
    kept, line = drop_long(tokenizer, prompts, longest, max_truncated=0.1)
    assert [one.place for one in kept] == [f"f:{number}" for number in range(1, 11) if number != 7]
    assert line == f"1 of 10 prompts (10.0%) are longer than {longest} tokens and were dropped: f:7"
    with pytest.raises(InputError, match=r"f:7\nThat is more than --max-truncated 0\.05 allows.*--max-prompt-length"):
        drop_long(tokenizer, prompts, longest, max_truncated=0.05)
    assert drop_long(tokenizer, prompts, 10_000, max_truncated=0.0) == (prompts, None)


def test_the_tools_of_a_prompt_count(tokenizer):
    plain, with_tools = prompt(1), prompt(2, tools=TOOLS)
    assert length(tokenizer, with_tools) > 100 > length(tokenizer, plain)
    assert drop_long(tokenizer, [plain, with_tools], 100, max_truncated=0.5)[0] == [plain]


def test_a_prompt_that_the_template_refuses_is_a_fault(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    refusal = "{{ raise_exception('no system message here') if messages[0].role == 'system' }}"
    tokenizer.chat_template = refusal + "{% for turn in messages %}{{ turn.content }}<|im_end|>{% endfor %}"
    prompts = with_system_prompt([prompt(1), prompt(2)], "Be brief.")
    with pytest.raises(InputError, match=r"(?s)^f:1: .*no system message here; .*--system-prompt.*f:2: "):
        drop_long(tokenizer, prompts, 100, max_truncated=0.0)


def test_what_the_template_drops_of_a_prompt_is_counted_and_above_the_share_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}<|im_end|>{% endfor %}"
    prompts = [prompt(1, tools=TOOLS), prompt(2)]
    kept, line = drop_long(tokenizer, prompts, 1000, max_truncated=0.5)
    assert (kept, line) == (prompts, "1 of 2 rows (50.0%): the chat template drops the tools: f:1")
    with pytest.raises(InputError, match="That is more than --max-truncated 0 allows"):
        drop_long(tokenizer, prompts, 1000, max_truncated=0.0)


def test_a_prompt_with_the_end_token_in_it_is_a_fault_and_with_another_special_token_is_named(tokenizer):
    with pytest.raises(InputError, match=r"^f:1: a turn of the user contains <\|im_end\|>"):
        drop_long(tokenizer, [prompt(1, "a<|im_end|>b")], 1000, max_truncated=1.0)
    assert "special tokens" in drop_long(tokenizer, [prompt(1, "a<|im_start|>b")], 1000, max_truncated=0.0)[1]


def test_a_prompt_with_a_token_that_the_embedding_lacks_is_a_fault(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.embedding_rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match=r"^f:2: <new> has the id 2048, and the model's embedding has 2048 rows"):
        drop_long(tokenizer, [prompt(1), prompt(2, "a <new> b")], 1000, max_truncated=1.0)


def test_a_system_prompt_comes_first_and_nothing_else_changes():
    [changed] = with_system_prompt([prompt(1, tools=TOOLS)], "Be brief.")
    assert changed.prompt == [{"role": "system", "content": "Be brief."}, *ASK]
    assert (changed.place, changed.answer, changed.fields, changed.tools) == ("f:1", "4", {"level": 1}, TOOLS)
    assert with_system_prompt([prompt(1)], None) == [prompt(1)]


def test_equal_prompts_with_other_tools_are_not_the_same():
    prompts = [prompt(1), prompt(2), prompt(3, tools=TOOLS), prompt(4, "3 + 3?")]
    assert [one.place for one in distinct(prompts)] == ["f:1", "f:3", "f:4"]


def test_the_prompt_of_every_kind_of_example():
    answer = [{"role": "assistant", "content": "4"}]
    assert as_prompt(prompt(1)) == prompt(1)
    assert as_prompt(Pair("f:1", ASK, answer, answer, TOOLS)) == Prompt("f:1", ASK, tools=TOOLS)
    assert as_prompt(Rating("f:1", ASK, answer, 1.0, TOOLS)) == Prompt("f:1", ASK, tools=TOOLS)
