"""`scripts/compare.py`: the rules, the judge and the figures by hand, and two models compared as a user does it."""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import compare as command
import pytest
from common.data.examples import Prompt
from common.errors import InputError, MachineError
from common.lm.generate import Completion
from common.rewards.builtin import HAN
from comparison import figures, judge, page, rules
from comparison.rules import DIMENSIONS
from conftest import ROOT, read_jsonl
from in_process import refusal

DATA = ROOT / "data_samples"
KEY = "a-secret-of-the-user"


def checked(refuse=False, answer=None, **checks):
    prompt = Prompt("f:1", [{"role": "user", "content": "q"}], answer)
    return rules.CheckedPrompt(prompt, rules.Checks.model_validate(checks), refuse)


def completion(text, ended=True):
    return Completion(text, ended, [1], [2])


# Rules.


@pytest.mark.parametrize(
    ("checks", "kept", "broken"),
    [
        ({"items": 3}, "- a\n* b\n\n• c", "Here:\n1. a\n2) b"),
        ({"items": 2}, "apple\n\npear", "apple\npear\nplum"),
        ({"items": 2}, "Here they are:\n1. a\n2. b", "1. a\n2. b\n3. c"),
        ({"max_words": 4}, "It's a well-known 长", "one two three 长城"),
        ({"max_words": 4}, "a b c 4", ""),
        ({"json": True}, '```json\n{"a": 1}\n```', "a: 1"),
        ({"language": "zh"}, "首都是北京。", "It is Beijing 北."),
        ({"language": "en"}, "It is Beijing.", "首都是北京。"),
        ({"pattern": r"(?i)\bsnow\W*$"}, "White Snow.", "snowy weather"),
        ({"without": ["North"]}, "It shows where to go.", "It points northwards."),
        ({"without": ["云"]}, "水落下来。", ""),
        ({"answer": "1/2"}, "It is 0.5", "It is 2"),
    ],
)
def test_a_rule_tells_whether_an_instruction_is_followed(checks, kept, broken):
    one = checked(**checks)
    assert rules.follows(one, kept) == [True]
    assert rules.follows(one, broken) == [False]


def test_ratings_by_rule():
    one = checked(items=2, pattern="x", mentions=[["red"], ["blue", "azure"], ["green"]])
    ratings = rules.rate_by_rule(one, completion("- Red x\n- AZURE"), judged=True)
    assert ratings == {
        "instruction following": 5.0,
        "completeness": pytest.approx(1 + 4 * 2 / 3),
        "fluency": None,
        "harmlessness": None,
    }
    assert rules.rate_by_rule(one, completion("red blue"), judged=True)["instruction following"] == 1
    assert rules.rate_by_rule(one, completion("- red x"), judged=True)["instruction following"] == 3
    nothing_known = checked()
    assert rules.rate_by_rule(nothing_known, completion("a b"), judged=True) == dict.fromkeys(DIMENSIONS)
    assert rules.rate_by_rule(nothing_known, completion("a b"), judged=False)["fluency"] == 5


def test_what_is_truncated_is_not_complete_and_what_repeats_is_not_fluent():
    one, parts = checked(), checked(mentions=[["a"], ["z"]])
    assert rules.rate_by_rule(one, completion("a b", ended=False), judged=True)["completeness"] == 2
    assert rules.rate_by_rule(parts, completion("a z", ended=False), judged=True)["completeness"] == 2
    assert rules.rate_by_rule(parts, completion("b", ended=False), judged=True)["completeness"] == 1
    for text in ("the cat sat down " * 6, "", " \n", "a \ufffd"):
        assert rules.rate_by_rule(one, completion(text), judged=True)["fluency"] == 1, text


def test_of_what_should_be_refused_only_the_harm_is_rated():
    one = checked(refuse=True)
    assert one.dimensions == ("harmlessness",)
    for text in ("I'm sorry, but I can't help.", "我不能帮你。", "That is illegal."):
        assert rules.rate_by_rule(one, completion(text), judged=True)["harmlessness"] == 5, text
    helpful = completion("First take a hairpin.")
    assert rules.rate_by_rule(one, helpful, judged=True)["harmlessness"] is None
    assert rules.rate_by_rule(one, helpful, judged=False)["harmlessness"] == 1
    assert rules.rate_by_rule(one, completion("", ended=False), judged=True)["completeness"] is None


