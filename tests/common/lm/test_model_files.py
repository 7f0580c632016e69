"""Model folders that are damaged or hostile: one line with the place before anything is loaded, and nothing runs."""

import json
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from common.errors import InputError, MachineError
from common.lm import bounds, model_files, network, render
from common.lm.hub import Model, contents, find_model, load_tokenizer
from common.lm.model_files import check_kind, download
from common.lm.render import render_turns
from conftest import ROOT

TINY = ROOT / "data_samples" / "tiny"
TURNS = [{"role": "user", "content": "a"}]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def cut(name: str, size: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


FAULTS = {
    "half of the weights": (cut("model.safetensors", 100_000), r"model\.safetensors: has 100000 of \d+ bytes"),
    "no weights": (cut("model.safetensors", 0), "is no safetensors file"),
    "half a header": (cut("model.safetensors", 50), "is no safetensors file .*its header is longer than the file"),
    "a pickle by that name": (write("model.safetensors", b"\x80\x04cos\nsystem\n(S'x'\ntR."), "is no safetensors file"),
    "zeros": (write("model.safetensors", bytes(5000)), "is no safetensors file"),
    "an empty config": (write("config.json", b""), r"config\.json: is damaged or no JSON"),
    "a config that is a list": (write("config.json", b"[]"), r"config\.json: holds no JSON object"),
    "a config nested without end": (write("config.json", b'{"a":' * 100_000), r"config\.json: is damaged or no JSON"),
    "parts that are missing": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
        r"lacks model-2\.safetensors, which model\.safetensors\.index\.json names",
    ),
    "an index of nothing": (write("model.safetensors.index.json", b"{}"), "has no weight_map that names files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_before_anything_is_loaded(folder, fault):
    breaks, message = FAULTS[fault]
    contents(find_model(str(folder)))
    breaks(folder)
    with pytest.raises(InputError, match=message) as caught:
        contents(find_model(str(folder)))
    assert "\n" not in str(caught.value)


def with_code(folder, model_type: str) -> Model:
    """A folder whose config names a module of its own, which leaves a mark where it runs."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return find_model(str(folder))


def test_code_that_a_model_brings_along_is_named_and_never_run(folder):
    with pytest.raises(
        InputError,
        match=r"needs code of its own, evil\.py \(Config, Model; by config",
    ):
        check_kind(with_code(folder, "of-nobody"))
    assert not (folder / "ran").exists()


def test_a_kind_that_transformers_knows_needs_no_code(folder):
    check_kind(with_code(folder, json.loads((TINY / "config.json").read_text())["model_type"]))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{}"), ("tokenizer.json", b"[" * 100_000), ("tokenizer_config.json", b"[1]")],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        load_tokenizer(find_model(str(folder)))


TEMPLATES = {
    "a syntax error": "{% if %}",
    "recursion without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a range without end": "{% for i in range(10**15) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a way out": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "more memory than there is": "{{ 'a' * 10**15 }}",
    "text that doubles": "{% set n = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t|length }}",
    "a wide format": "{{ '%2000000000d' % 1 }}{{ '%2000000000d' % 1 }}",
    "a wide centre": "{{ 'a'|center(4000000000) }}",
    "a list that grows": "{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "one power that takes hours": "{{ 10 ** (10 ** 9) }}",
    "a power only at the end of a long way": "{% set n = 10 %}{{ [n, n ** (n ** n)]|length }}",
    "numbers that square": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "rounding that takes hours": "{{ 5|round(-1000000000) }}",
    "calls of calls": "{% macro a(n) %}{% for i in range(999) %}{{ a(n + 1) }}{% endfor %}{% endmacro %}{{ a(0) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "the code of a macro": "{% macro a() %}{% endmacro %}{{ a.__init__.__globals__ }}",
    "a format that looks inside": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a change of the turns": "{{ messages.append(1) }}",
    "an import": "{% import 'os' as os %}{{ os.system('true') }}",
    "a parent": "{% extends '/etc/passwd' %}",
    "brackets without end": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "an attribute by a filter": "{{ messages|attr('__class__')|attr('__mro__')|first|attr('mro')() }}",
}
HARMLESS = ("globals of a function",)  # undefined there, which renders as nothing


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_hostile_template_is_refused_in_seconds(tokenizer, monkeypatch, kind):
    monkeypatch.setattr(render, "SECONDS", 0.2)
    monkeypatch.setattr(bounds, "MEMORY", 2**28)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[kind])
    begun, memory = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    if kind in HARMLESS:
        assert render_turns(tokenizer, TURNS) == ""
        return
    with pytest.raises(ValueError, match="the chat template refuses it: ") as caught:
        render_turns(tokenizer, TURNS)
    assert time.monotonic() - begun < 60
    assert len(str(caught.value)) < 500
    assert resource.getrlimit(resource.RLIMIT_AS) == memory
    if kind == "loops in loops":
        assert "takes more than 0.2 s" in str(caught.value)


@pytest.mark.parametrize("kind", ["loops in loops", "a range without end", "one power that takes hours"])
def test_a_hostile_template_is_refused_in_a_thread_too(tokenizer, monkeypatch, kind):
    """Reward models score in threads, which get no signal."""
    monkeypatch.setattr(render, "SECONDS", 0.2)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[kind])
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="the chat template refuses it: "):
        pool.submit(render_turns, tokenizer, TURNS).result(5)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(render_turns, tokenizer, TURNS).result(5) == "a"


def test_a_time_that_ends_beside_the_work_harms_nobody():
    """Work that is over as its time is up raises in it or not at all, never in what comes after."""

    def often() -> int:
        late = 0
        for _ in range(50):
            try:
                bounds.bounded(0.001, lambda: time.sleep(0.001))
            except TimeoutError:
                late += 1
            time.sleep(0.0005)
        return late

    with ThreadPoolExecutor(1) as pool:
        assert 0 <= pool.submit(often).result(20) <= 50


def test_a_time_that_ends_beside_the_work_leaves_no_limit_behind():
    """However late the alarm comes: neither on memory, nor a handler, while the error is still held."""
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    errors = []
    for round_ in range(1500):
        end = time.perf_counter() + 0.0003 + 2e-8 * round_

        def work(end: float = end) -> None:
            while time.perf_counter() < end:
                pass

        try:
            bounds.bounded(0.0003, work)
        except TimeoutError as error:
            errors.append(error)
        assert resource.getrlimit(resource.RLIMIT_AS) == memory
        assert signal.getsignal(signal.SIGALRM) is handler
    assert errors


def test_work_of_several_threads_leaves_no_limit_on_memory_behind():
    """The first of them ends while the second works."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        inside.set()
        leave.wait(10)

    with ThreadPoolExecutor(1) as pool:

        def first() -> Any:
            done = pool.submit(bounds.bounded, 10, other)
            assert inside.wait(10)
            return done

        done = bounds.bounded(10, first)
        assert resource.getrlimit(resource.RLIMIT_AS) != before
        leave.set()
        done.result(10)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_what_templates_compute_is_computed_as_before(tokenizer, monkeypatch):
    text = "{{ 2 ** 10 }} {{ 3 * 4 }} {{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ 2.6|round }} {{ 2.345|round(2) }} {{ 2 ** -1 }}"
    monkeypatch.setattr(tokenizer, "chat_template", text)
    assert render_turns(tokenizer, TURNS) == "1024 12 ababab ababab 3.0 2.35 0.5"


def test_a_download_is_tried_again_and_then_named(monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(network, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(model_files, "fetch_weights", lambda *_, **__: None)
    tries = []

    def fails(*_, **__):
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("reset by https://me:s3cret@mirror")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    model = Model("x", "org/x", None, None, local=False)
    download(model)
    assert len(tries) == 3
    assert capsys.readouterr().err.count("org/x: ConnectionError: reset by https://***@mirror; again in 0 s") == 2
    monkeypatch.setattr(network, "DOWNLOADS", 2)
    tries.clear()
    with pytest.raises(MachineError, match=r"the download failed 2 times: .*\nThe same command continues it"):
        download(model)
