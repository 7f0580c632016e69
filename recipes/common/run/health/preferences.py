"""What goes wrong in DPO, KTO and reward models. A rule is as in supervised.py."""

import statistics

from common.run.health import texts
from common.run.health.seen import Finding, Seen
from common.run.health.supervised import (
    HALF,
    OF_LOSS,
    ROWS,
    SAMPLED,
    TRAINED,
    Rule,
    answers_collapse,
    duplicate_rows,
    forgetting,
    over_fitting,
)

ALIKE = 0.1  # of the pairs; each one teaches noise
MARGIN = 0.1  # nats that policy and reference differ by on a pair: odds that changed by a tenth
CHOSEN, CHOSEN_SHARE = 10.0, 0.25  # nats that chosen completions lost, and the share of their log-probability
LONGER, GROWN = 0.8, 1.5  # share of the pairs with a longer chosen completion; completions after against before
JUDGED = 200  # rows that a reward model has learned from before it is judged
CHANCE, CORRELATION = 0.55, 0.1  # accuracy and correlation that are no better than a guess
OUTPUTS = 0.05  # margin, or standard deviation of standardised scores: 1 is what the data has
LENGTH = 0.8  # correlation of outputs and lengths: two thirds of what the model says is how long a text is


def alike_pairs(seen: Seen) -> Finding | None:
    rows, alike = seen.data.get("rows", 0), seen.data.get("alike", 0)
    if not rows or alike < ALIKE * rows:
        return None
    return Finding(
        "chosen equals rejected",
        0,
        0,
        f"in {alike:,} of {rows:,} pairs they differ by spaces only",
        "Remove these pairs from --data: there is nothing to prefer in them",
    )


def flat_margins(seen: Seen) -> Finding | None:
    """The policy prefers the chosen completions no more than the reference policy does."""
    margins, beta = seen.change("rewards/margins", 5), seen.arguments.get("beta") or 1.0
    if margins is None or seen.curve("rewards/margins").count < ROWS or not seen.reached(HALF):
        return None
    if abs(margins.after) + margins.error > MARGIN * beta:
        return None
    return Finding(
        "flat margins",
        margins.first,
        margins.last,
        f"the median margin is {margins.after:.3g}, {margins.after / beta:.2g} nats",
        f"Raise --learning-rate {seen.arguments.get('learning_rate', 0):g}, and check that chosen and rejected differ"
        " in what you want, and that not half of them are swapped",
    )


def chosen_less_likely(seen: Seen) -> Finding | None:
    """Chosen completions lost a quarter of their log-probability: rejected ones only fall faster."""
    chosen, beta = seen.change("rewards/chosen", 3), seen.arguments.get("beta") or 1.0
    if chosen is None or seen.curve("rewards/chosen").count < 8:
        return None
    lost, start = -chosen.after / beta, abs(seen.curve("logps/chosen").begin(1)[0])
    if not chosen.falls or lost < max(CHOSEN, CHOSEN_SHARE * start):
        return None
    return Finding(
        "chosen becomes less likely",
        chosen.first,
        chosen.last,
        f"chosen completions lost {lost:.3g} nats since the reference policy, which gave them {-start:.3g}",
        f"Lower --learning-rate {seen.arguments.get('learning_rate', 0):g} or raise --beta {beta:g}"
        + (", or add sft to --loss-type, which keeps them likely" if seen.recipe == "dpo" else ""),
    )


def length_preferred(seen: Seen) -> Finding | None:
    """Chosen is the longer completion in most pairs, and that is what the policy learned."""
    rows, longer = seen.data.get("rows", 0), seen.data.get("chosen longer", 0)
    if not seen.ended or seen.step < TRAINED or len(seen.samples) < SAMPLED or longer < LONGER * max(rows, 1):
        return None
    before, after = (
        texts.median_length([str(sample.get(when)) for sample in seen.samples]) for when in ("before", "after")
    )
    if after < GROWN * max(before, 1):
        return None
    return Finding(
        "length",
        1,
        seen.step,
        f"in {longer / rows:.0%} of the pairs chosen is the longer completion, and completions grew from"
        f" {before:.0f} to {after:.0f} characters",
        "Add pairs whose chosen completion is the shorter one, raise --beta, or train fewer steps",
    )


# Reward models. They log accuracy or correlation, and margin or spread, of their latest completions.


def near_chance(seen: Seen) -> Finding | None:
    """Held-out rows are ranked as by a guess; before the end, those in training are."""
    if _rows_learned(seen) < JUDGED or not seen.reached(HALF):
        return None
    report = seen.record.get("report") or {}
    pairs = "accuracy" in report or seen.curve("accuracy").count
    name, least = ("accuracy", CHANCE) if pairs else ("correlation", CORRELATION)
    measured = report.get("accuracy" if pairs else "pearson")
    where = "on held-out rows"
    if measured is None:
        if seen.curve(name).count < 5:
            return None
        measured, where = statistics.median(seen.curve(name).last(5)), "in training"
    if measured > least:
        return None
    return Finding(
        "near chance",
        1,
        seen.step,
        f"{'the accuracy' if pairs else 'the correlation with the scores'} is {measured:.2f} {where}",
        "Check that the preferences are consistent: read twenty rows of --data, and train with more rows or a larger"
        f" --learning-rate than {seen.arguments.get('learning_rate', 0):g}",
    )


def flat_outputs(seen: Seen) -> Finding | None:
    """The outputs of the model hardly differ."""
    key = "margin" if seen.curve("margin").count else "spread"
    if seen.curve(key).count < 5 or _rows_learned(seen) < JUDGED or not seen.reached(HALF):
        return None
    latest = statistics.median(seen.curve(key).last(5))
    if abs(latest) > OUTPUTS:
        return None
    what = "the margin between chosen and rejected" if key == "margin" else "the standard deviation of the outputs"
    return Finding(
        "flat outputs",
        *seen.curve(key).steps(5),
        f"{what} is {latest:.3g}",
        f"Raise --learning-rate {seen.arguments.get('learning_rate', 0):g} or --num-train-epochs",
    )


def counts_length(seen: Seen) -> Finding | None:
    """The outputs follow the lengths of the completions."""
    curve = seen.curve("length_correlation")
    if curve.count < 5 or _rows_learned(seen) < JUDGED or not seen.reached(HALF):
        return None
    latest = statistics.median(curve.last(5))
    if abs(latest) < LENGTH:
        return None
    return Finding(
        "length",
        *curve.steps(5),
        f"outputs and lengths of the completions correlate by {latest:.2f}",
        "Add rows in which the better completion is the shorter one (the longer one if the correlation is negative)",
    )


def _rows_learned(seen: Seen) -> int:
    batch = seen.arguments.get("per_device_train_batch_size", 1) * seen.arguments.get("gradient_accumulation_steps", 1)
    return seen.step * batch


DPO: tuple[Rule, ...] = (
    *(duplicate_rows, alike_pairs, *OF_LOSS, flat_margins, chosen_less_likely, length_preferred),
    *(over_fitting, forgetting, answers_collapse),
)
REWARD: tuple[Rule, ...] = (duplicate_rows, alike_pairs, *OF_LOSS, near_chance, flat_outputs, counts_length)