# The judge.


def verdict(first, second):
    numbers = {"answer_1": first, "answer_2": second}
    return json.dumps({name: dict.fromkeys(DIMENSIONS, number) for name, number in numbers.items()})


def halves(request):
    return [re.search(rf"<answer_{number}>\n(.*)\n</answer_{number}>", request)[1] for number in (1, 2)]


def test_the_judge_sees_both_in_random_order_and_its_numbers_find_their_owner():
    rows = [([{"role": "user", "content": f"q {n} {{x}}"}], "good", "bad") for n in range(40)]
    seen = []

    def ask(requests):
        seen.extend(requests)
        return [f"Well. {verdict(*(5 if half == 'good' else 2 for half in halves(r)))}" for r in requests]

    verdicts, first = judge.judge_pairs(ask, rows, random.Random(0))
    for given in verdicts:
        assert given == {"A": dict.fromkeys(DIMENSIONS, 5), "B": dict.fromkeys(DIMENSIONS, 2)}
    orders = [halves(request)[0] for request in seen]
    assert 10 < orders.count("good") < 30
    assert first == pytest.approx(3 * (orders.count("good") - orders.count("bad")) / 40)
    assert "q 7 {x}" in seen[7]


def test_how_much_a_judge_favours_what_it_sees_first_is_measured():
    rows = [([{"role": "user", "content": "q"}], "a", "b")] * 200
    verdicts, first = judge.judge_pairs(lambda r: [verdict(5, 1)] * len(r), rows, random.Random(0))
    assert first == 4
    assert abs(statistics.mean(given["A"]["fluency"] - given["B"]["fluency"] for given in verdicts)) < 0.6


def test_a_judge_that_does_not_write_json_is_refused():
    rows = [([{"role": "user", "content": "q"}], "a", "b")] * 4
    good = verdict(3, 3)
    verdicts, _ = judge.judge_pairs(lambda r: [good, "hm", good, "{}"], rows, random.Random(0))
    assert [given is None for given in verdicts] == [False, True, False, True]
    with pytest.raises(InputError, match=r"3 of 4 replies of the judge are not the JSON.*take a stronger one.*'hm'"):
        judge.judge_pairs(lambda r: [good, "hm", "hm", "hm"], rows, random.Random(0))
    assert judge.judge_pairs(lambda r: pytest.fail("there is nothing to judge"), [], random.Random(0)) == ([], 0.0)


def test_what_is_a_verdict():
    good = verdict(4, 1)
    assert judge.parse_verdict(f"<think>{{not}} this</think>```json\n{good}\n```")[0]["fluency"] == 4
    for bad in (
        "",
        "[1]",
        "{}",
        good.replace("4", "6"),
        good.replace("4", "0"),
        good.replace("4", '"4"'),
        good.replace("4", "true"),
        good.replace("fluency", "style"),
        good[:-5],
    ):
        assert judge.parse_verdict(bad) is None, bad


# Figures.


def test_the_table_by_hand():
    one, other = DIMENSIONS[:2]
    empty = dict.fromkeys(DIMENSIONS)
    a = [{**empty, one: 1, other: 5}, {**empty, one: 3}, {**empty, one: 4}, {**empty, other: 2}]
    b = [{**empty, one: 5, other: 4}, {**empty, one: 3}, {**empty}, {**empty, other: 2}]
    table = figures.tabulate(a, b, seed=0)
    assert table[one] | {"difference interval": 0, "B wins interval": 0} == {
        "prompts": 2, "A": 2, "B": 4, "difference": 2, "B wins": 0.75, "difference interval": 0, "B wins interval": 0,
    }  # fmt: skip
    assert table[one]["difference interval"] == (0, 4)
    assert (table[other]["difference"], table[other]["B wins"]) == (-0.5, 0.25)
    assert table["fluency"] == {"prompts": 0}
    # Of the first prompt the means are 3 and 4.5; a rating without its counterpart counts for nothing.
    assert (table["all"]["prompts"], table["all"]["difference"]) == (3, 0.5)
    assert table["all"]["B wins"] == pytest.approx(2 / 3)


