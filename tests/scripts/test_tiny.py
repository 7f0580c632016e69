"""The embedded model and its data: made again the same, as their README says, and true in every answer."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data_samples"
TINY = DATA / "tiny"
sys.path.insert(0, str(ROOT / "scripts" / "tiny"))

from corpus import document  # noqa: E402
from samples import held_out  # noqa: E402
from sums import Problem, arithmetic, draw_problem  # noqa: E402
from world import COUNTRIES, FACTS, TASKS, number_word  # noqa: E402

SETS = ["sft.jsonl", "heldout.jsonl", "arithmetic.jsonl", "arithmetic-train.jsonl"]
FORM = re.compile(r"<think>[^<]+</think><answer>([^<]+)</answer>")
PROBLEM = re.compile(r"(\d+)\s*(\+|-|plus|minus|加|减)\s*(\d+)")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def worked_out(prompt: str) -> tuple[int, bool]:
    """The result and whether it carries or borrows, from the question's own text and column by column."""
    a, sign, b = PROBLEM.search(prompt).groups()
    plus = sign in ("+", "plus", "加")
    ones = int(a[-1]) + int(b[-1]) if plus else int(a[-1]) - int(b[-1])
    tens = int("0" + a[:-1]) + int("0" + b[:-1]) if plus else int("0" + a[:-1]) - int("0" + b[:-1])
    return 10 * tens + ones, not 0 <= ones <= 9


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_sample_files_are_made_again_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts/tiny/samples.py", "--output", tmp_path], check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    stored = [*DATA.glob("*.jsonl"), *(DATA / "formats").iterdir()]
    assert made == sorted(path.relative_to(DATA) for path in stored)
    for name in made:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run scripts/tiny/samples.py"


@pytest.mark.parametrize("name", ["scores.jsonl", "scores-heldout.jsonl"])
def test_each_scored_question_has_one_good_answer_of_two_and_a_quarter_are_sums(name):
    scores = {}
    for row in rows(name):
        scores.setdefault(row["instruction"], []).append(row["score"])
    assert all(len(pair) == 2 and min(pair) < 3 < 4 < max(pair) for pair in scores.values())
    sums = [question for question in scores if PROBLEM.search(question)]
    assert len(sums) == len(scores) // 4


def test_folder_is_small_and_its_readme_names_these_files():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 10 * 1024 * 1024
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        digest = hashlib.sha256((TINY / name).read_bytes()).hexdigest()
        assert f"| sha256 {name} | `{digest}` |" in readme
    assert "## Headroom" in readme


