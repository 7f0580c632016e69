"""Serve the model of a run on this machine, as OpenAI's API: for curl, the openai package, LangChain, or a chat page.

    make serve RUN=outputs/sft-tiny-1a2b3c4d                     llama.cpp, with the exported GGUF file
    make serve RUN=outputs/sft-tiny-1a2b3c4d ENGINE=vllm         vLLM, where it is installed: many users, one GPU
    make serve RUN=outputs/sft-tiny-1a2b3c4d COMMANDS=yes        command lines for vLLM, TGI, llama.cpp and Ollama

llama.cpp serves RUN/export/gguf; a run without one is exported first. Chat template and end tokens are those of the
training. Nobody has to log in: keep it on this machine, or behind a proxy that asks for a password. Ctrl-C ends it.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli import parse_arguments
from common.commands import command
from common.environment import ROOT
from common.errors import InputError, MachineError, run_command
from common.lm.hub import find_model
from common.lm.load import base_of
from common.run.files import read_object
from common.run.record import adapter_of
from exporting import commands
from exporting.modelfile import PARAMETERS, stops_of

CONTEXT = 8192  # tokens; a model's own limit may need more memory than there is
PREFERRED = ("q8_0", "q4_k_m", "f16", "bf16")  # of several GGUF files, where QUANT names none


@dataclass(frozen=True)
class Args:
    run: str
    """The folder of a run."""
    engine: Literal["llama.cpp", "vllm", "transformers"] = "llama.cpp"
    """What computes: llama.cpp on any machine, vLLM on a GPU, or `transformers serve`."""
    quant: str | None = None
    """Which GGUF file of the run, as q4_k_m or f16; without it q8_0, else another one that is there."""
    host: str = "127.0.0.1"
    """The address to listen on. 0.0.0.0 is every network of this machine, for everybody in it."""
    port: int = 8080
    """0 takes a free one."""
    context: int | None = None
    """Tokens of a conversation; without it what the model reads, at most 8,192."""
    name: str | None = None
    """What clients call the model; without it the run's folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    commands: bool = False
    """Only print the command lines that serve this run elsewhere."""


@dataclass(frozen=True)
class Served:
    """A run to be served: its files, and what it is called."""

    folder: Path
    adapter: Path | None  # None of a whole model
    name: str
    context: int

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def merged(self) -> Path | None:
        """The folder of the whole model; None where an adapter is not yet exported."""
        exported = [] if is_stale(self) else [self.export / "merged"]
        folders = [*exported, self.folder / "model", self.folder]
        return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def main() -> None:
    args = parse_arguments(Args, __doc__)
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: expected 0 to 65535")
    served = find(args)
    if args.commands:
        show_commands(served, args)
        return
    check_port(args.host, args.port)
    {"llama.cpp": serve_llama_cpp, "vllm": serve_vllm, "transformers": serve_transformers}[args.engine](served, args)


def find(args: Args) -> Served:
    """The run of --run, or a model that `make merge` wrote. Raises InputError where there is neither, and for a name
    that a client could not give."""
    folder = Path(args.run).expanduser()
    whole = next((one for one in (folder / "model", folder) if (one / "config.json").is_file()), None)
    adapter = None if whole else adapter_of(folder)
    name = args.name or folder.resolve().name
    if not name.isprintable() or not name.strip():
        raise InputError(f"--name {name!r}: give a word, such as my-model")
    base = find_model(f"{whole}/") if whole else base_of(None, str(adapter))
    limit = base.card.context if base.card else CONTEXT
    if args.context is not None and not 0 < args.context <= limit:
        raise InputError(f"--context {args.context}: {base.name} reads 1 to {limit} tokens")
    return Served(folder, adapter, name, args.context or min(limit, CONTEXT))


def check_port(host: str, port: int) -> None:
    """Raise InputError where nobody can listen on a port, before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise InputError(f"--host {host}: no such address") from None
    except PermissionError:
        raise InputError(f"--port {port}: is for root alone; give one from 1024") from None
    except OSError as error:
        if "in use" in str(error):
            raise InputError(f"--port {port}: in use; give another one, or 0 for a free one") from None
        raise InputError(f"--host {host}: {error.strerror}") from None


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def serve_llama_cpp(served: Served, args: Args) -> None:
    gguf = gguf_of(served, args.quant, args.load_pickle)
    stop = wait_for_stop()
    server = start_llama_cpp(gguf, served.name, served.context, args.host, args.port)
    address = server.listening_address
    show_address(served.name, f"{gguf} in llama.cpp", f"{address}/v1")
    stop()
    del server  # its threads end
    print("Ended.")


def start_llama_cpp(gguf: Path, name: str, context: int, host: str, port: int) -> Any:
    """llama.cpp's server of a GGUF file, which listens once this returns: its `listening_address` is the URL."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()  # pyrefly: ignore[missing-attribute]  it is no Python
    parameters.model.path = str(gguf)
    parameters.model_alias = {name}
    parameters.hostnames, parameters.port = [host], port
    parameters.n_ctx = context
    parameters.use_jinja = True  # the chat template in the file, which is the one of training
    parameters.verbosity = 0
    parameters.antiprompt = stops_of(gguf.parent / "Modelfile")
    parameters.sampling.temp, parameters.sampling.top_k = PARAMETERS["temperature"], PARAMETERS["top_k"]
    parameters.sampling.top_p, parameters.sampling.min_p = PARAMETERS["top_p"], PARAMETERS["min_p"]
    try:
        return xllamacpp.Server(parameters)  # pyrefly: ignore[missing-attribute]  as above
    except RuntimeError as error:
        raise MachineError(f"{gguf}: llama.cpp cannot serve it: {error}") from None