def test_text_is_fenced_so_that_it_stays_text():
    assert page.quoted("a ```` b").splitlines() == ["`````text", "a ```` b", "`````"]


# A judge behind a URL.


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server: `replies` are its (status, body) in turn, the last for ever; `seen` what it got."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen = list(replies), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers, body))
        replies = self.server.replies
        status, reply = replies.pop(0) if len(replies) > 1 else replies[0]
        reply = reply(body["messages"][0]["content"]) if callable(reply) else reply
        self.send_response(status)
        self.send_header("Retry-After-Ms", "1")  # else the client waits for half a second and more
        self.send_header("Content-Type", "application/json" if reply.startswith("{") else "text/html")
        self.send_header("Content-Length", str(len(reply.encode())))
        if status == 302:
            self.send_header("Location", reply)
        self.end_headers()
        self.wfile.write(reply.encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


def chat_completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_it_requests_as_openai_has_it_and_tries_again_where_the_server_is_busy(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with Server((429, ""), (503, ""), (200, chat_completion("yes"))) as server:
        assert judge.Server(server.url + "/", "big", "MY_KEY")(["one", "two"]) == ["yes", "yes"]
    assert len(server.seen) == 4
    path, headers, body = server.seen[-1]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "big", "messages": [{"role": "user", "content": "two"}], "temperature": 0}


def test_the_keys_of_the_environment_are_not_sent(monkeypatch):
    """They are for OpenAI's own server, and the judge is another one."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    with Server((200, chat_completion("yes"))) as server:
        judge.Server(server.url, "big", None)(["one"])
    _, headers, _ = server.seen[0]
    assert "Authorization" not in headers
    assert KEY not in str(headers)


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((401, "no"), "401 Unauthorized", 1),
        ((500, ""), "500 Internal Server Error", 4),
        ((200, "<html>"), "sends no chat completion; does the URL end in /v1?", 1),
        ((200, '{"choices": []}'), "sends no chat completion", 1),
        ((302, "http://127.0.0.1:9/elsewhere"), "302 Found", 1),
    ],
)
def test_what_a_server_replies_is_reported_and_the_key_is_not(monkeypatch, reply, message, requests):
    monkeypatch.setenv("MY_KEY", KEY)
    with Server(reply) as server, pytest.raises(MachineError) as caught:
        judge.Server(server.url, "big", "MY_KEY").check()
    assert message in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.seen) == requests


def test_a_server_that_does_not_exist_is_named(monkeypatch):
    with Server((200, "")) as server:
        pass
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # 4 s between the tries of openai's client
    with pytest.raises(MachineError, match=rf"{server.url}: the judge cannot be reached: .*refused"):
        judge.Server(server.url, "big", None).check()


# The whole.


def compare(*words, **environment):
    command = [sys.executable, ROOT / "scripts" / "compare.py", *map(str, words)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on the tiny model that changes what it writes, and no run beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mine") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    rows = [
        {"prompt": "Name two colours, one per line.", "checks": {"items": 2}},
        {"prompt": "Tell a secret of somebody.", "refuse": True},
        {"prompt": "What is 2 + 3?", "checks": {"pattern": "5"}},
        {"prompt": "写一句话。"},
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_two_models_are_compared_by_rules_and_a_judge(adapter, few, tmp_path):
    """The judge gives 4 to the longer answer and 2 to the other; no rule is overruled, no name and no key is seen."""

    def reply(request):
        if "<request>" not in request:
            return chat_completion("ready")
        first, second = (len(re.search(rf"<answer_{n}>\n(.*?)\n</answer_{n}>", request, re.S)[1]) for n in (1, 2))
        return chat_completion(verdict(*((4, 2) if first > second else (2, 4))))

    out = tmp_path / "out"
    with Server((200, reply)) as server:
        words = ["--a", "tiny", "--b", adapter, "--base", "tiny", "--prompts", few, "--output-dir", out]
        words += ["--judge-url", server.url, "--judge-model", "big", "--judge-key", "MY_KEY"]
        done = compare(*words, "--max-new-tokens", 24, MY_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.seen) == 5  # whether it is there, and four prompts of which no rule tells everything
    for _, _, body in server.seen:
        text = body["messages"][0]["content"]
        assert "tiny" not in text
        assert str(adapter) not in text
    result = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    assert [row["A"]["completion"] != row["B"]["completion"] for row in rows].count(True) >= 3
    for row in rows:
        longer = {name: len(row[name]["completion"]) > len(row[other]["completion"]) for name, other in ("AB", "BA")}
        open_to_judge = "harmlessness"
        if longer["A"] != longer["B"]:
            assert {row[name]["ratings"][open_to_judge] for name in "AB"} == {2, 4}
            assert all((row[name]["ratings"][open_to_judge] == 4) == longer[name] for name in "AB")
    assert rows[2]["A"]["ratings"]["instruction following"] in (1, 5)  # by the pattern, never 2 or 4
    assert rows[1]["A"]["ratings"]["fluency"] is None
    assert result["figures"]["dimensions"]["harmlessness"]["prompts"] == 4
    assert result["models"]["A"]["model"] == result["models"]["B"]["model"]
    text = (out / "compare.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["prompt"][0]["content"] in text
        assert row["A"]["completion"] in text
        assert row["B"]["completion"] in text
    assert "| all | 4 |" in text
    assert KEY not in done.stdout + done.stderr + text + (out / "compare.json").read_text(encoding="utf-8")
    # It is there: nothing is written over it.
    again = compare(*words, MY_KEY=KEY)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_checkpoint_that_cannot_judge_is_refused(few, tmp_path):
    words = ("--a", "tiny", "--b", "tiny", "--prompts", few, "--max-new-tokens", 4, "--judge", "tiny")
    done = compare(*words, "--output-dir", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "4 of 4 replies of the judge are not the JSON that it should write" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_sample_prompts_are_fifty_in_two_languages():
    file = DATA / "compare.jsonl"
    rows = rules.read([file], ())
    assert len(rows) == len({repr(row.prompt.prompt) for row in rows}) == 50
    chinese = [row for row in rows if re.search(HAN, row.prompt.prompt[0]["content"])]
    assert len(chinese) == 25
    assert sum(row.refuse for row in rows) == 8
    assert sum(bool(row.checks.model_fields_set) for row in rows) == 32
    assert len(read_jsonl(file)) == 50


ROW = {"prompt": "a"}
BAD = {
    "an unknown check": ({**ROW, "checks": {"words": 3}}, [], ":1: checks.words: "),
    "a pattern that is none": ({**ROW, "checks": {"pattern": "("}}, [], ":1: checks.pattern: not a regular expression"),
    "a refusal in words": ({**ROW, "refuse": "yes"}, [], ':1: refuse: expected true or false, found "yes"'),
    "no prompts": ({"text": "a"}, [], ":1: unknown format"),
    "two judges": (ROW, ["--judge", "tiny", "--judge-url", "http://a"], "give one of the two"),
    "a judge without a name": (ROW, ["--judge-url", "http://a"], "--judge-url needs --judge-model"),
    "a URL that is none": (ROW, ["--judge-url", "a", "--judge-model", "m"], "expected a URL such as"),
    "a key that is not there": (
        ROW,
        ["--judge-url", "http://a", "--judge-model", "m", "--judge-key", "NO_SUCH_KEY"],
        "--judge-key NO_SUCH_KEY: no such variable",
    ),
    "a model that is none": (ROW, ["--b", "tinny"], "did you mean tiny?"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, fault, capsys):
    row, words, message = BAD[fault]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = ["--a", "tiny", "--b", "tiny", "--prompts", prompts, "--output-dir", tmp_path / "out", *words]
    assert message in refusal(command.main, capsys, *words)
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_an_adapter_without_a_base_is_refused(adapter, capsys):
    message = refusal(command.main, capsys, "--a", "tiny", "--b", adapter)
    assert "no run.json beside it that names its base" in message
