"""The rewards: hand-worked scores, a user's own file, and the contract with every fault it must find planted."""

import json
import os
import subprocess
import sys
import threading
import time

import in_process
import pytest
from common.data.examples import Prompt
from common.data.rows import Faults
from common.errors import InputError, MachineError
from common.lm.generate import Completion
from common.rewards.builtin import schema_validator, text_of
from common.rewards.classifier import RewardModel
from common.rewards.contract import check_functions, check_models, contract
from common.rewards.specification import (
    REWARDS,
    check_prompts,
    columns_of,
    identities,
    load,
    reward_models,
    score,
    score_completions,
)
from conftest import ROOT
from in_process import ended, refusal

SCRIPT = ROOT / "scripts" / "test-rewards.py"
PROMPT = [{"role": "user", "content": "How much is 40 plus 2?"}]


def one(name: str, completion: str, prompt: str = "How much is it?", **columns):
    """The score of one completion by one built-in reward."""
    ids = [0] * columns.pop("tokens", 0)
    [reward] = load([name], max_completion_length=100)
    [value] = reward([prompt], [completion], completion_ids=[ids], **{key: [value] for key, value in columns.items()})
    return value


def problem(number: int, answer: str | None, **fields) -> Prompt:
    return Prompt(f"data.jsonl:{number}", PROMPT, answer, fields)


@pytest.fixture
def problems():
    return [problem(number, str(number * 7)) for number in range(1, 21)]


@pytest.fixture
def own(tmp_path):
    """A user's file; the rewards of its functions."""

    def rewards(text: str, *names: str, weight: str = ""):
        file = tmp_path / f"own_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text, encoding="utf-8")
        return load([f"{file}:{name}{weight}" for name in names or ["reward"]], 100)

    return rewards


@pytest.mark.parametrize(
    ("name", "completion", "columns", "wanted"),
    [
        ("math", "<think>40 + 2</think><answer>42</answer>", {"answer": "2 + 40 = 42\n#### 42"}, 1.0),
        ("math", "<think>42</think><answer>41</answer>", {"answer": "42"}, 0.0),
        ("math", "", {"answer": "42"}, 0.0),
        ("math", "42", {"answer": None}, None),
        ("format", "<think>a</think><answer>b</answer>", {}, 1.0),
        ("format", " <think>\na\n</think>\n<answer>\nb\n</answer>\n", {}, 1.0),
        ("format", "<think></think><answer>b</answer>", {}, 0.0),
        ("format", "<think>a</think><answer> </answer>", {}, 0.0),
        ("format", "<think>a</think><answer>b</answer> and so on", {}, 0.0),
        ("format", "So <think>a</think><answer>b</answer>", {}, 0.0),
        ("format", "<think>a</think><answer>b</answer><answer>c</answer>", {}, 0.0),
        ("format", "<think>a<think>b</think></think><answer>b</answer>", {}, 0.0),
        ("format", "<answer>b</answer><think>a</think>", {}, 0.0),
        ("tags", "<think>a</think><answer>b</answer>", {}, 1.0),
        ("tags", "<think>a</think>b", {}, 0.5),
        ("tags", "<think>a<answer>b</answer>", {}, 0.75),
        ("tags", "<answer>b</answer><think>a</think>", {}, 0.5),  # <think> and what follows it
        ("tags", "<think>a</think><answer>b</answer>" * 2, {}, 0.0),
        ("tags", "42", {}, 0.0),
        ("length", "", {"tokens": 25}, -0.25),
        ("length", "", {"tokens": 200}, -1.0),
        ("overlong", "", {"tokens": 80}, 0.0),
        ("overlong", "", {"tokens": 85}, -0.25),
        ("overlong", "", {"tokens": 100}, -1.0),
        ("overlong", "", {"tokens": 300}, -1.0),
        ("repetition", "one two three four five", {}, 0.0),
        ("repetition", "a a a a a", {}, -0.5),  # two n-grams, one of them new
        ("repetition", "好好好好好", {}, -0.5),
        ("repetition", "a b", {}, 0.0),
        ("language", "<think>Two and two</think><answer>4</answer>", {}, 1.0),
        ("language", "<think>它是</think>", {}, 0.0),
        ("language", "Two plus two 它是", {}, 0.6),
        ("language", "它是 four", {"prompt": "二加二是多少？"}, 2 / 3),
        ("language", "\\frac{3}{4} x", {}, 1.0),
        ("language", "", {}, 0.0),
        ("language", "four", {"prompt": "2 + 2 = ?"}, None),
        ("json", '{"a": [1, 2.5, null]}', {}, 1.0),
        ("json", '<think>{</think><answer>```json\n{"a": 1}\n```</answer>', {}, 1.0),
        ("json", '{"a": 1} is it', {}, 0.0),
        ("json", "{'a': 1}", {}, 0.0),
        ("json", '{"a": NaN}', {}, 0.0),
        ("json", "42", {}, 0.0),
        ("json", "[" * 100_000, {}, 0.0),
        ("json", '{"a": ' + "9" * 10_000 + "}", {}, 0.0),
        ("json_schema", '{"age": 3}', {"schema": {"required": ["age"]}}, 1.0),
        ("json_schema", '{"age": 3}', {"schema": '{"properties": {"age": {"type": "string"}}}'}, 0.0),
        ("json_schema", '{"ag": 3}', {"schema": {"required": ["age"]}}, 0.0),
        ("json_schema", "age: 3", {"schema": {"required": ["age"]}}, 0.0),
        ("json_schema", "{}", {"schema": None}, None),
        ("xml", "<a><b c='1'>x &amp; y</b></a>", {}, 1.0),
        ("xml", "<answer>\n```xml\n<a/>\n```\n</answer>", {}, 1.0),
        ("xml", "<a><b></a></b>", {}, 0.0),
        ("xml", "<a/> and <b/>", {}, 0.0),
        ("xml", "no element", {}, 0.0),
        ("xml", "", {}, 0.0),
        ("xml", '<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>', {}, 0.0),
        ("xml", "<a>" * 50_000, {}, 0.0),
        ("xml", "<a>\ud800</a>", {}, 0.0),
    ],
)
def test_built_in(name, completion, columns, wanted):
    prompt = columns.pop("prompt", "How much is it?")
    assert one(name, completion, prompt, **columns) == (wanted if wanted is None else pytest.approx(wanted))


