"""What goes wrong in SFT, and with the loss and the data of DPO, KTO and reward models too.

A rule returns a finding, or None: nothing wrong, or too little evidence. Every number that a rule compares with is
here, with its reason.
"""

import math
import statistics
from collections.abc import Callable

from common.run.health import texts
from common.run.health.general import FACTS
from common.run.health.seen import Finding, Seen

Rule = Callable[[Seen], Finding | None]

ROWS = 15  # logged steps before a curve counts as flat: fewer are within the noise of their batches
SOME, HALF = 0.25, 0.5  # of a run: warm-up and the first descent are over; a run is what it will be
DIVERGED, NATS = 1.5, 0.5  # times the loss before training, and nats more: batches differ by a few tenths of it
JUMP, JUMPS, LOOK = 2.0, 3, 20  # times the loss before; one in so many logged steps is a strange batch, three are not
FALL = 0.02  # of a loss: what fine-tuning gains in its first quarter is ten times as much
CERTAIN = 0.05  # of a loss: the standard error of the fall, above which a curve is too noisy to call flat
LEARNED = 0.1  # nats a token, below which there is nothing left to learn and a flat loss is no fault
RISE, RISE_NATS = 0.05, 0.02  # of a held-out loss, on the same rows each time, so without noise
COPIES = 0.2  # of the rows; web text has up to 14 % near duplicates (arXiv:2107.06499)
KNOWN, FORGOTTEN = 3.0, 0.5  # nats a token: above 3 a base knows no facts; 0.5 more is 0.6 times as likely
SAMPLED = 3  # held-out prompts whose completions are compared
TRAINED = 20  # steps before completions are compared: a run of a few steps is a test of the installation


def nothing_trainable(seen: Seen) -> Finding | None:
    """The gradient is exactly 0 from the first step on."""
    norms = seen.curve("grad_norm")
    if norms.count < 5 or any(norms.begin(5)) or any(norms.last(5)):
        return None
    return Finding(
        "nothing trainable",
        *norms.steps(norms.count),
        "the norm of the gradient is 0 in every logged step",
        "No weight that can learn has an effect on the loss: check --lora-target-modules, --lora-dropout, and"
        " the loss mask with `make check-data`",
    )


def learning_rate_too_large(seen: Seen) -> Finding | None:
    """The loss is above that before training, is no number, or jumps again and again."""
    loss = seen.curve("loss")
    if loss.count < 3:
        return None
    latest, before = loss.last(5), statistics.median(loss.begin(3))
    evidence = ""
    if not all(map(math.isfinite, latest)):
        evidence = "the loss is no longer a number"
    elif loss.count >= 8 and statistics.median(latest) > max(DIVERGED * before, before + NATS):
        evidence = f"the loss rose from {before:.3g} to {statistics.median(latest):.3g}"
    elif (jumps := _jumps(loss.last(LOOK + 5))) >= JUMPS:
        evidence = f"the loss jumped {jumps} times in {LOOK} logged steps to more than twice what it was"
    if not evidence:
        return None
    return Finding(
        "learning rate too large",
        *loss.steps(5),
        evidence,
        f"Divide --learning-rate {seen.arguments.get('learning_rate', 0):g} by 10, or raise --warmup-steps",
    )


def _jumps(losses: list[float]) -> int:
    """How many losses are twice the median of the five before, and half a nat above it."""
    usual = [statistics.median(losses[index - 5 : index]) for index in range(5, len(losses))]
    return sum(value > max(JUMP * before, before + NATS) for value, before in zip(losses[5:], usual, strict=True))


def flat_loss(seen: Seen) -> Finding | None:
    """The loss has not fallen since the beginning."""
    loss = seen.change("loss", 5)
    if loss is None or seen.curve("loss").count < ROWS or not seen.reached(SOME) or nothing_trainable(seen):
        return None
    fall, noise = -loss.rise, FALL * loss.before
    if loss.after < LEARNED or loss.error > CERTAIN * loss.before or not -noise - 2 * loss.error < fall < noise:
        return None
    return Finding(
        "flat loss",
        loss.first,
        loss.last,
        f"it was {loss.before:.4g} and is {loss.after:.4g}",
        f"Raise --learning-rate {seen.arguments.get('learning_rate', 0):g}, or --lora-r;"
        " check the loss mask with `make check-data`",
    )


def over_fitting(seen: Seen) -> Finding | None:
    """The held-out loss is above its lowest value in the last two evaluations, while the loss in training fell."""
    held_out, loss = seen.curve("eval_loss"), seen.change("loss", 3)
    if held_out.count < 4 or loss is None or not loss.falls:
        return None
    step, lowest = held_out.lowest
    if min(held_out.last(2)) <= lowest + max(RISE * abs(lowest), RISE_NATS):
        return None
    return Finding(
        "over-fitting",
        step,
        seen.step,
        f"the held-out loss rose from {lowest:.4g} to {held_out.last(1)[0]:.4g} while the loss in training fell to"
        f" {loss.after:.4g}",
        f"Lower --num-train-epochs to end near step {step}, or --learning-rate or --lora-r, or add data",
    )


def forgetting(seen: Seen) -> Finding | None:
    """At the end a few plain facts are less likely than to the base, which knew them."""
    general = seen.record.get("general") or {}
    before, after = general.get("before", math.inf), general.get("after", 0.0)
    if before > KNOWN or not after > before + FORGOTTEN:
        return None
    return Finding(
        "forgetting",
        1,
        seen.step,
        f"the loss of plain facts, such as {FACTS[0]!r}, was {before:.3g} nats a token to the base and is {after:.3g}",
        f"Lower --learning-rate {seen.arguments.get('learning_rate', 0):g}, --num-train-epochs or --lora-r, or mix"
        " general rows into the data",
    )


def duplicate_rows(seen: Seen) -> Finding | None:
    rows, distinct = seen.data.get("rows", 0), seen.data.get("distinct", 0)
    if not distinct or rows - distinct < COPIES * rows:
        return None
    return Finding(
        "duplicate rows",
        0,
        0,
        f"{rows - distinct:,} of {rows:,} rows are copies of another one",
        "The model learns them by heart: remove the copies from --data, or lower --num-train-epochs",
    )


def answers_collapse(seen: Seen) -> Finding | None:
    """After training most held-out prompts get the same completion, or one that repeats itself; before they did not."""
    if not seen.ended or seen.step < TRAINED or len(seen.samples) < SAMPLED:
        return None
    share = {when: _broken(seen, when) for when in ("before", "after", "reference")}
    if share["after"] < 2 / 3 or share["before"] > 1 / 3 or share["reference"] > 1 / 3:
        return None
    after = [str(sample.get("after")) for sample in seen.samples]
    common, times = texts.most_common(after)
    kind = f"{times} of {len(after)} are {_short(common)}" if times > 1 else f"as {_short(common)}"
    return Finding(
        "answers collapse",
        1,
        seen.step,
        f"completions of held-out prompts are equal or repeat themselves, {kind}",
        "Lower --learning-rate or --num-train-epochs, and look at the data for one answer to many prompts",
    )


def _broken(seen: Seen, when: str) -> float:
    written = [str(sample.get(when)) for sample in seen.samples]
    return statistics.mean(texts.broken(written, [sample.get("prompt") for sample in seen.samples]))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:40] + " ...")


OF_LOSS: tuple[Rule, ...] = (nothing_trainable, learning_rate_too_large)
SFT: tuple[Rule, ...] = (duplicate_rows, *OF_LOSS, flat_loss, over_fitting, forgetting, answers_collapse)