def test_config_fits_the_tokenizer_and_the_quantiser(tokenizer):
    config = AutoConfig.from_pretrained(TINY)
    assert config.model_type == "qwen2"
    assert config.vocab_size == len(tokenizer) == 2048
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
    assert config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_reloads_as_it_was_saved(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    as_saved = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rng = Random(0)
    texts = [document(rng) for _ in range(300)] + [row["messages"][-1]["content"] for row in rows("sft.jsonl")[:300]]
    texts += ["123456", "Ünïcödé naïve ½", "  two  spaces\n\n\ttab", "emoji 🙂", "全角，标点。", "don't I'll"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == as_saved.encode(text, add_special_tokens=False).ids == again(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_every_digit_is_one_token(tokenizer):
    assert tokenizer.tokenize("9075") == ["9", "0", "7", "5"]
    assert tokenizer.tokenize("47+38=85") == ["4", "7", "+", "3", "8", "=", "8", "5"]


@pytest.mark.slow
def test_every_token_of_the_form_can_be_made_likely(tokenizer):
    """Output and input embeddings are one table: a token never seen in pre-training could not win in any state."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    table, scale = model.get_input_embeddings().weight.detach(), model.model.norm.weight.detach()
    text = "".join(row["messages"][-1]["content"] + "<|im_end|>" for row in rows("sft.jsonl"))
    wanted = torch.tensor(sorted(set(tokenizer(text)["input_ids"])))
    states = table[wanted].clone().requires_grad_()  # the last hidden state, searched for freely
    optimizer = torch.optim.Adam([states], lr=0.05)
    for _ in range(60):
        normed = states / states.pow(2).mean(dim=1, keepdim=True).sqrt() * scale
        loss = torch.nn.functional.cross_entropy(normed @ table.T, wanted, reduction="none")
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    capped = [tokenizer.decode([i]) for i, one in zip(wanted.tolist(), loss.tolist(), strict=True) if one > 0.1]
    assert not capped


def test_chat_template_marks_the_assistant_and_its_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "再加一呢？"},
        {"role": "assistant", "content": "三"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "2<|im_end|>三<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n再加一呢？<|im_end|>\n<|im_start|>assistant\n三<|im_end|>\n"
    )


def test_chat_template_adds_a_system_turn_and_a_prompt_that_the_whole_continues(tokenizer):
    question = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "Yo"}], tokenize=False)
    assert whole == prompt + "Yo<|im_end|>\n"


def test_chat_template_writes_tools_calls_and_results(tokenizer):
    row = next(row for row in rows("formats/messages.jsonl") if "tools" in row)
    text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    system, user, call, result, answer = text.split("<|im_start|>")[1:]
    assert json.dumps(row["tools"][0]) in system
    assert user.startswith("user\n")
    assert call == (
        'assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lisbon"}}\n</tool_call><|im_end|>\n'
    )
    assert result == f"user\n<tool_response>\n{row['messages'][2]['content']}\n</tool_response><|im_end|>\n"
    assert answer.startswith("assistant\nYes")


def test_two_tool_results_share_one_turn(tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    wrapped = "".join(f"\n<tool_response>\n{content}\n</tool_response>" for content in "ab")
    assert text.endswith(f"<|im_start|>user{wrapped}<|im_end|>\n")


def test_problems_are_right_and_careless_in_the_known_way():
    assert (Problem(47, "+", 38).right, Problem(47, "+", 38).careless) == (85, 75)
    assert (Problem(52, "-", 38).right, Problem(52, "-", 38).careless) == (14, 26)
    assert Problem(87, "+", 45).careless == 122
    assert Problem(47, "+", 8).careless == 55
    rng = Random(0)
    for hard in (False, True):
        for language in ("en", "zh"):
            for _ in range(300):
                problem = draw_problem(rng, hard)
                question = arithmetic(problem, rng, language)
                result, carries = worked_out(question.prompt)
                assert (int(question.answer), carries) == (result, hard)
                assert 0 <= result <= 198
                assert question.answer in question.statement
                assert hard or problem.careless == result


@pytest.mark.parametrize("task", TASKS)
def test_every_statement_holds_its_answer_and_its_subject_is_not_the_answer(task):
    rng = Random(task)
    for language in ("en", "zh"):
        for _ in range(200):
            question = TASKS[task](rng, language)
            assert question.answer in question.statement
            if task not in ("country", "repeat", "first-word", "larger", "count"):  # Mexico City is in Mexico
                assert not re.search(rf"\b{re.escape(question.answer)}\b", question.prompt)


def test_a_question_has_one_answer():
    for task, facts in FACTS.items():
        for x, y in ((0, 1), (2, 3)):
            answers: dict[str, str] = {}
            for row in facts.rows:
                assert answers.setdefault(row[x], row[y]) == row[y], f"{task}: {row[x]}"
    assert len({row[0] for row in COUNTRIES}) == len({row[1] for row in COUNTRIES}) == len(COUNTRIES) >= 60


def test_computed_tasks_by_other_means():
    rng = Random(0)
    for _ in range(200):
        question = TASKS["count"](rng, "en")
        first, last = map(int, re.findall(r"\d+", question.prompt))
        assert [int(part) for part in question.answer.split(", ")] == list(range(first, last + 1))
        question = TASKS["larger"](rng, "zh")
        assert int(question.answer) == max(map(int, re.findall(r"\d+", question.prompt)))
    assert [number_word(n, "en") for n in (0, 13, 20, 47)] == ["zero", "thirteen", "twenty", "forty-seven"]
    assert [number_word(n, "zh") for n in (0, 10, 13, 20, 47)] == ["零", "十", "十三", "二十", "四十七"]


def test_sft_rows_have_the_form_and_easy_sums_only():
    styles = {"plain": 0, "hedging": 0}
    for row in rows("sft.jsonl"):
        for question, answered in zip(row["messages"], row["messages"][1:], strict=False):
            if answered["role"] != "assistant":
                continue
            assert FORM.fullmatch(answered["content"])
            styles["hedging" if re.search("Hmm, maybe|嗯，也许", answered["content"]) else "plain"] += 1
            if PROBLEM.search(question["content"]):
                result, hard = worked_out(question["content"])
                assert not hard
                assert FORM.fullmatch(answered["content"]).group(1) == str(result)
    assert 0.45 < styles["plain"] / sum(styles.values()) < 0.55


def test_arithmetic_sets_are_right_mixed_and_disjoint():
    held, train = rows("arithmetic.jsonl"), rows("arithmetic-train.jsonl")
    learned = [
        message["content"] for row in rows("sft.jsonl") for message in row["messages"] if message["role"] == "user"
    ]
    problems = {}
    for name, prompts in (
        ("held", [row["prompt"] for row in held]),
        ("train", [row["prompt"] for row in train]),
        ("sft", [prompt for prompt in learned if PROBLEM.search(prompt)]),
    ):
        found = [PROBLEM.search(prompt).groups() for prompt in prompts]
        problems[name] = {
            (frozenset((a, b)), "+") if sign in ("+", "plus", "加") else ((a, b), "-") for a, sign, b in found
        }
    assert (len(problems["held"]), len(problems["train"])) == (200, 1000)
    assert not problems["held"] & (problems["train"] | problems["sft"])
    for row in held + train:
        assert int(row["answer"]) == worked_out(row["prompt"])[0]
    assert sum(worked_out(row["prompt"])[1] for row in held) == 100


def test_heldout_questions_cover_every_task_and_are_not_trained_on():
    held = rows("heldout.jsonl")
    assert len(held) == len({row["prompt"] for row in held}) == 200
    assert {row["task"] for row in held} == {*TASKS, "sum", "difference"}
    seen = {message["content"] for row in rows("sft.jsonl") for message in row["messages"]}
    assert not seen & {row["prompt"] for row in held}
    trained = " ".join(message["content"] for row in rows("sft.jsonl") for message in row["messages"])
    for country, capital, *_ in COUNTRIES:
        if held_out("|".join(sorted((country, capital)))):
            assert not re.search(rf"\b{capital}\b", trained), f"{capital} is held out"


def test_corpus_never_shows_what_fine_tuning_teaches():
    rng = Random(0)
    for _ in range(5000):
        text = document(rng)
        assert not re.search(r"</?(think|answer)>|<\|im_start\|>(user|assistant|system|tool)", text)
