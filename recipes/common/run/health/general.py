"""How likely a few plain facts are to a model: what fine-tuning should leave as it was."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# Facts that a model of any size has met, the tiny one too, in the languages and notations that it knows.
FACTS = (
    "Santiago is the capital of Chile.",
    "Athens is the capital of Greece.",
    "Nepal is in Asia.",
    "The number 76 is seventy-six.",
    "The opposite of cold is hot.",
    "From 15 to 17: 15, 16, 17",
    "49 - 48 = 1",
    "60 + 12 = 72",
    "雅典是希腊的首都。",
    "尼泊尔在亚洲。",
)


def general_loss(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, float]:
    """The mean loss of the tokens of FACTS in nats, `before` without the adapter of the model and `after` with it."""
    from common.lm.log_probs import score_tokens

    ids = [tokenizer(fact, add_special_tokens=False)["input_ids"] for fact in FACTS]
    rows = [(fact[:1], fact[1:]) for fact in ids if len(fact) > 1]

    def loss() -> float:
        scored = score_tokens(model, rows, tokenizer.pad_token_id)
        return -sum(float(one.log_probs.sum()) for one in scored) / sum(len(completion) for _, completion in rows)

    training = model.training
    model.eval()
    with model.disable_adapter():
        before = loss()
    after = loss()
    model.train(training)
    return {"before": before, "after": after}
