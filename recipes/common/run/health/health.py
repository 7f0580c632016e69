"""The findings about a run, judged after every logged step. Each comes once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.run.health import ppo, preferences, rollouts, supervised
from common.run.health.seen import Finding, Seen
from common.run.health.supervised import Rule

RULES: dict[str, tuple[Rule, ...]] = {
    "sft": supervised.SFT,
    "dpo": preferences.DPO,
    "kto": preferences.DPO,
    "reward": preferences.REWARD,
    "grpo": rollouts.GRPO,
    "ppo": ppo.PPO,
}


class Health:
    """The findings about one run so far, and the rules that have found nothing yet.

    Args:
        record: what run.json holds: the recipe and its arguments, the measures of the data, and the steps to take.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        arguments = {name: argument["value"] for name, argument in record.get("arguments", {}).items()}
        self.seen = Seen(str(record.get("recipe")), arguments, record.get("data") or {}, record.get("steps"))
        self.rules = RULES.get(self.seen.recipe, ())
        self.findings: list[Finding] = []

    def judge(self) -> list[Finding]:
        """The new findings, by what has been seen."""
        known = {finding.rule for finding in self.findings}
        pending = [rule for rule in self.rules if rule.__name__ not in known]
        found = [
            replace(finding, rule=rule.__name__, found=self.seen.step)
            for rule in pending
            if (finding := rule(self.seen)) is not None
        ]
        self.findings += found
        return found

    def end(self, record: Mapping[str, Any], samples: list[dict[str, Any]]) -> list[Finding]:
        """The new findings at the end of the run, by its whole run.json and samples.json."""
        self.seen.record, self.seen.samples, self.seen.ended = dict(record), samples, True
        return self.judge()