def test_code_is_scored_by_the_share_of_tests_it_passes():
    code = "<think>Easy.</think><answer>\n```python\ndef add(a, b):\n    return abs(a) + b\n```\n</answer>"
    tests = ["assert add(1, 2) == 3", "assert add(-1, 2) == 1"]
    [reward] = load(["code"], 100)
    hostile = "```python\nimport os\nos.kill(os.getppid(), 9)\nwhile True: os.fork()\n```"
    try:
        scores = reward([PROMPT] * 4, [code, hostile, "no code", code], tests=[tests, tests, tests, None])
    except MachineError as refusal:
        pytest.skip(str(refusal))
    assert scores == [0.5, 0.0, 0.0, None]


def test_text_of_takes_text_and_chat_messages():
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}]) == "a"
    assert text_of([{"role": "assistant", "content": "b", "reasoning_content": "a"}]) == "<think>a</think>b"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) == "a"
    assert text_of([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


@pytest.mark.slow
def test_a_reward_model_scores_the_dialogue(classifier, tokenizer):
    """Alone and in a batch of other lengths, as text and as messages, and as the model itself scores it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    [reward] = load([f"model:{classifier}=0.5"], 100)
    assert (reward.name, reward.weight, reward.is_model) == ("model", 0.5, True)

    completions = [[{"role": "assistant", "content": text}] for text in ("42", "It is forty and two, I should think.")]
    scores = reward([PROMPT] * 2, completions)
    assert scores[0] != scores[1]
    assert reward([PROMPT], completions[:1]) == pytest.approx(scores[:1], abs=1e-4)
    assert reward([text_of(PROMPT)] * 2, [text_of(turns) for turns in completions]) == pytest.approx(scores, abs=1e-4)
    text = tokenizer.apply_chat_template([*PROMPT, *completions[0]], tokenize=False)
    with torch.inference_mode():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert scores[0] == pytest.approx(model.score(model.model(ids).last_hidden_state[0, -1]).item(), abs=1e-4)
    assert contract(reward, [problem(1, "42"), problem(2, "43")]) == []


def test_a_language_model_is_not_a_reward_model(tmp_path, tokenizer):
    import shutil

    shutil.copytree(ROOT / "data_samples" / "tiny", tmp_path / "language")
    rewards = load([f"model:{tmp_path / 'language'}"], 100)
    with pytest.raises(InputError, match=r"not a reward model.*score\.weight"):
        rewards[0].prepare()
    with pytest.raises(InputError, match="not a reward model"):
        check_models(rewards, [problem(1, "42")])


@pytest.mark.slow
def test_the_time_that_a_reward_model_takes_to_load_is_not_held_against_it(classifier, monkeypatch, problems):
    slowly = RewardModel._load
    monkeypatch.setattr(RewardModel, "_load", lambda self: time.sleep(2.2) or slowly(self))
    assert contract(*load([f"model:{classifier}"], 100), problems, seconds=2) == []


def test_a_reward_model_is_not_loaded_before_it_is_prepared(classifier, problems):
    """So `import unsloth` can come before transformers, in a process of its own."""
    check = (
        "import sys\n"
        "from common.data.examples import Prompt\n"
        "from common.rewards.contract import check_functions\n"
        "from common.rewards.specification import load, reward_models\n"
        f"spec = ['math', 'model:{classifier}']\n"
        "assert [model.local for model in reward_models(spec)] == [True]\n"
        "check_functions(load(spec, 100), [Prompt('f:1', [{'role': 'user', 'content': '1?'}], '1')])\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_models_among_the_rewards_and_what_they_are(classifier, own, tmp_path):
    assert [model.local for model in reward_models(["math,model:org/name=2", f"model:{classifier}"])] == [False, True]
    assert reward_models([]) == []
    [own_reward] = own("def reward(texts): return [0.0 for _ in texts]")
    rewards = [*load(["math", f"model:{classifier}"], 100), own_reward]
    model, file = identities(rewards)
    assert len(model) == len(file) == 64
    own_reward.file.write_text("def reward(texts): return [1.0 for _ in texts]")
    assert identities(rewards) == [model, *identities([own_reward])]
    assert identities([own_reward]) != [file]
    assert identities(load(["model:org/name"], 100)) == ["org/name@main"]


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, "{", "[1]", 3])
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(ValueError, match="JSON schema"):
        schema_validator(schema)


def test_a_schema_elsewhere_is_not_fetched(monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a request"))
    with pytest.raises(Exception, match=r"example\.org"):
        schema_validator({"$ref": "https://example.org/schema.json"}).is_valid({})


def test_load_and_score_add_up_by_weight(own):
    [own_reward] = own("def half(completions): return [0.5 for _ in completions]\n", "half", weight="=-2")
    rewards = [*load(["math=1.5,format", "tags=0"], 100), own_reward]
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("math", 1.5), ("format", 1.0), ("tags", 0.0), ("half", -2.0),
    ]  # fmt: skip
    totals, parts = score(
        rewards, [PROMPT] * 3, ["<think>a</think><answer>42</answer>", "42", "41"], answer=["42", "42", None]
    )
    assert parts == {
        "math": [1.0, 1.0, None], "format": [1.0, 0.0, 0.0], "tags": [1.0, 0.0, 0.0], "half": [0.5, 0.5, 0.5],
    }  # fmt: skip
    assert totals == [1.5 + 1.0 - 1.0, 1.5 - 1.0, -1.0]


def test_every_reward_is_a_function_to_trl():
    for name in REWARDS:
        [reward] = load([name], 100)
        assert callable(reward)
        assert reward.__name__ == name


def test_a_users_function_gets_what_it_names(own):
    given = own(
        "def reward(completions, difficulty, answer=None): return [float(difficulty[0] == 3 and answer == ['x'])]"
    )
    assert list(given[0].needs) == ["difficulty"]
    assert given[0]([PROMPT], ["a"], completion_ids=[[1]], difficulty=[3], answer=["x"], other=[1]) == [1.0]
    with pytest.raises(InputError, match=r"own_0\.py:1: reward: needs the column difficulty"):
        given[0]([PROMPT], ["a"])


def test_texts_are_the_completions_as_text_and_need_no_column(own):
    """Of text and of messages alike, and for a function that takes everything too."""
    named, anything = own(
        "def named(texts): return [float(len(text)) for text in texts]\n"
        "def anything(**given): return [float(len(text)) for text in given['texts']]\n",
        "named",
        "anything",
    )
    assert named.needs == anything.needs == {}
    thoughts = [{"role": "assistant", "content": "cd", "reasoning_content": "ab"}]
    for reward in (named, anything):
        assert reward([PROMPT] * 2, ["abc", [{"role": "assistant", "content": "abcd"}]]) == [3.0, 4.0]
        assert reward([PROMPT], [thoughts]) == [float(len("<think>ab</think>cd"))]
    faults = Faults()
    check_prompts([named], [problem(1, None)], faults)
    faults.stop()


def test_what_lies_beside_a_users_file_can_be_imported(own, tmp_path):
    (tmp_path / "beside_my_rewards.py").write_text("FULL = 1.0\n")
    [reward] = own("from beside_my_rewards import FULL\ndef reward(completions): return [FULL]")
    assert reward([PROMPT], ["a"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mth", "unknown reward (did you mean math?). There are math, "),
        ("zzz", "zzz: unknown reward. There are math, "),
        ("math=much", "'much' is not a weight"),
        ("math=nan", "'nan' is not a weight"),
        ("math,math=2", "another reward of the name math"),
        ("", "no reward is named"),
        ("absent.py:f", "there is no file absent.py"),
        ("absent.py", "expected FILE.py:FUNCTION"),
        ("model:absent", "no model 'absent'"),
    ],
)
def test_a_reward_that_is_not_there(spec, message):
    with pytest.raises(InputError) as refused:
        load([spec], 100)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def rewards(completions): return []", "reward is not there (did you mean rewards?). The file"),
        ("reward = 3", "reward is not a function"),
        ("reward = len", "reward is not a function"),
        (
            "class reward:\n    def __call__(self, texts): ...",
            "reward is a class; give an object of it, made in the file",
        ),
        ("x = 1\nimport no_such_module_here", ".py:2: importing it raised ModuleNotFoundError"),
        ("x = 1\n\ndef reward(:", ".py:3: invalid syntax"),
    ],
)
def test_a_users_file_that_cannot_be_used(text, message, own):
    with pytest.raises(InputError) as refused:
        own(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "\n    scores = []\n    return [1 / len(scores)]",
            "own_0.py:3: reward raised ZeroDivisionError: division by zero",
        ),
        ("return [1.0]", "own_0.py:1: reward: returned 1 scores for 2 completions"),
        ("return 'no'", "returned 'no'; expected a list"),
        ("return None", "returned None; expected a list"),
        ("return (1.0 for _ in completions)", "expected a list"),
        ("return [1.0, float('nan')]", "score 1 is nan"),
        ("return [1.0, float('inf')]", "score 1 is inf"),
        ("return ['1', 1.0]", "score 0 is '1'"),
        ("return [[1.0], [2.0]]", "score 0 is [1.0]"),
    ],
)
def test_an_error_in_a_users_function_is_named_with_its_line(body, message, own):
    [reward] = own(f"def reward(completions, **columns): {body}\n")
    with pytest.raises(InputError) as refused:
        score([reward], [PROMPT] * 2, ["a", "b"])
    assert message in str(refused.value)


CALLABLES = """
import asyncio, functools

async def later(completions, answer):
    await asyncio.sleep(0.001)
    return [float(text_of(c) == a) for c, a in zip(completions, answer)]

def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]

class Judge:
    def __call__(self, texts, answer):
        return [float(text == right) for text, right in zip(texts, answer)]
    async def soon(self, texts, answer):
        return self(texts, answer)

judge = Judge()
method = judge.soon
part = functools.partial(lambda texts, answer, by: [by * value for value in judge(texts, answer)], by=1.0)
"""


@pytest.mark.parametrize(("name", "line"), [("later", 4), ("judge", 12), ("method", 14), ("part", 19)])
def test_async_functions_and_callable_objects_are_rewards(name, line, own):
    """TRL takes them too. They are called on the main thread and off it, and by the arguments that they name."""
    [reward] = own(CALLABLES, name)
    assert score([reward], [PROMPT] * 2, ["4", "5"], answer=["4", "4"])[0] == [1.0, 0.0]
    assert reward.place.endswith(f".py:{line}: {name}")
    assert "answer" in reward.needs
    assert contract(reward, [problem(number, str(number)) for number in range(4)], answer_template="{answer}") == []


def test_an_error_in_an_async_function_is_named_with_its_line(own):
    [reward] = own("async def reward(texts):\n    return [1 / 0]\n")
    with pytest.raises(InputError, match=r"\.py:2: reward raised ZeroDivisionError"):
        reward([PROMPT], ["a"])


def test_tests_that_are_a_text_are_one_fault_for_all_rows():
    faults = Faults()
    check_prompts(
        load(["code"], 100), [problem(number, None, tests="assert f() == 1") for number in range(164)], faults
    )
    assert faults.shown == [
        'data.jsonl:0: tests: expected a list of tests, found text; write ["assert add(1, 2) == 3"] '
        "(and in 163 more rows)"
    ]


def test_problems_that_cannot_be_scored_are_faults_with_their_place():
    rewards = load(["math", "json_schema", "format"], 100)
    faults = Faults()
    rows = [
        problem(1, "\\frac{"),
        problem(2, "5"),
        problem(3, None, schema={"type": "nonsense"}),
        problem(4, None),
        problem(5, "", schema={}),
    ]
    check_prompts(rewards, rows, faults)
    assert [fault.split(": ")[:2] for fault in faults.shown] == [
        ["data.jsonl:1", "answer"], ["data.jsonl:3", "schema"],
        ["data.jsonl:4", "no column to score a completion by"], ["data.jsonl:5", "answer"],
    ]  # fmt: skip


def test_a_column_that_no_row_has_is_named_once():
    with pytest.raises(InputError, match="code: needs the column tests, which no row has"):
        check_prompts(load(["code"], 100), [problem(1, "5"), problem(2, "6")], Faults())


def test_a_batch_without_a_column_that_other_rows_have_is_scored():
    """As of a file that holds mathematics and code: a batch of one kind has nothing for the reward of the other."""
    rewards = load(["math", "json_schema"], 100)
    completions = [Completion("42", True, [1], [2])]
    assert score_completions(rewards, [problem(1, "42")], completions) == (
        [1.0],
        {"math": [1.0], "json_schema": [None]},
    )
    schema = problem(2, None, schema={"type": "object"})
    assert score_completions(rewards, [schema], completions) == ([0.0], {"math": [None], "json_schema": [0.0]})


def test_columns_of_holds_every_column_of_every_row():
    assert columns_of([problem(1, "5", tests=["a"]), problem(2, None, level=3)]) == {
        "tests": [["a"], None], "level": [None, 3], "answer": ["5", None],
    }  # fmt: skip


# The contract.

TEXT = "def text(c): return c if isinstance(c, str) else c[-1]['content']\n"
GOOD = "[float(f'<answer>{a}</answer>' in text(c)) for c, a in zip(completions, answer)]"


@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"code", "json_schema"}))
def test_the_built_in_rewards_keep_the_contract(name, problems):
    assert contract(*load([name], 100), problems) == []


def test_rewards_with_columns_of_their_own_keep_the_contract():
    rows = [
        problem(
            number,
            f"def f(x):\n    return x + {number}",
            tests=[f"assert f(1) == {number + 1}"],
            schema={"type": "object"},
        )
        for number in range(1, 4)
    ]
    assert contract(*load(["json_schema"], 100), rows) == []
    try:
        assert contract(*load(["code"], 100), rows, seconds=60) == []
    except MachineError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize(
    "answers",
    [["1,080", "2/3", "50%", "-7"], ["Paris", "London", "Rome", "Oslo"], ["\\sqrt{2}", "(0, 1]", "x^2", "\\{1, 2\\}"]],
    ids=["numbers", "words", "mathematics"],
)
def test_answers_of_every_kind_keep_the_contract(answers):
    assert contract(*load(["math"], 100), [problem(number, answer) for number, answer in enumerate(answers)]) == []


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (GOOD, None),
        ("[-len(text(c)) / 1000 for c in completions]", None),
        ("[1.0 if answer[0] in text(c) else 0.0 for c in completions]", "not answer[0]"),
        (f"[-x for x in {GOOD}]", "the sign is the wrong way round"),
        (f"[1 - x for x in {GOOD}]", "the sign is the wrong way round"),
        (
            f"[min(x, 0.0) if a != '7' else x for x, a in zip({GOOD}, answer)]",
            "does not score the most in 15 of 16 rows",
        ),
        (f"[1.0 if text(c) == '' else x for c, x in zip(completions, {GOOD})]", "an empty completion 1"),
        ("[__import__('random').random() for c in completions]", "other scores the second time"),
        ("print('debug') or [float(len(text(c))) for c in completions]", "prints 'debug"),
        ("[0.5 for c in completions]", "gives every completion 0.5"),
        ("[None for c, a in zip(completions, answer)]", "gives every completion None"),
        ("completions.clear() or [1.0] * 64", "changes its arguments (completions)"),
        ("[float(len(c[-1]['content'])) for c in completions]", "an argument `texts` is the text of both kinds"),
        (
            "[float(isinstance(c, str)) + len(text(c)) * 0.001 for c in completions]",
            "text unlike the same ones as chat",
        ),
        ("__import__('time').sleep(60)", "takes more than 1 s for 64 completions"),
        ("[1 / 0]", "raised ZeroDivisionError"),
        (
            "[__import__('signal').signal(12, 0)] and [float(len(text(c))) for c in completions]",
            "signal only works in main thread of the main interpreter (off the main thread",
        ),
        (
            "[float(__import__('threading').current_thread() is __import__('threading').main_thread())"
            " * len(text(c)) for c in completions]",
            "other scores off the main thread",
        ),
    ],
)
def test_a_users_function_is_held_to_the_contract(returns, message, own, problems):
    argument = "answer" if "answer" in returns else "**columns"
    [reward] = own(f"{TEXT}def reward(completions, {argument}): return {returns}\n")
    faults = contract(reward, problems, seconds=1)
    if message is None:
        assert faults == []
    else:
        assert message in "\n".join(faults)
        assert all("own_0.py:2: reward" in fault for fault in faults)


def test_answer_0_is_found_where_only_the_body_reads_the_answer(own, problems):
    [reward] = own(
        TEXT + "def reward(completions, **kw): return [float(kw['answer'][0] in text(c)) for c in completions]"
    )
    assert "not answer[0]" in contract(reward, problems)[0]


def test_a_negative_weight_turns_a_right_reward_round(problems):
    assert "the sign is the wrong way round with its weight -1" in contract(*load(["math=-1"], 100), problems)[0]
    assert contract(*load(["length=-1"], 100), problems) == []


def test_a_run_is_stopped_with_every_fault_of_its_rewards(own, problems):
    rewards = own(
        TEXT + f"def a(completions, answer): return [-x for x in {GOOD}]\ndef b(completions): return [0]", "a", "b"
    )
    with pytest.raises(InputError, match=r"(?s)wrong way round.*returned 1 scores"):
        check_functions([*load(["math"], 100), *rewards], problems)
    check_models(rewards, problems)  # there is none


def test_a_function_that_hangs_leaves_no_more_than_its_thread(own, problems):
    before = threading.active_count()
    [reward] = own("import time\ndef reward(completions): time.sleep(600)")
    started = time.monotonic()
    assert "takes more than 0.2 s" in contract(reward, problems, seconds=0.2)[0]
    assert time.monotonic() - started < 60
    assert threading.active_count() <= before + 1


def test_what_other_threads_print_is_not_held_against_a_reward(own, problems, capsys):
    """Such as the thread that draws a spinner while a reward model loads."""
    [reward] = own(TEXT + f"def reward(completions, answer): return {GOOD}")
    drawn, over = threading.Event(), threading.Event()

    def draw():
        while not over.wait(0.001):
            print("spinner")
            drawn.set()

    spinner = threading.Thread(target=draw)
    spinner.start()
    assert drawn.wait(60)  # on a busy machine the thread may get its turn late
    try:
        assert contract(reward, problems) == []
    finally:
        over.set()
        spinner.join()
    assert "spinner" in capsys.readouterr().out


@pytest.fixture(scope="module")
def command():
    return in_process.command("scripts/test-rewards.py")


def test_the_command_passes_and_fails(command, capsys, tmp_path):
    code, printed, _ = ended(command.main, capsys)
    assert code == 0
    assert "math: passes" in printed
    file = tmp_path / "my_rewards.py"
    file.write_text(
        TEXT + "def first(completions, answer): return [float(answer[0] in text(c)) for c in completions]\n"
    )
    code, printed, _ = ended(command.main, capsys, "--rewards", "math", f"{file}:first")
    assert code == 2
    assert f"{file}:2: first: its scores do not move with their rows" in printed
    assert "1 wrong" in printed


def test_the_command_checks_every_gold_answer(command, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2?", "answer": "####"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refusal(command.main, capsys, "--data", data)
    assert f"{data}:2: answer: '####' holds nothing to compare an answer with" in message


def test_the_command_takes_an_answer_template(command, capsys, tmp_path):
    file = tmp_path / "boxed.py"
    file.write_text(
        TEXT
        + "def boxed(completions, answer): return [float(f'{{{a}}}' in text(c)) for c, a in zip(completions, answer)]"
    )
    rewards = ("--rewards", f"{file}:boxed")
    assert ended(command.main, capsys, *rewards)[0] == 2
    assert ended(command.main, capsys, *rewards, "--answer-template", "So \\boxed{{answer}}")[0] == 0


@pytest.mark.slow
def test_the_command_imports_unsloth_before_transformers_for_a_reward_model(classifier, unsloth_first):
    words = [sys.executable, SCRIPT, "--rewards", f"model:{classifier}"]
    environment = {**os.environ, **unsloth_first}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model: passes" in done.stdout
