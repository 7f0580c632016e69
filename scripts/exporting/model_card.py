"""README.md of an export: the card of its run, and how each exported file is used."""

from collections.abc import Iterable
from pathlib import Path

from common.pages.model_card import base_facts, card_of_run
from common.pages.reading import read_run
from common.run.files import read_object

from exporting import commands

NAME = "README.md"
CONTEXT = 4096  # tokens in the command lines where a run does not say


def model_card(run_folder: str | Path, files: Iterable[str | Path], repo: str | None = None) -> str:
    """The README.md of an export, for the hub.

    Args:
        run_folder: the folder of the run.
        files: the exported files, by their paths beside README.md, as adapter/adapter_model.safetensors.
        repo: the repository that they go to; without it they are named as they lie here.

    Raises InputError where there is no run.
    """
    run = read_run(Path(run_folder))
    kinds = kinds_of(files)
    name = run.name
    context = run.arguments.get("max_length") or CONTEXT
    uses = []
    if "adapter" in kinds:
        where, config = repo or kinds["adapter"], Path(run_folder) / "adapter" / "adapter_config.json"
        rank = read_object(config)["r"] if config.is_file() else 16
        facts = base_facts(run)
        base = str(facts.get("hub_id") or facts["name"])
        code = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
            f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")',
        ]
        vllm = commands.shell(commands.vllm_adapter(base, where, name, rank))
        uses.append("The adapter, on its base:\n\n" + _block("python", code) + "\n\n" + _block("sh", [vllm]))
    if "merged" in kinds:
        where = repo or kinds["merged"]
        lines = [commands.shell(commands.vllm_merged(where, name))]
        lines.append(commands.shell(commands.tgi(where if repo else Path(where), int(context))))
        if not repo:  # TGI needs a whole path
            lines[-1] = lines[-1].replace(str(Path(where).resolve()), f"$PWD/{where}")
        code = [
            "from transformers import pipeline",
            "",
            f'chat = pipeline("text-generation", "{where}")',
            'print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])',
        ]
        uses.append("The merged weights:\n\n" + _block("python", code) + "\n\n" + _block("sh", lines))
    if "gguf" in kinds:
        gguf = kinds["gguf"]
        lines = [f"hf download {repo} --local-dir {name}", f"cd {name}"] if repo else []
        lines += [commands.shell(commands.llama_server(gguf, name))]
        lines += [commands.shell(words) for words in commands.ollama(name, Path(gguf).parent / "Modelfile")]
        uses.append("The GGUF file, with llama.cpp or Ollama:\n\n" + _block("sh", lines))
    library, relation = ("gguf", "quantized") if set(kinds) == {"gguf"} else ("transformers", "finetune")
    if set(kinds) <= {"adapter"}:
        library, relation = "peft", "adapter"
    return card_of_run(run, "\n\n".join(uses) or "No files beside it.", library, relation)


def kinds_of(files: Iterable[str | Path]) -> dict[str, str]:
    """{"adapter", "merged" or "gguf": the folder, or the GGUF file} of exported files, by their names."""
    kinds: dict[str, str] = {}
    for file in sorted(map(Path, files)):
        if file.name == "adapter_model.safetensors":
            kinds["adapter"] = str(file.parent)
        elif file.suffix == ".safetensors":
            kinds["merged"] = str(file.parent)
        elif file.suffix == ".gguf":
            kinds.setdefault("gguf", str(file))
    return kinds


def _block(language: str, lines: list[str]) -> str:
    return f"```{language}\n" + "\n".join(lines) + "\n```"
