"""Load a model and its tokenizer."""

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.data.rows import source_sha256
from common.errors import InputError, MachineError, spell
from common.lm.adapter import check_base, check_mergeable, check_plain, load_adapter
from common.lm.chat import set_pad_token
from common.lm.documents import document_end
from common.lm.hub import TOKENIZER_FILES, Model, contents, embedding_rows, find_model, load_tokenizer
from common.lm.own_code import check_trust_of
from common.lm.render import end_token, set_chat_template
from common.lm.sharded import gather_as_computed
from common.plan.fit import KEPT_LAYERS
from common.run.folder import parent_of
from common.run.screen import console

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Used = TypeVar("Used")


def base_of(model: str | None, adapter: str | None, to_merge: bool = False) -> Model:
    """The model to load: `model`, or without it the one that `adapter` was trained on, or tiny.

    Raises InputError when `adapter` is not an adapter, or is one that cannot be used beside its base (`to_merge`:
    cannot be merged into it), when its base is not known, and when its base is not `model`.
    """
    if adapter is None:
        return find_model(model or "tiny")
    (check_mergeable if to_merge else check_plain)(Path(adapter))
    parent = parent_of(Path(adapter))
    name = model or (parent.model if parent else None)
    if name is None:
        raise InputError(f"{adapter}: no run.json beside it that names its base; give the base with --model")
    base = find_model(name)
    if parent:
        check_trust_of(parent.arguments, base)
    if parent and parent.base != contents(base):
        raise InputError(
            f"{adapter} was trained on {parent.model} ({parent.base[:16]}), and {base.source} is another model or "
            f"another version of it ({contents(base)[:16]}); an adapter fits its own base only"
        )
    return base


def identify(base: Model, chat_template_path: str | None) -> dict[str, str]:
    """What a run on `base` reads of models, for its identity: the `contents` of the base, and files by sha256.

    They are a chat template of the user's own, and the settings by which `generate` samples from a local model.
    """
    files = {"chat_template_path": Path(chat_template_path).expanduser()} if chat_template_path else {}
    if base.local:
        files["generation_config"] = Path(base.source, "generation_config.json")
    return {"base": contents(base)} | {name: source_sha256([file]) for name, file in files.items() if file.is_file()}


def load_chat_tokenizer(
    base: Model, chat_template_path: str | None = None, pad_token: str | None = None
) -> tuple["PreTrainedTokenizerBase", str]:
    """The tokenizer of `base` with a chat template and a pad token, and the token that ends a completion.

    The pad token is `pad_token`, else the model card's, else one that is not the end token. Raises InputError when
    there is no chat template, no end token in it, or no pad token, and when the embedding has no row for the end token.
    """
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, chat_template_path, base.name)
    end = end_token(tokenizer)
    _set_ends(base, tokenizer, end, pad_token, "give another template with --chat-template-path")
    return tokenizer, end


def load_text_tokenizer(
    base: Model, chat_template_path: str | None = None, pad_token: str | None = None
) -> tuple["PreTrainedTokenizerBase", str]:
    """The tokenizer of `base` for documents, and the token that ends one; it needs no chat template.

    Otherwise as `load_chat_tokenizer`. Raises InputError when there is no end token or no pad token.
    """
    tokenizer = load_tokenizer(base)
    if chat_template_path:
        set_chat_template(tokenizer, chat_template_path, base.name)
    end = document_end(tokenizer)
    _set_ends(base, tokenizer, end, pad_token, "give its tokenizer another end token")
    return tokenizer, end


def _set_ends(base: Model, tokenizer: "PreTrainedTokenizerBase", end: str, pad_token: str | None, other: str) -> None:
    """Set the pad token. Raises InputError where the embedding has no row for it or for the end token."""
    rows, end_id = embedding_rows(base), tokenizer.convert_tokens_to_ids(end)
    if rows and end_id >= rows:
        raise InputError(
            f"{base.name}: its end token {end} has the id {end_id}, and its embedding has {rows} rows: the token was "
            f"added without resizing the model; resize it, or {other}"
        )
    set_pad_token(tokenizer, pad_token or (base.card.pad_token if base.card else None), end, rows)
    tokenizer.embedding_rows = rows  # for IdCheck


def choose_dtype(name: str) -> "torch.dtype":
    """The dtype that --dtype names; for auto bfloat16 on a GPU that has it, else float16, and float32 on the CPU."""
    import torch
    from unsloth import is_bfloat16_supported

    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if is_bfloat16_supported() else torch.float16