def gguf_of(served: Served, quant: str | None, load_pickle: bool = False) -> Path:
    """The GGUF file to serve; without one the run is exported. Raises InputError where --quant names none."""
    found, quant = ggufs(served), quant and quant.lower()
    if not any(wanted in found for wanted in ([quant] if quant else found)):
        wanted = quant or PREFERRED[0]
        print(
            f"{served.export}/gguf has no {wanted} file: {command('export', run=served.folder, quant=wanted)}",
            flush=True,
        )
        script = [sys.executable, str(ROOT / "scripts" / "export.py"), "--run", str(served.folder)]
        script += ["--load-pickle"] if load_pickle else []
        code = subprocess.run([*script, "--format", "gguf", "--quant", wanted], check=False).returncode
        if code:
            raise SystemExit(code)
        found = ggufs(served)
    names = [quant] if quant else [*PREFERRED, *found]
    chosen = next((found[name] for name in names if name in found), None)
    if chosen is None:
        raise InputError(f"--quant {quant}: {served.export}/gguf has {', '.join(found) or 'no GGUF file'}")
    return chosen


def is_stale(served: Served) -> bool:
    """Whether the export of a run is of other weights, or of another tokenizer, than are in its folder now."""
    record = served.export / "export.json"
    if not record.is_file():
        return False
    from export import identify_weights  # late: it is another command
    from exporting.merged import find_trained

    made_of = read_object(record).get("weights")
    return made_of != identify_weights(find_trained(str(served.folder)))


def ggufs(served: Served) -> dict[str, Path]:
    """{quantization: file} of the exported files, whose names end in it; none of an export of other weights."""
    if is_stale(served):
        return {}
    files = sorted((served.export / "gguf").glob("*.gguf"))
    return {file.stem.rpartition("-")[2].lower(): file for file in files}


# --- the other engines ----------------------------------------------------------------------------------------------


def serve_vllm(served: Served, args: Args) -> None:
    words = vllm_words(served, args)
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "--engine vllm: vLLM is not installed here; `make setup VARIANT=cuda-vllm` does that on a machine with an "
            f"NVIDIA GPU. Where it is installed:\n  {commands.shell(words)}"
        )
    show_address(served.name, "vLLM", f"http://{args.host}:{args.port}/v1")
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *words[1:]])


def vllm_words(served: Served, args: Args) -> list[str]:
    """vLLM with the merged model, else with the base and the adapter beside it."""
    if served.merged or served.adapter is None:
        return commands.vllm_merged(served.merged or served.folder, served.name, served.context, args.host, args.port)
    base = base_of(None, str(served.adapter))
    config = read_object(served.adapter / "adapter_config.json")
    template = served.adapter / "chat_template.jinja"
    return commands.vllm_adapter(
        base.source,
        served.adapter,
        served.name,
        config["r"],
        served.context,
        args.host,
        args.port,
        template if template.is_file() else None,
    )


def serve_transformers(served: Served, args: Args) -> None:
    if served.merged is None:
        export = command("export", run=served.folder, format="merged")
        raise InputError(f"--engine transformers serves a merged model, and {served.folder} has none: {export}")
    words = ["serve", str(served.merged), "--host", args.host, "--port", str(args.port)]
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        raise MachineError(
            f"--engine transformers: `transformers serve` needs {', '.join(missing)}, which this environment does not "
            f"have; that of VARIANT=cuda-vllm does. Where they are installed:\n  transformers {commands.shell(words)}"
        )
    show_address(str(served.merged), "transformers serve", f"http://{args.host}:{args.port}/v1")
    os.execv(sys.executable, [sys.executable, "-m", "transformers.cli.transformers", *words])


def show_commands(served: Served, args: Args) -> None:
    """Print how to serve this run elsewhere, with what is exported, and how to export what is not."""
    merged, files = served.merged, ggufs(served)
    print("vLLM, one GPU and many users:")
    print(f"  {commands.shell(vllm_words(served, args))}")
    print("TGI, in its container:")
    if merged:
        print(f"  {commands.shell(commands.tgi(merged, served.context, args.port or 8080))}")
    else:
        print(f"  needs {command('export', run=served.folder, format='merged')}")
    print("llama.cpp's own server, and Ollama:")
    if files:
        gguf = gguf_of(served, args.quant)
        server = commands.llama_server(gguf, served.name, served.context, args.host, args.port or 8080)
        print(f"  {commands.shell(server)}")
        for words in commands.ollama(served.name, gguf.parent / "Modelfile"):
            print(f"  {commands.shell(words)}")
    else:
        print(f"  need {command('export', run=served.folder, format='gguf')}")


# --- what is printed, and how it ends -------------------------------------------------------------------------------


def show_address(name: str, what: str, url: str) -> None:
    """Print the address, the model's name, and what to type to try it."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    code = (
        f'from openai import OpenAI; client = OpenAI(base_url="{url}", api_key="none"); '
        f"print(client.chat.completions.create(model={json.dumps(name)}, "
        'messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)'
    )
    print(f"{what}\n  base URL  {url}\n  model     {name}")
    print(
        f"  {commands.shell(['curl', f'{url}/chat/completions', '-H', 'Content-Type: application/json', '-d', body])}"
    )
    print(f"  {commands.shell(['python', '-c', code])}")
    print("Ctrl-C ends it.", flush=True)


def wait_for_stop() -> Any:
    """A function that waits for Ctrl-C or SIGTERM; one that came before is not lost."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in the server's threads, too
    return lambda: signal.sigwait(signals)


if __name__ == "__main__":
    run_command(main)
