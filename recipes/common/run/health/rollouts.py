"""What goes wrong in GRPO and PPO, which learn from what they sample.

A rule returns a finding, or None: nothing wrong, or too little evidence. Every number that a rule compares with is
here, with its reason.
"""

import statistics

from common.run.health import texts
from common.run.health.seen import KEPT, Change, Finding, Seen, correlation
from common.run.health.supervised import Rule, forgetting

STEPS = 10  # logged steps before a median counts: fewer are one lucky or unlucky batch
TREND, EFFECT = 20, 0.5  # logged steps before a reward counts as flat, and standard deviations that it rose at most
HALF = 0.5  # of a run
FLAT = 0.8  # of the groups: four of five completions were sampled for nothing
TRUNCATED = 0.5  # of the completions: more of them end at the limit than where the model would end them
RUNNING, FOLLOWS = 1.5, 0.8  # length against that at the beginning; correlation of reward and length
LATER_TRUNCATED = 0.25  # more of the completions truncated than at the beginning
FORMED = 0.15  # gain of a reward of format, which is 0 to 1
KL = 2.0  # nats a token: what the policy samples it finds seven times as likely; 0.01 to 0.1 is usual
ENTROPY, NATS = 2.0, 1.0  # times that at the beginning, and nats a token more
TARGETS = 5  # times --kl-target: the controller no longer holds the policy
LOST = 0.1  # of a judge's score at the beginning
BROKEN, WERE_BROKEN = 0.5, 0.2  # of the completions, now and at the beginning
UNLIKELY = 1.5  # nats a token: to the reference policy a fifth as likely as what it wrote itself
SHAPE = {"format", "tags", "json", "json_schema", "xml", "language", "length", "overlong", "repetition"}  # not truth


def no_spread(seen: Seen) -> Finding | None:
    """All completions of most groups have one reward, and not because the rewards rose until all are right."""
    flat, reward = seen.curve("flat"), seen.change("reward", 3)
    if flat.count < STEPS or reward is None or statistics.median(flat.last(STEPS)) < FLAT or reward.rises:
        return None
    return Finding(
        "no spread in groups",
        *flat.steps(STEPS),
        f"in {statistics.median(flat.last(STEPS)):.0%} of the groups all rewards are equal, the mean reward is"
        f" {reward.after:.3g}",
        "Nothing is learned from such a group: raise --num-generations or --temperature, give --refill 2 or"
        " --difficulty auto, or start from a model that solves some of the prompts",
    )


