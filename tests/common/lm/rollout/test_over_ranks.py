"""Completions and scores of several ranks: by two real processes over gloo, beside those of one."""

import pickle
from pathlib import Path

import pytest
import torch
from common.lm.render import end_token
from common.lm.rollout.over_ranks import own_random_numbers, sample_over_ranks, together
from common.lm.rollout.rollouts import Rollouts
from common.rewards.reward import Reward
from common.rewards.specification import score_over_ranks
from conftest import ROOT, in_two_ranks
from test_rollouts import questions
from transformers import AutoModelForCausalLM

PROMPTS = questions("12 + 30 = ?", "Work out 47 + 57.", "Which is larger, 3 or 5?", "9 - 4 = ?", "3 x 4 = ?")


@pytest.fixture(scope="module")
def sampler(tokenizer):
    tokenizer.pad_token = tokenizer.pad_token or "<|pad|>"
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32).eval()
    return Rollouts(model, tokenizer, end_token(tokenizer), seed=1, adapter=None)


def of_ranks(folder: Path, work) -> list:
    """What `work()` returns on each of two ranks."""

    def task(rank: int, folder: Path) -> None:
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))

    in_two_ranks(task, folder)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


def test_two_ranks_sample_the_tokens_that_one_does_and_both_have_all(sampler, tmp_path):
    """Five prompts, so that one rank has one more; and one prompt, so that one rank has none."""

    def work(rank: int) -> tuple:
        sampled = sample_over_ranks(sampler, PROMPTS, 16, 1.0, "step 1")
        figures = sampler.figures
        return sampled, figures, sample_over_ranks(sampler, PROMPTS[:1], 16, 1.0, "step 2")

    (first, figures, alone), second = of_ranks(tmp_path, work)
    assert (first, figures, alone) == second  # figures too: a metric of theirs is one of all ranks
    one = [sampler.sample(PROMPTS, 16, 1.0, "step 1"), sampler.sample(PROMPTS[:1], 16, 1.0, "step 2")]
    for ours, whole in zip((first, alone), one, strict=True):
        assert [c.completion_ids for c in ours] == [c.completion_ids for c in whole]
        for c, other in zip(ours, whole, strict=True):
            assert c.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert len({tuple(c.completion_ids) for c in first}) > 2


def test_a_rank_that_falls_back_takes_the_others_along(sampler, tmp_path):
    def work(rank: int) -> tuple:
        sampler.sample = lambda prompts, *_, **__: [replaced] * len(prompts)
        sampler.figures, sampler.backend = {}, ("graph", "generate")[rank]
        return sample_over_ranks(sampler, PROMPTS, 4, 1.0), sampler.backend

    (replaced,) = sampler.sample(PROMPTS[:1], 4, 1.0)
    assert replaced.log_probs is not None
    for completions, backend in of_ranks(tmp_path, work):
        assert backend == "generate"
        assert [one.log_probs for one in completions] == [None] * len(PROMPTS)  # all alike


def test_numbers_of_a_rank_leave_those_of_all_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with own_random_numbers(-7):
        drawn = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(drawn, expected)


def test_the_speed_of_ranks_is_all_their_tokens_in_the_time_of_the_slowest():
    def figures(seconds: float, tokens: int) -> dict[str, float]:
        speed = tokens / seconds
        return {"rollout/seconds": seconds, "rollout/refresh_seconds": seconds / 10, "rollout/tokens_per_second": speed}

    both = together([figures(2.0, 100), figures(4.0, 300)])
    assert both == pytest.approx(figures(4.0, 400))
    assert together([]) == {}


def test_each_rank_scores_its_own_rows_and_both_have_all_scores(sampler, tmp_path):
    completions = sampler.sample(PROMPTS, 8, 1.0, "step 1")
    calls: list[int] = []

    def length(completions, **_):
        calls.append(len(completions))
        return [float(len(one[0]["content"])) for one in completions]

    def sometimes(completions, **_):
        return [None if len(one[0]["content"]) % 2 else 1.0 for one in completions]

    rewards = [Reward("length", 0.5, length), Reward("sometimes", 2.0, sometimes)]

    def work(rank: int) -> tuple:
        scores = (
            score_over_ranks(rewards, PROMPTS, completions),
            score_over_ranks(rewards, PROMPTS[:1], completions[:1]),
        )
        return (*scores, calls)

    (all_first, one_first, calls_first), (all_second, one_second, calls_second) = of_ranks(tmp_path, work)
    assert (calls_first, calls_second) == ([3, 1], [2])  # the second rank had no row the second time
    assert (all_first, one_first) == (all_second, one_second)
    assert all_first == score_over_ranks(rewards, PROMPTS, completions)
    assert one_first == score_over_ranks(rewards, PROMPTS[:1], completions[:1])
