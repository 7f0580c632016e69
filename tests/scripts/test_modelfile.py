"""What Ollama sends to a model is what its chat template writes: by our renderer, and by Go's own text/template."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
from common.errors import InputError
from exporting.modelfile import comparable, modelfile, other_json, render, template_of
from references.chat_families import FAMILIES, Family

REFERENCES = Path(__file__).parents[1] / "references"
# By the format that Mistral publishes for 7B v0.3: the system text stands in the last turn of the user.
MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}
{%- else %}{% set system, turns = none, messages %}{% endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
    {%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""
MORE = {
    "llama-3": ("llama3", "<|eot_id|>"),
    "phi-3": ("phi3", "<|end|>"),
    "qwen3-2507": ("qwen3_instruct_2507", "<|im_end|>"),
    "mistral": (MISTRAL, "<|im_end|>"),
}
ALL = {name: (family.end, family) for name, family in FAMILIES.items()} | {
    name: (end, Family(template, end, (end,), FAMILIES["tiny"].write)) for name, (template, end) in MORE.items()
}


def call(name: str = "add", **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers, <b> & all.",
        "parameters": {
            "type": "object",
            "required": ["b", "a"],
            "properties": {"b": {"type": "integer"}, "a": {"type": "integer", "description": "one"}},
        },
    },
}
USER, SYSTEM = (
    {"role": "user", "content": "你好，3 + 4？"},
    {"role": "system", "content": "Answer briefly.\n简短回答。"},
)
ANSWER = {"role": "assistant", "content": "Seven {{ .Content }}."}
AGAIN = {"role": "user", "content": 'And "x" \\n é 🙂?'}
RESULT = {"role": "tool", "name": "add", "content": "seven"}
CONVERSATIONS = {
    "one turn": [USER],
    "a system turn": [SYSTEM, USER],
    "several turns": [USER, ANSWER, AGAIN, ANSWER, USER],
    "several turns and a system turn": [SYSTEM, USER, ANSWER, AGAIN],
    "an empty turn": [{"role": "user", "content": ""}, ANSWER, AGAIN],
    "a tool": [USER, {"role": "assistant", "content": "", "tool_calls": [call()]}, RESULT],
    "tools": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call(), call("sub")]},
        RESULT,
        {**RESULT, "content": "1"},
        ANSWER,
        AGAIN,
    ],
    "a word before a call": [
        USER,
        {"role": "assistant", "content": "So:", "tool_calls": [call()]},
        RESULT,
        ANSWER,
        USER,
    ],
}


def written(tokenizer, messages, tools=None) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:
        return None


@pytest.fixture(scope="module")
def families(tokenizer):
    made = {name: (family.tokenizer(tokenizer), end) for name, (end, family) in ALL.items()}
    for one, end in made.values():
        one.eos_token = end
    return {name: (one, modelfile(one, "model.gguf", [end], {"num_ctx": 4096})) for name, (one, end) in made.items()}


@pytest.mark.parametrize("name", ALL)
def test_ollama_gets_the_text_of_the_chat_template(families, name):
    tokenizer, text = families[name]
    compared = 0
    for what, messages in CONVERSATIONS.items():
        expected = written(tokenizer, messages)
        with_tools = any("tool_calls" in one for one in messages)
        if expected is None or (with_tools and RESULT["content"] not in expected):  # refused, or the results left out
            if expected is not None or not with_tools:
                with pytest.raises(InputError, match="the chat template has no"):
                    render(text, messages)
            continue
        assert render(text, messages) == expected, what
        assert comparable(text, messages) == expected
        compared += 1
    assert compared >= 3


@pytest.mark.skipif(not shutil.which("go"), reason="there is no Go here, whose text/template Ollama uses")
def test_go_itself_renders_the_same(families, tmp_path):
    program = tmp_path / "ollama"
    subprocess.run(["go", "build", "-o", program, REFERENCES / "ollama.go"], check=True, cwd=tmp_path, timeout=300)
    cases = [
        (name, what, text, messages, tools)
        for name, (_, text) in families.items()
        for what, messages in CONVERSATIONS.items()
        for tools in (None, [TOOL, TOOL])
    ]
    requests = [{"modelfile": text, "messages": messages, "tools": tools} for _, _, text, messages, tools in cases]
    done = subprocess.run(
        [program], input=json.dumps(requests), capture_output=True, text=True, check=True, timeout=60, encoding="utf-8"
    )
    refused = 0
    for (name, what, text, messages, tools), go in zip(cases, json.loads(done.stdout), strict=True):
        try:
            ours = render(text, messages, tools)
        except InputError:
            assert "the chat template has" in go["error"], (name, what, go)  # what the user of Ollama reads
            refused += 1
            continue
        assert go == {"text": ours, "error": ""}, (name, what, bool(tools))
    assert 0 < refused < len(cases) / 2


@pytest.mark.parametrize("name", ["tiny", "qwen2.5", "qwen3", "llama-3.1"])
def test_tools_differ_in_the_blanks_of_their_json_alone(families, name):
    tokenizer, text = families[name]
    messages = [SYSTEM, USER, {"role": "assistant", "content": "", "tool_calls": [call(a=3, b=4)]}, RESULT]
    numbers = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    plain = {**TOOL, "function": {**TOOL["function"], "description": "Adds.", "parameters": numbers}}
    assert other_json(messages)
    assert other_json([USER], [plain])
    assert not other_json(CONVERSATIONS["a tool"])
    expected, ours = written(tokenizer, messages, [plain]), render(text, messages, [plain])
    assert expected != ours
    assert comparable(text, messages, [plain]) is None
    assert "".join(expected.split()) == "".join(ours.split())


def test_neighbours_of_one_role_are_one_turn(families):
    tokenizer, text = families["tiny"]
    joined = [{"role": "user", "content": "a\n\nb"}]
    assert render(text, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == written(
        tokenizer, joined
    )


def test_an_answer_can_be_begun(families):
    tokenizer, text = families["qwen2.5"]
    begun = [USER, {"role": "assistant", "content": "Sev"}]
    expected = tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert render(text, begun) == expected


def test_the_beginning_token_is_left_to_the_tokenizer_that_adds_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    adding = FAMILIES["llama-3.1"].tokenizer(tokenizer)
    begin = (adding.bos_token, adding.bos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    text = modelfile(adding, "model.gguf", ["<|eot_id|>"], {})
    expected = written(adding, [USER])
    assert expected.startswith(begin[0])
    assert not render(text, [USER]).startswith(begin[0])
    assert comparable(text, [USER]) == expected
    assert adding(render(text, [USER]))["input_ids"] == adding(expected, add_special_tokens=False)["input_ids"]
    assert comparable(text, [{"role": "user", "content": " x"}]) is None  # the template strips it, Ollama does not


def test_a_modelfile_stops_at_the_trained_tokens_and_samples_as_training_does(families):
    _, text = families["gemma-3"]
    lines = text.splitlines()
    assert "FROM ./model.gguf" in lines
    assert 'PARAMETER stop "<end_of_turn>"' in lines
    assert "PARAMETER num_ctx 4096" in lines
    assert "PARAMETER repeat_penalty 1" in lines


@pytest.mark.parametrize(
    ("template", "difference"),
    [
        ("{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}:", "between user and assistant"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}:", "no user turn here"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('3', 'three') }}{% endfor %}:",
            "the chat template writes 'three",
        ),
    ],
    ids=["numbers", "capitals", "words"],
)
def test_a_template_that_ollama_cannot_express_is_refused_with_the_first_difference(tokenizer, template, difference):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(InputError, match="cannot be written for Ollama") as refused:
        modelfile(other, "model.gguf", ["<|im_end|>"], {})
    assert difference in str(refused.value)


def test_what_a_modelfile_would_lose_is_escaped(tokenizer):
    other = copy.deepcopy(tokenizer)
    before, after = r"'\u3000{{' + m.role + '\"\"\"\t}}\u200d'", "'<|im_end|>'"
    other.chat_template = "{% for m in messages %}{{ " + before + " + m.content + " + after + " }}{% endfor %}"
    text = modelfile(other, "model.gguf", ["<|im_end|>"], {})
    assert '"""' not in template_of(text)
    assert all(one.isprintable() or one == "\n" for one in text)
    assert render(text, [USER]) == written(other, [USER])