def flat_reward(seen: Seen) -> Finding | None:
    """The reward has not risen since the beginning, though it differs within groups."""
    key = _reward(seen)
    reward = seen.change(key, TREND // 3)
    if reward is None or seen.curve(key).count < TREND or not seen.reached(HALF) or no_spread(seen):
        return None
    deviations = seen.curve("score/std" if seen.recipe == "ppo" else "reward_std").last(KEPT)
    if not deviations or reward.rises or reward.rise + 2 * reward.error > EFFECT * statistics.median(deviations):
        return None
    return Finding(
        f"{'falling' if reward.falls else 'flat'} {'score' if key == 'score/mean' else 'reward'}",
        reward.first,
        reward.last,
        f"it was {reward.before:.3g} and is {reward.after:.3g} (standard error {reward.error:.2g})",
        f"Raise --learning-rate {seen.arguments.get('learning_rate', 0):g}, and read samples.jsonl: does the reward"
        " prefer the better completions? `make test-rewards` shows it",
    )


def format_only(seen: Seen) -> Finding | None:
    """Half of the run a reward of format rose, and no reward of what the completions hold did: format comes first."""
    names = _rewards(seen)
    shape = {name: change for name, change in names.items() if name in SHAPE}
    content = {name: change for name, change in names.items() if name not in SHAPE}
    if not content or not seen.reached(HALF) or any(change.rise > change.error for change in content.values()):
        return None
    for name, change in shape.items():
        if change.rises and change.rise >= FORMED:
            other = next(iter(content))
            return Finding(
                "format only",
                change.first,
                change.last,
                f"{name} rose from {change.before:.2f} to {change.after:.2f}, {other} went from"
                f" {content[other].before:.2f} to {content[other].after:.2f}",
                f"Lower the weight of {name} in --rewards, and check the gold answers; --difficulty easy gives"
                " prompts that the model can solve",
            )
    return None


def truncated(seen: Seen) -> Finding | None:
    """Most completions end at the length limit."""
    clipped = seen.curve("completions/clipped_ratio")
    if clipped.count < STEPS or not statistics.median(clipped.last(STEPS)) >= TRUNCATED:
        return None
    return Finding(
        "truncated completions",
        *clipped.steps(STEPS),
        f"{statistics.median(clipped.last(STEPS)):.0%} end at --max-completion-length",
        f"Raise --max-completion-length {seen.arguments.get('max_completion_length', '')}, or start from a model that"
        " SFT has taught to end its answers",
    )


def running_length(seen: Seen) -> Finding | None:
    """Completions grow, and because the reward follows their length, or into the length limit.

    Growth alone is no fault: reasoning that solves more problems may be longer (arXiv:2501.12948).
    """
    length, clipped = seen.change("completions/mean_length", 3), seen.change("completions/clipped_ratio", 3)
    if length is None or seen.curve("completions/mean_length").count < STEPS or not length.rises:
        return None
    if length.after < RUNNING * length.before:
        return None
    written = [entry for entry in seen.late if _total(entry) is not None]
    follows = correlation(
        [_total(entry) or 0.0 for entry in written], [len(str(entry["completion"])) for entry in written]
    )
    into_limit = clipped is not None and clipped.rise >= LATER_TRUNCATED
    if not into_limit and (len(written) < STEPS or follows < FOLLOWS):
        return None
    why = (
        f"{clipped.after:.0%} are truncated"
        if clipped and into_limit
        else f"reward and length correlate by {follows:.2f}"
    )
    return Finding(
        "running length",
        length.first,
        length.last,
        f"completions grew from {length.before:.0f} to {length.after:.0f} tokens, {why}",
        "Add overlong=1 or length=0.1 to --rewards, and look in samples.jsonl for filler",
    )


def kl_too_large(seen: Seen) -> Finding | None:
    """The policy is far from the reference policy."""
    key = "objective/kl" if seen.recipe == "ppo" else "kl"
    kl, length = seen.curve(key), seen.curve("completions/mean_length")
    if kl.count < 5 or not length.count:
        return None
    latest, target = statistics.median(kl.last(5)), seen.arguments.get("kl_target")
    tokens = statistics.median(length.last(5)) if seen.recipe == "ppo" else 1.0
    limit = max(KL * tokens, TARGETS * target if target else 0.0) if seen.recipe == "ppo" else KL
    if not latest >= limit and latest == latest:
        return None
    unit = "nats a completion" if seen.recipe == "ppo" else "nats a token"
    weight = "--kl-coef" if seen.recipe == "ppo" else "--beta"
    return Finding(
        "KL too large",
        *kl.steps(5),
        f"{latest:.3g} {unit} from the reference policy",
        f"Divide --learning-rate {seen.arguments.get('learning_rate', 0):g} by 10, or raise {weight}",
    )


def entropy_too_large(seen: Seen) -> Finding | None:
    """The policy becomes random: nothing that it writes is likely to it."""
    entropy = seen.change("policy/entropy" if seen.recipe == "ppo" else "entropy", 3)
    if entropy is None or not entropy.rises or entropy.after < max(ENTROPY * entropy.before, entropy.before + NATS):
        return None
    return Finding(
        "entropy too large",
        entropy.first,
        entropy.last,
        f"it rose from {entropy.before:.2f} to {entropy.after:.2f} nats a token",
        f"Divide --learning-rate {seen.arguments.get('learning_rate', 0):g} by 10, or lower --temperature",
    )


def judged_quality_falls(seen: Seen) -> Finding | None:
    """The reward rises while a judge, a reward of weight 0, gives less."""
    reward = seen.change(_reward(seen), 3)
    if reward is None or seen.curve(_reward(seen)).count < STEPS or not reward.rises:
        return None
    for name, change in _rewards(seen, judges=True).items():
        if change.falls and -change.rise >= LOST * abs(change.before):
            return Finding(
                "judged quality falls",
                reward.first,
                reward.last,
                f"the reward rose from {reward.before:.3g} to {reward.after:.3g} while {name}, of weight 0, fell from"
                f" {change.before:.3g} to {change.after:.3g}",
                f"The reward is exploited: read the latest of samples.jsonl, and give {name} a weight in --rewards or"
                f" raise {'--kl-coef' if seen.recipe == 'ppo' else '--beta'}",
            )
    return None


def texts_break(seen: Seen) -> Finding | None:
    """The reward rises while completions repeat themselves, are the same for most prompts, or become unlikely texts."""
    reward = seen.change(_reward(seen), 3)
    if reward is None or not reward.rises or len(seen.late) < STEPS:
        return None
    before, after = (_broken(entries) for entries in (seen.early[: len(seen.late)], list(seen.late)))
    unlikely = _to_reference(seen)
    if after >= BROKEN and before <= WERE_BROKEN:
        what = f"{after:.0%} of the completions repeat themselves or are those of other prompts ({before:.0%} at first)"
    elif unlikely[1] >= unlikely[0] + UNLIKELY:
        what = f"to the reference policy a token has {unlikely[1]:.2f} nats ({unlikely[0]:.2f} at first)"
    else:
        return None
    return Finding(
        "texts break",
        reward.first,
        seen.step,
        f"{what}, while the reward rose from {reward.before:.3g} to {reward.after:.3g}",
        f"The reward is exploited: raise {'--kl-coef' if seen.recipe == 'ppo' else '--beta'}, lower --learning-rate, or"
        " add repetition=0.5 to --rewards",
    )


def _to_reference(seen: Seen) -> tuple[float, float]:
    """Nats of a token of PPO's completions under the reference policy, at first and now: what no words are has many."""
    keys = ("objective/entropy", "objective/kl", "completions/mean_length")
    changes = [seen.change(key, 3) for key in keys]
    if seen.recipe != "ppo" or seen.arguments.get("kl_estimator", "k1") != "k1" or None in changes:
        return 0.0, 0.0
    entropy, kl, length = (change for change in changes if change is not None)
    return (entropy.before + kl.before) / max(length.before, 1), (entropy.after + kl.after) / max(length.after, 1)


def _reward(seen: Seen) -> str:
    return "score/mean" if seen.recipe == "ppo" else "reward"


def _rewards(seen: Seen, judges: bool = False) -> dict[str, Change]:
    """How the mean of each reward changed: of those with a weight, or of the judges, whose weight is 0."""
    from common.rewards.specification import weights  # late: only GRPO and PPO need the modules of all rewards

    found = {}
    for name, weight in weights(seen.arguments.get("rewards") or ()).items():
        change = seen.change(f"rewards/{name}/mean", 5)
        if change is not None and (weight == 0) == judges:
            found[name] = change
    return found


def _total(entry: dict) -> float | None:
    total = entry.get("reward", entry.get("score"))
    return float(total) if isinstance(total, int | float) else None


def _broken(entries: list[dict]) -> float:
    return statistics.mean(
        texts.broken([str(entry.get("completion")) for entry in entries], [entry.get("prompt") for entry in entries])
    )


OF_BOTH: tuple[Rule, ...] = (
    *(truncated, running_length, kl_too_large, entropy_too_large),
    *(flat_reward, format_only, judged_quality_falls, texts_break, forgetting),
)
GRPO: tuple[Rule, ...] = (no_spread, *OF_BOTH)
