"""The reward of a run of GRPO or PPO, as its recipe computed it: functions and reward model, by their weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.data.examples import Prompt
from common.data.rows import Faults
from common.errors import InputError
from common.lm.hub import Model
from common.rewards.specification import check_prompts, load, reward_models, score_completions

from evaluation.reward_model import Trained, find

if TYPE_CHECKING:
    from common.lm.generate import Completion

    from evaluation.reward_model import LoadedRewardModel

REWARD_MODEL = "reward model"  # its name among the rewards


class Scorer:
    """Scores completions as a run did. `models` are what it loads, at the first call.

    Raises InputError where a reward of the run is not to be found.
    """

    def __init__(self, given: dict[str, Any], load_in_4bit: bool = False) -> None:
        spec = tuple(given.get("rewards") or ())
        self.rewards = load(spec, given["max_completion_length"]) if spec else []
        self.weight = given.get("reward_weight", 1.0)
        self.load_in_4bit = load_in_4bit
        self.trained: Trained | None = find(given["reward_model"], None) if given.get("reward_model") else None
        self.models: list[Model] = [*reward_models(spec), *([self.trained.model] if self.trained else [])]
        self._loaded: LoadedRewardModel | None = None

    def check(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Raise InputError where rows lack what the rewards need."""
        faults = Faults()
        try:
            check_prompts(self.rewards, prompts, faults)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        faults.stop()

    def __call__(
        self, prompts: Sequence[Prompt], completions: "Sequence[Completion]"
    ) -> tuple[list[float], dict[str, list[float | None]]]:
        """The reward of each completion, and the scores that it is the weighted sum of, by name."""
        totals: list[float] = [0.0] * len(prompts)
        parts: dict[str, list[float | None]] = {}
        if self.rewards:
            totals, parts = score_completions(self.rewards, prompts, completions)
        if self.trained:
            if self._loaded is None:
                from evaluation.reward_model import LoadedRewardModel

                self._loaded = LoadedRewardModel(self.trained, self.load_in_4bit)
            scores = self._loaded.scores([[*one.prompt_ids, *one.completion_ids] for one in completions])
            parts = {**parts, REWARD_MODEL: [*scores]}
            totals = [total + self.weight * score for total, score in zip(totals, scores, strict=True)]
        return totals, parts