def check_precision(args: Any, origins: Mapping[str, str]) -> None:
    """Raise InputError where --load-in-fp8 does not go with --load-in-4bit or --dtype, MachineError without fp8 here.

    `origins` are those of `parse`: a --load-in-4bit that nobody typed, the default of recipe or card, is off with it.
    """
    if not args.load_in_fp8:
        return
    if args.load_in_4bit and origins["load_in_4bit"] == "command line":
        raise InputError("--load-in-4bit and --load-in-fp8 are two ways to store the base; give one of the two")
    if args.dtype not in ("auto", "bfloat16"):
        raise InputError(f"--load-in-fp8 computes the rest in bfloat16; leave out --dtype {args.dtype}")
    from common.lm.fp8 import check_fp8_device

    check_fp8_device()  # before the run has a folder


def in_4bit(load_in_4bit: bool, load_in_fp8: bool) -> bool:
    """Is the base to be loaded in 4 bit?"""
    return load_in_4bit and not load_in_fp8


def keep_activations(layers: int) -> None:
    """Have Unsloth keep the activations of `layers` decoder layers, which are else recomputed.

    By its variable, as its CPU path takes no argument. With 0 a value of the user's own stays, and is printed.
    """
    own = os.environ.get(KEPT_LAYERS, "")
    if layers:
        os.environ[KEPT_LAYERS] = str(layers)
    if own not in ("", "0", str(layers)):
        holds = f"--checkpoint-skip-layers={layers} holds" if layers else "so many layers keep their activations"
        console().print(spell(f"{KEPT_LAYERS}={own} is set in the environment: {holds}."), soft_wrap=True)


def attend_to_rows_as_they_are(few_lengths: bool) -> None:
    """Have Unsloth's attention leave the length of rows as it is, where they have few different ones.

    It else copies queries, keys and values into rows that are 1 to 128 tokens longer, because cuDNN makes a plan for
    every new length, in a sixth of a second. A value that the user gives in UNSLOTH_SDPA_CUDNN_BUCKET stays.
    """
    import torch

    if not few_lengths or not torch.cuda.is_available() or "UNSLOTH_SDPA_CUDNN_BUCKET" in os.environ:
        return
    from unsloth.utils import attention_dispatch

    attention_dispatch._CUDNN_LENGTH_BUCKET = 0  # it was read from the variable when unsloth was imported


def fuse_adapter(model: "PeftModel", sharded: bool = False) -> None:
    """Have what a plain LoRA adapter adds computed together with the base, on a GPU in 16 bit; else by PEFT.

    A model that is to be `sharded` keeps Unsloth's own kernels, which know a weight in parts.
    """
    if sharded:
        gather_as_computed(model)
        return
    from common.lm.fused_mlp import fuse_mlps
    from common.lm.fused_qkv import fuse_qkv

    fuse_mlps(model)
    fuse_qkv(model)


def load_for_inference(base: Model, adapter: str | None, load_in_4bit: bool) -> "PreTrainedModel":
    """`base`, with `adapter` if given, ready to generate: in 16 or 4 bit on a GPU, in 32 bit on the CPU.

    Raises InputError where the adapter does not fit `base`, and MachineError for 4 bit without a GPU.
    """
    import torch
    from unsloth import FastLanguageModel

    if load_in_4bit and not torch.cuda.is_available():
        raise MachineError("--load-in-4bit needs a GPU")
    model, _ = FastLanguageModel.from_pretrained(
        base.source,
        **base.origin,
        dtype=None if torch.cuda.is_available() else torch.float32,
        load_in_4bit=load_in_4bit,
        use_exact_model_name=True,  # else a hub id is swapped for Unsloth's own 4-bit copy of it
    )
    check_base(model, base.source)
    if adapter:
        check_vocabulary(base, Path(adapter))
        model = load_adapter(model, Path(adapter))
    FastLanguageModel.for_inference(model)
    return model


def use_for_inference(
    base: Model, adapter: str | None, load_in_4bit: bool, use: "Callable[[PreTrainedModel], Used]"
) -> Used:
    """What `use` returns of the model that `load_for_inference` loads for it; its memory is free afterwards."""
    import torch

    used = use(load_for_inference(base, adapter, load_in_4bit))  # no name holds the model any longer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return used


def check_vocabulary(base: Model, adapter: Path) -> None:
    """Raise InputError where the tokenizer in the folder `adapter` has tokens that the base's has not.

    The commands that use an adapter beside its base read prompts by the base's tokenizer, for both.
    """
    if not any((adapter / name).is_file() for name in TOKENIZER_FILES):
        return
    own = load_tokenizer(Model(adapter.name, str(adapter.resolve()), None, base.card, local=True)).get_vocab()
    if added := sorted(own.items() - load_tokenizer(base).get_vocab().items(), key=lambda token: token[1]):
        raise InputError(
            f"{adapter}: was trained with tokens that its base has not ({', '.join(token for token, _ in added[:3])}); "
            f"merge it (make merge ADAPTER={adapter}) and give the merged model"
        )
