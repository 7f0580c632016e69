"""The checkpoint that all contestants share: a model's true shape, with random weights."""

from pathlib import Path

from common.environment import ROOT
from common.errors import InputError
from common.lm.cards import Card


def make_checkpoint(card: Card, folder: Path) -> None:
    """A Qwen2 checkpoint of the card's shape with random bf16 weights, and the tiny model's tokenizer.

    Raises InputError for a card of another family.
    """
    if not card.name.startswith(("qwen2", "tiny")):
        raise InputError(f"{card.name}: only the qwen2 and qwen2.5 cards can be made from their numbers")
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shape = card.architecture
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=card.context,
        tie_word_embeddings=shape.tied_embeddings,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data_samples" / "tiny").save_pretrained(folder)
