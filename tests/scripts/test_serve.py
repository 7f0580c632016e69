"""make serve: an OpenAI-compatible endpoint that answers with the text of transformers, streams, and stops.

llama.cpp runs for real, with the clients that people use: openai's package and LangChain's.
"""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from common.errors import InputError, MachineError
from conftest import ROOT
from exporting import commands
from served import assert_text_of_transformers, serving

sys.path.insert(0, str(ROOT / "scripts"))
import serve

FLAGS = json.loads((ROOT / "tests" / "references" / "serving_flags.json").read_text(encoding="utf-8"))
PROMPTS = ["What is 3 + 4?", "12 - 5 = ?", "三加四等于多少？", "Hello", "Which is larger, 7 or 9?"]


@pytest.fixture(scope="module")
def run(trained, exported, tmp_path_factory) -> Path:
    """The run of a newcomer, with its export."""
    folder = tmp_path_factory.mktemp("served") / "my-run"
    folder.mkdir()
    for file in trained[0].iterdir():
        if file.name != "export":
            (folder / file.name).symlink_to(file)
    (folder / "export").symlink_to(exported)
    return folder


# --- the endpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_llama_cpp_answers_openais_client_with_the_text_of_transformers(run):
    import openai

    with serving(run) as (process, printed):
        client = openai.OpenAI(base_url=printed["base URL"], api_key="none")
        assert [model.id for model in client.models.list()] == ["my-run"] == [printed["model"]]

        def ask(prompt: str, **more):
            messages = [{"role": "user", "content": prompt}]
            return client.chat.completions.create(model="my-run", messages=messages, temperature=0, **more)

        assert_text_of_transformers(client, "my-run", run / "export" / "merged", PROMPTS)
        assert ask(PROMPTS[0], max_tokens=3).choices[0].finish_reason == "length"
        stream = list(ask(PROMPTS[0], max_tokens=64, stream=True))
        pieces = [choice.delta.content or "" for part in stream for choice in part.choices]
        assert sum(map(bool, pieces)) > 3  # in pieces, as they come
        assert "".join(pieces) == ask(PROMPTS[0], max_tokens=64).choices[0].message.content
        assert [choice.finish_reason for part in stream for choice in part.choices][-1] == "stop"

        # What is printed to try it, works when pasted.
        for line in (printed["curl"], printed["python"]):
            tool = "curl" if line is printed["curl"] else sys.executable
            words = [tool, *shlex.split(line)]
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
        follow_the_page(printed["base URL"])

        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == "Ended.\n"
        assert process.stderr.read() == ""
    port = int(printed["base URL"].split(":")[2].split("/")[0])
    serve.check_port("127.0.0.1", port)  # it is free again


def follow_the_page(url: str) -> None:
    """Run the example of LangChain in docs/serve.md, against this server."""
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "langchain_openai" in code
    assert "http://127.0.0.1:8080/v1" in code
    code = code.replace("http://127.0.0.1:8080/v1", url).replace("outputs/try", "my-run")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2, done.stdout  # an answer at once, and one in pieces


@pytest.mark.slow
def test_the_other_engines_are_printed_or_refused_with_what_to_do(run):
    def serve_run(*flags: str) -> subprocess.CompletedProcess:
        script = [sys.executable, ROOT / "scripts" / "serve.py", "--run", run, *flags]
        return subprocess.run(script, capture_output=True, text=True, check=False, timeout=60)

    shown = serve_run("--commands")
    assert shown.returncode == 0, shown.stderr
    for words in ("vllm serve", "text-generation-inference", "llama-server", "ollama create my-run -f"):
        assert words in shown.stdout
    if serve.importlib.util.find_spec("vllm") is None:
        refused = serve_run("--engine", "vllm", "--port", "0")
        assert refused.returncode == 3
        assert "VARIANT=cuda-vllm" in refused.stderr
        assert "vllm serve" in refused.stderr
    if serve.importlib.util.find_spec("fastapi") is None:
        refused = serve_run("--engine", "transformers", "--port", "0")
        assert refused.returncode == 3
        assert "needs fastapi" in refused.stderr


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: in use; give another one"):
            serve.check_port("127.0.0.1", port)
    serve.check_port("127.0.0.1", port)
    with pytest.raises(InputError, match="no such address"):
        serve.check_port("no-such-host.invalid", 8080)


def served(folder: Path) -> serve.Served:
    return serve.Served(folder, folder / "adapter", "mine", 512)


def test_of_several_gguf_files_the_one_that_is_named_is_served(tmp_path):
    folder = tmp_path / "export" / "gguf"
    folder.mkdir(parents=True)
    for quant in ("f16", "q4_k_m", "Q5_K_M"):
        (folder / f"my-run-{quant}.gguf").touch()
    assert serve.gguf_of(served(tmp_path), None).name == "my-run-q4_k_m.gguf"
    assert serve.gguf_of(served(tmp_path), "f16").name == "my-run-f16.gguf"
    for name in ("q5_k_m", "Q5_K_M"):  # which is not exported anew
        assert serve.gguf_of(served(tmp_path), name).name == "my-run-Q5_K_M.gguf"


def test_a_file_that_llama_cpp_cannot_read_is_one_message(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(MachineError, match="cannot serve it"):
        serve.start_llama_cpp(tmp_path / "broken.gguf", "mine", 512, "127.0.0.1", 0)


# --- the command lines ----------------------------------------------------------------------------------------------

VLLM = [
    commands.vllm_merged("me/my-model", "mine", 4096),
    commands.vllm_adapter("Qwen/Qwen2.5-7B-Instruct", "me/my-adapter", "mine", 24, 4096, chat_template="a.jinja"),
]


@pytest.mark.parametrize("words", VLLM, ids=["merged", "adapter"])
def test_vllm_knows_every_argument(words):
    pinned = re.search(r"^vllm==(\S+)", (ROOT / "docker" / "cuda-vllm.lock").read_text(encoding="utf-8"), re.M)[1]
    assert FLAGS["vllm"]["version"] == pinned, "list its arguments again"
    assert words[:2] == ["vllm", "serve"]
    assert {word for word in words if word.startswith("--")} <= set(FLAGS["vllm"]["flags"])


@pytest.mark.parametrize("words", VLLM, ids=["merged", "adapter"])
def test_vllms_own_parser_reads_them(words):
    pytest.importorskip("vllm", reason="vLLM is in another environment, VARIANT=cuda-vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    read = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    assert read.port == 8000
    assert read.max_model_len == 4096
    assert read.generation_config == "vllm"
    if "--enable-lora" in words:
        assert read.max_lora_rank == 32
        assert read.lora_modules[0].name == "mine"


def test_tgi_and_llama_server_know_every_argument(tmp_path):
    tgi = commands.tgi(tmp_path, 4096)
    image = tgi.index(commands.TGI_IMAGE)
    assert {word for word in tgi[image:] if word.startswith("--")} <= set(FLAGS["tgi"]["flags"])
    assert commands.TGI_IMAGE.endswith(FLAGS["tgi"]["version"])
    llama = commands.llama_server("a.gguf", "mine", 4096)
    assert {word for word in llama if word.startswith("--")} <= set(FLAGS["llama-server"]["flags"])


def test_a_rank_that_vllm_does_not_take_is_refused():
    with pytest.raises(ValueError, match="merge it"):
        commands.vllm_adapter("base", "adapter", "mine", 1024)
