"""Load a trained model, let it answer, and score what it says; nothing here trains.

What loads or asks a model wants unsloth imported before it, as everywhere; the rest needs neither.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .chat import end_token, set_chat_template, set_pad_token
from .errors import InputError, MachineError
from .formats import Conversation, Problem
from .models import Model, contents, find_model, load_tokenizer
from .record import parent_of
from .reward_functions import Scores
from .rewards import Weighted, columns_of, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .generate import Answer


def base_of(model: str | None, adapter: str | None) -> Model:
    """The model to load: the one named, held to what the adapter's run recorded, or the one recorded; else tiny.

    Raises InputError where `adapter` is none, where nothing says what it was trained on, and where that is not `model`.
    """
    if adapter is None:
        return find_model(model or "tiny")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"--adapter {adapter}: no adapter_config.json there; give the adapter folder of a run")
    parent = parent_of(Path(adapter))
    if model is None and parent is None:
        raise InputError(f"{adapter}: no run.json beside it that names its base; give the base with --model")
    base = find_model(model or parent.model)
    if parent and parent.base != contents(base):
        raise InputError(
            f"{adapter} was trained on {parent.model} ({parent.base[:16]}), and {base.source} is another model or "
            f"another version of it ({contents(base)[:16]}); an adapter fits its own base only"
        )
    return base


def load_chat_tokenizer(base: Model) -> tuple["PreTrainedTokenizerBase", str]:
    """The tokenizer of `base`, with a chat template and a token to pad with, and the token that ends an answer."""
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, None, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, base.card.pad_token if base.card else None, end)
    return tokenizer, end


def load_for_inference(base: Model, adapter: str | None, load_in_4bit: bool) -> "PreTrainedModel":
    """`base`, with `adapter` on it if given, ready to answer: in the GPU's 16 bit or 4 bit, in 32 bit on the CPU.

    Raises MachineError for 4 bit without a GPU.
    """
    import torch
    from peft import PeftModel
    from unsloth import FastLanguageModel

    if load_in_4bit and not torch.cuda.is_available():
        raise MachineError("--load-in-4bit needs a GPU")
    model, _ = FastLanguageModel.from_pretrained(
        base.source,
        revision=base.revision,
        dtype=None if torch.cuda.is_available() else torch.float32,
        load_in_4bit=load_in_4bit,
        use_exact_model_name=True,  # else a hub id is swapped for Unsloth's own 4-bit copy of it
    )
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    FastLanguageModel.for_inference(model)
    return model


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """The problems without those whose prompt has been there before."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(repr((problem.prompt, problem.tools)), problem)
    return list(first.values())


def sample_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Problem],
    end: str,
    count: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 64,
) -> list[list["Answer"]]:
    """`count` answers to each prompt, with a line of progress; as `generate` gives them."""
    from rich.progress import track

    from .generate import generate

    asked = [Conversation(row.place, row.prompt, row.tools) for row in prompts for _ in range(count)]
    said = []
    for first in track(range(0, len(asked), batch_size), f"{count} answers to each of {len(prompts)} prompts"):
        said += generate(model, tokenizer, asked[first : first + batch_size], end, max_new_tokens, temperature)
    return [said[first : first + count] for first in range(0, len(said), count)]


def score_answers(
    rewards: Sequence[Weighted], problems: Sequence[Problem], answers: Sequence["Answer"]
) -> tuple[list[float], dict[str, Scores]]:
    """The weighted sum of each answer's rewards, and what every reward gave it. There is a problem for each answer."""
    return score(
        rewards,
        [problem.prompt for problem in problems],
        [[{"role": "assistant", "content": answer.text}] for answer in answers],
        completion_ids=[answer.completion_ids for answer in answers],
        **columns_of(problems),
    )
