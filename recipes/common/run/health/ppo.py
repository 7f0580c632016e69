"""What goes wrong in PPO besides what goes wrong in GRPO. A rule is as in rollouts.py."""

import statistics

from common.run.health.rollouts import OF_BOTH, STEPS
from common.run.health.seen import Finding, Seen
from common.run.health.supervised import Rule

RATIO = 0.5  # of the recent steps in which the update was ended by --max-approx-kl
VALUES, VALUE_LOSS = 5.0, 1.0  # times the lowest value loss; and where 0.5, for normalized scores, is a constant's
EXPLAINED = -0.1  # a critic of one constant has 0, noise of a small batch some hundredths below


def ratio_explodes(seen: Seen) -> Finding | None:
    """In most steps the policy leaves the one that sampled so far that its update is ended."""
    stopped = seen.curve("policy/stopped")
    recent = stopped.last(STEPS)
    if len(recent) < STEPS // 2 or sum(value > 0 for value in recent) <= RATIO * len(recent):
        return None
    kl = statistics.median(seen.curve("policy/approx_kl").last(STEPS))
    return Finding(
        "ratio explodes",
        *stopped.steps(STEPS),
        f"in {sum(value > 0 for value in recent)} of {len(recent)} steps the update was ended by --max-approx-kl; the"
        f" median is {kl:.3g} nats a token",
        f"Divide --learning-rate {seen.arguments.get('learning_rate', 0):g} by 3, or lower --num-ppo-epochs",
    )


def value_loss_diverges(seen: Seen) -> Finding | None:
    loss = seen.curve("loss/value_avg")
    if loss.count < 6:
        return None
    before, after = loss.lowest[1], statistics.median(loss.last(3))
    if not after > max(VALUES * before, VALUE_LOSS) and after == after:
        return None
    return Finding(
        "value loss diverges",
        *loss.steps(3),
        f"it was {before:.3g} at step {loss.lowest[0]} and is {after:.3g}",
        f"Divide --critic-learning-rate {seen.arguments.get('critic_learning_rate', 0):g} by 10",
    )


def explained_variance(seen: Seen) -> Finding | None:
    """The critic is worse than a constant, and no better than at its first step.

    Where all completions get one score there is nothing to explain: then the share is far below 0, and the loss small.
    """
    explained, loss = seen.curve("value/explained_variance"), seen.curve("loss/value_avg")
    if explained.count < STEPS + seen.arguments.get("critic_warmup_steps", 0):
        return None
    latest = statistics.median(explained.last(STEPS))
    if not latest < EXPLAINED or statistics.median(loss.last(STEPS)) < loss.begin(1)[0]:
        return None
    return Finding(
        "explained variance below 0",
        *explained.steps(STEPS),
        f"its median is {latest:.2f}: the values are worse than their mean",
        f"Lower --critic-learning-rate {seen.arguments.get('critic_learning_rate', 0):g}, or raise"
        " --critic-warmup-steps or --rollout-batch-size",
    )


PPO: tuple[Rule, ...] = (ratio_explodes, value_loss_diverges, explained_variance, *OF_BOTH)
