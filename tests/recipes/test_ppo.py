"""`recipes/ppo.py`: its phases on a small model with random weights, and the recipe as a user runs it.

The phases are compared with a plain implementation in 64 bit that shares no line with them: no adapters switched, no
batches, no padding, no chunks. What the recipe gains is shown at the end.
"""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ppo
import pytest
import torch
from common.data.examples import Prompt
from common.lm import log_probs
from common.lm.generate import Completion
from common.lm.scalar_head import new_head
from common.rewards.specification import Reward
from common.run.folder import Run
from common.run.training_state import Learner
from conftest import ROOT, adapter_bytes, in_two_ranks, interrupt, read_jsonl, run_recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

PAD, TEMPERATURE, KL_COEF = 0, 0.7, 0.1
LENGTHS = ((5, 7), (3, 2), (9, 1), (4, 6))  # of prompt and completion
SCORES = [0.5, -1.0, 2.0, 0.1]


def completions(seed: int = 0) -> list[Completion]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(1, 2048, (sum(lengths),), generator=generator).tolist() for lengths in LENGTHS]
    return [
        Completion("", index != 1, ids[:prompt], ids[prompt:])
        for index, (ids, (prompt, _)) in enumerate(zip(drawn, LENGTHS, strict=True))
    ]


@pytest.fixture
def setting(tmp_path):
    """PPO on the tiny model with random adapters, so that policy, critic, reward model and reference all differ."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)
    plain = copy.deepcopy(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ppo.ATTENTION), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name in ("critic", "reward"):
        model.add_adapter(name, copy.deepcopy(config))
    heads = {name: new_head(base.config.hidden_size, "cpu") for name in ("critic", "reward")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        for head in heads.values():
            head.weight.normal_(std=0.1)
    model.train()

    args = ppo.Args(
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        kl_target=None,
        normalize_scores=False,
        missing_eos_penalty=0.25,
        lam=0.9,
        gamma=0.97,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        rollout_batch_size=4,
        num_ppo_epochs=2,
        max_approx_kl=1e9,
        critic_warmup_steps=0,
    )
    settings = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch_fused", max_grad_norm=1e9)
    rows = [Prompt(str(index), [{"role": "user", "content": str(index)}]) for index in range(4)]
    critic_parameters = [*ppo.adapter_parameters(model, "critic"), *heads["critic"].parameters()]
    parts = ppo.PPO(
        args=args,
        model=model,
        tokenizer=SimpleNamespace(pad_token_id=PAD),
        rollouts=SimpleNamespace(figures={}, backend="graph", sample=lambda *_: completions()),
        reward_functions=[Reward("given", 1.0, lambda completions, **_: SCORES)],
        reward_head=None,
        critic_head=heads["critic"],
        policy=Learner(ppo.adapter_parameters(model, "default"), settings, 1e-3, 10),
        critic=Learner(critic_parameters, settings, 1e-2, 10),
        prompt_sampler=ppo.PromptSampler(rows, "off", "entropy", seed=0),
        score_moments=ppo.RunningMoments(),
        kl_controller=ppo.KLController(KL_COEF, None, 10_000),
        bad_steps=ppo.BadSteps(Run(tmp_path, {})),
    )
    return parts, plain, heads["reward"]


def copy_of(parts: ppo.PPO) -> ppo.PPO:
    """A copy with models and optimizers of its own, of the same run."""
    return copy.deepcopy(parts, {id(parts.bad_steps): parts.bad_steps})


ALL = [0, 2, 1, 3]  # in passes of two, of different widths


def phases(parts: ppo.PPO) -> tuple[ppo.Rollout, ppo.Scores, ppo.Rewards, ppo.Advantages]:
    """What phases 1 to 3 return, with given completions in place of sampled ones."""
    rollout = ppo.as_rollout(parts.prompt_sampler.draw(4), completions(), PAD, "cpu")
    scores = ppo.score(parts, rollout)
    if parts.args.normalize_scores:
        parts.score_moments.update(scores.total)
    rewards = ppo.compute_rewards(parts, rollout, scores)
    return rollout, scores, rewards, ppo.compute_advantages(parts, rollout, rewards)


def test_the_correction_weighs_the_policy_and_not_the_critic_by_the_truncated_ratio(setting):
    parts, *_ = setting
    rollout, _, rewards, plain = phases(parts)
    weights = torch.ones_like(plain.advantages)
    for index, completion in enumerate(rollout.completions):
        length = len(completion.completion_ids)
        shift = torch.linspace(-0.5, 1.5, length)  # nats, by which training finds a token more likely than sampling
        sampled = (rewards.log_probs[index, :length] - shift).tolist()
        rollout.completions[index] = replace(completion, log_probs=sampled)
        weights[index, :length] = shift.exp().clamp(max=2)
    unweighted = ppo.compute_advantages(parts, rollout, rewards)
    assert torch.equal(unweighted.advantages, plain.advantages)
    parts.args = replace(parts.args, rollout_correction="token")
    weighted = ppo.compute_advantages(parts, rollout, rewards)
    assert torch.allclose(weighted.advantages, plain.advantages * weights, atol=1e-5)
    assert torch.equal(weighted.returns, plain.returns)


def update_both(parts, rollout, rewards, advantages) -> tuple[dict[str, float], dict[str, float]]:
    policy = ppo.update_policy(parts, rollout, rewards, advantages, ALL)
    critic = ppo.update_critic(parts, rollout, advantages, ALL)
    return tuple({name: float(value) for name, value in stats.items()} for stats in (policy, critic))


def in_64_bit(plain, model, name: str | None):
    """The base alone, or with one adapter written into its weights as base + scale B A; leaves to differentiate by."""
    whole = copy.deepcopy(plain).double().eval()
    leaves = {}
    if name:
        state = {key: value.detach().double() for key, value in model.named_parameters() if f".{name}." in key}
        for key in [key for key in state if "lora_A" in key]:
            path = key.removeprefix("base_model.model.").partition(".lora_A")[0]
            down, up = (state[k].clone().requires_grad_() for k in (key, key.replace("lora_A", "lora_B")))
            leaves[key], leaves[key.replace("lora_A", "lora_B")] = down, up
            linear = whole.get_submodule(path)
            weight = linear.weight.detach()
            linear.forward = lambda x, w=weight, b=linear.bias, a=down, u=up: (
                x @ (w + 2.0 * u @ a).T + (0 if b is None else b.detach())
            )
    return whole, leaves


def slow_log_probs(whole, completion: Completion) -> torch.Tensor:
    logits = (
        whole(input_ids=torch.tensor([completion.prompt_ids + completion.completion_ids])).logits[0].double()
        / TEMPERATURE
    )
    first = len(completion.prompt_ids) - 1
    return torch.stack(
        [logits[first + t].log_softmax(-1)[token] for t, token in enumerate(completion.completion_ids)]
    )  # (c,)


def slow_values(whole, head, completion: Completion) -> torch.Tensor:
    ids = torch.tensor([completion.prompt_ids + completion.completion_ids])
    hidden = whole.model(input_ids=ids).last_hidden_state[0]
    first = len(completion.prompt_ids) - 1
    return torch.stack([(hidden[first + t] * head).sum() for t in range(len(completion.completion_ids))])


def slow_advantages(parts, plain):
    """Log-probabilities of policy and reference, values, white advantages and returns of each completion, by loops."""
    policy, _ = in_64_bit(plain, parts.model, "default")
    critic, _ = in_64_bit(plain, parts.model, "critic")
    head = parts.critic_head.weight.detach().double()[0]
    found = []
    with torch.no_grad():
        for completion, score in zip(completions(), SCORES, strict=True):
            log_probs, reference = (
                slow_log_probs(policy, completion),
                slow_log_probs(copy.deepcopy(plain).double(), completion),
            )
            values = slow_values(critic, head, completion)
            rewards = (-KL_COEF * (log_probs - reference)).tolist()
            rewards[-1] += score - (0.0 if completion.ended else 0.25)
            after, advantage, advantages = 0.0, 0.0, []
            for reward, value in zip(reversed(rewards), reversed(values.tolist()), strict=True):
                advantage = reward + 0.97 * after - value + 0.97 * 0.9 * advantage
                after = value
                advantages.insert(0, advantage)
            found.append((log_probs, reference, values, torch.tensor(advantages).double(), rewards))
    together = torch.cat([advantages for *_, advantages, _ in found])
    return [
        (old, reference, values, (a - together.mean()) / together.std(correction=0), a + values, rewards)
        for old, reference, values, a, rewards in found
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_rows(tensor, expected, tolerance=1e-4):
    """Each row of (B, C) is the expected one, and zeros after it."""
    for row, want in zip(tensor.double(), expected, strict=True):
        torch.testing.assert_close(row[: len(want)], torch.as_tensor(want).double(), rtol=tolerance, atol=tolerance)
        assert not row[len(want) :].any()


def test_policy_reference_and_critic_are_three_models_seen_through_the_same_padding(setting):
    parts, plain, _ = setting
    _, _, rewards, advantages = phases(parts)
    slow = slow_advantages(parts, plain)
    assert_rows(rewards.log_probs, [row[0] for row in slow])
    assert_rows(rewards.ref_log_probs, [row[1] for row in slow])
    assert_rows(advantages.values, [row[2] for row in slow])
    assert float((rewards.log_probs - rewards.ref_log_probs).abs().max()) > 0.1  # so that equal is not always equal


def test_the_score_comes_at_the_last_token_and_the_penalties_where_they_belong(setting):
    parts, plain, _ = setting
    _, _, rewards, _ = phases(parts)
    assert_rows(rewards.rewards, [row[5] for row in slow_advantages(parts, plain)])
    parts.kl_controller.coef = 0.0
    _, _, rewards, _ = phases(parts)
    for row, (_, length), score in zip(rewards.rewards, LENGTHS, [0.5, -1.25, 2.0, 0.1], strict=True):
        assert row.nonzero().tolist() == [[length - 1]]
        assert float(row[length - 1]) == pytest.approx(score)


def test_advantages_are_those_of_a_slow_loop(setting):
    parts, plain, _ = setting
    _, _, _, advantages = phases(parts)
    slow = slow_advantages(parts, plain)
    assert_rows(advantages.advantages, [row[3] for row in slow], 1e-3)
    assert_rows(advantages.returns, [row[4] for row in slow], 1e-3)


def test_at_the_first_minibatch_nothing_has_moved(setting):
    parts, _, _ = setting
    rollout, _, rewards, advantages = phases(parts)
    policy, critic = update_both(parts, rollout, rewards, advantages)
    assert policy["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert policy["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert policy["policy/clipfrac_avg"] == 0.0
    assert policy["policy/grad_norm"] > 0
    assert critic["val/clipfrac_avg"] == 0.0
    moved, _ = update_both(parts, rollout, rewards, advantages)  # and then it has
    assert moved["policy/approx_kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "torch's", "reentrant, as Unsloth's"])
def test_gradients_are_those_of_a_plain_implementation_in_64_bit(setting, checkpointing, monkeypatch):
    """After two updates, so that ratios and values have moved and some are clipped."""
    parts, plain, _ = setting
    if checkpointing != "off":
        reentrant = checkpointing != "torch's"
        parts.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            parts.model.enable_input_require_grads()
            own = torch.utils.checkpoint.checkpoint
            monkeypatch.setattr(
                torch.utils.checkpoint,
                "checkpoint",
                lambda function, *inputs, **options: own(function, *inputs, **{**options, "use_reentrant": True}),
            )
    monkeypatch.setattr(log_probs, "CHUNK", 4)  # as with a real model, a completion is in several
    rollout, _, rewards, advantages = phases(parts)
    slow = slow_advantages(parts, plain)
    old_head = parts.critic_head.weight.detach().clone()
    for _ in range(2):
        update_both(parts, rollout, rewards, advantages)
    assert not torch.equal(parts.critic_head.weight, old_head)

    gradients = {}
    for learner in (parts.policy, parts.critic):
        monkeypatch.setattr(learner, "step", lambda: 0.0)  # keep the gradient
    clipped = ppo.update_policy(parts, rollout, rewards, advantages, ALL)["policy/clipfrac_avg"]
    for name, parameter in parts.model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any() or ".default." in name, name
        gradients |= {name: parameter.grad} if ".default." in name else {}
    assert 0 < clipped < 1

    policy, leaves = in_64_bit(plain, parts.model, "default")
    count, loss = sum(length for _, length in LENGTHS), 0.0
    for completion, (old, _, _, white, _, _) in zip(completions(), slow, strict=True):
        ratios = (slow_log_probs(policy, completion) - old).exp()
        for ratio, advantage in zip(ratios, white, strict=True):
            loss = loss - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / count
    loss.backward()
    assert leaves.keys() == gradients.keys()
    for name, leaf in leaves.items():
        assert relative_error(gradients[name], leaf.grad) < 1e-4, name

    parts.policy.discard()
    ppo.update_critic(parts, rollout, advantages, ALL)
    for name, parameter in parts.model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any() or ".critic." in name, name
    critic, leaves = in_64_bit(plain, parts.model, "critic")
    head = parts.critic_head.weight.detach().double()[0].requires_grad_()
    bias = float(parts.critic_head.bias.detach())
    loss = 0.0
    for completion, (_, _, old, _, returns, _) in zip(completions(), slow, strict=True):
        values = slow_values(critic, head, completion) + bias
        within = torch.max(torch.min(values, old + 0.2), old - 0.2)
        loss = loss + torch.max((values - returns) ** 2, (within - returns) ** 2).sum() / 2 / count
    loss.backward()
    assert relative_error(parts.critic_head.weight.grad[0], head.grad) < 1e-4
    for name, leaf in leaves.items():
        assert relative_error(parts.model.get_parameter(name).grad, leaf.grad) < 1e-4, name


def test_padding_changes_no_number(setting):
    """Other tokens there change nothing, in one pass of all completions."""
    parts, _, _ = setting
    parts.args = replace(parts.args, per_device_train_batch_size=4)
    rollout, _, rewards, advantages = phases(parts)
    other = replace(
        rollout,
        input_ids=torch.where(rollout.attention_mask.bool(), rollout.input_ids, 77),
        tokens=torch.where(rollout.mask, rollout.tokens, 77),
    )

    def filled(record, *names):
        return replace(record, **{name: torch.where(rollout.mask, getattr(record, name), 1e3) for name in names})

    other_rewards, other_advantages = (
        filled(rewards, "log_probs"),
        filled(advantages, "values", "advantages", "returns"),
    )
    one = update_both(copy_of(parts), rollout, rewards, advantages)
    two = update_both(copy_of(parts), other, other_rewards, other_advantages)
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_the_policy_stops_once_it_is_too_far_and_the_critic_continues(setting):
    parts, _, _ = setting
    parts.args = replace(parts.args, max_approx_kl=1e-6, num_ppo_epochs=3)
    rollout, _, rewards, advantages = phases(parts)
    stats = ppo.update(parts, rollout, rewards, advantages, policy_learns=True)
    assert stats["policy/stopped"] == 0.5  # the second update was the last, and was not taken
    assert parts.policy.optimizer.state[parts.policy.parameters[0]]["step"] == 1
    assert parts.critic.optimizer.state[parts.critic.parameters[0]]["step"] == 3


def test_while_the_critic_warms_up_the_policy_stays(setting):
    parts, _, _ = setting
    rollout, _, rewards, advantages = phases(parts)
    before = [parameter.detach().clone() for parameter in parts.policy.parameters]
    ppo.update(parts, rollout, rewards, advantages, policy_learns=False)
    assert all(torch.equal(old, new) for old, new in zip(before, parts.policy.parameters, strict=True))
    assert parts.critic.optimizer.state[parts.critic.parameters[0]]["step"] == 2
    ppo.update(parts, rollout, rewards, advantages, policy_learns=True)
    assert not all(torch.equal(old, new) for old, new in zip(before, parts.policy.parameters, strict=True))


def test_a_step_runs_the_phases_in_order_and_changes_what_goes_from_step_to_step(setting):
    parts, _, _ = setting
    parts.args = replace(parts.args, normalize_scores=True, critic_warmup_steps=1)
    parts.kl_controller = ppo.KLController(KL_COEF, target=1e-6, horizon=40)
    rollout, scores, stats = ppo.ppo_step(parts, 0)
    assert rollout.completions == completions()
    assert scores.total == SCORES
    assert parts.score_moments.count == 4
    assert parts.score_moments.mean == pytest.approx(0.4)
    assert stats["objective/kl_coef"] == KL_COEF  # that of this step
    assert parts.kl_controller.coef == pytest.approx(KL_COEF * (1 + 0.2 * 4 / 40))  # that of the next one
    assert set(parts.prompt_sampler.seen) == {0, 1, 2, 3}
    assert "policy/approx_kl" not in stats
    _, _, stats = ppo.ppo_step(parts, 1)
    assert stats["policy/approx_kl"] >= 0
    assert {"time/sample", "time/reward", "time/advantages", "time/update"} <= stats.keys()


def test_the_reward_model_scores_with_its_own_adapter_and_is_not_trained(setting):
    parts, plain, parts.reward_head = setting
    parts.args = replace(parts.args, reward_weight=0.5)
    frozen = {n: p.detach().clone() for n, p in parts.model.named_parameters() if ".reward." in n or "base_layer" in n}
    rollout, scores, rewards, advantages = phases(parts)
    whole, _ = in_64_bit(plain, parts.model, "reward")
    head = parts.reward_head.weight.detach().double()[0]
    for index, completion in enumerate(completions()):
        ids = torch.tensor([completion.prompt_ids + completion.completion_ids])
        with torch.no_grad():
            expected = float((whole.model(input_ids=ids).last_hidden_state[0, -1] * head).sum())
        assert scores.parts[ppo.REWARD_MODEL][index] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert scores.total[index] == pytest.approx(SCORES[index] + 0.5 * expected, rel=1e-3, abs=1e-4)
    ppo.update(parts, rollout, rewards, advantages, policy_learns=True)
    for name, old in frozen.items():
        assert torch.equal(old, parts.model.get_parameter(name)), name
    assert parts.model.active_adapter == "default"


def test_scores_are_normalized_clipped_and_then_penalized(setting):
    parts, _, _ = setting
    parts.args = replace(parts.args, normalize_scores=True, score_clip=1.0)
    parts.kl_controller.coef = 0.0
    rollout, scores, rewards, advantages = phases(parts)
    stats = ppo.step_metrics(parts, rollout, scores, rewards, advantages)
    mean, std = 0.4, 1.0747  # of 0.5 -1.0 2.0 0.1
    expected = [0.1 / std, -1.0 - 0.25, 1.0, -0.3 / std]
    assert rewards.rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-4)
    assert stats["score/mean"] == pytest.approx(mean)
    assert stats["completions/clipped_ratio"] == 0.25
    assert stats["completions/mean_length"] == 4.0


def test_metrics_with_a_name_of_trls_are_trls_quantities(setting):
    """As trl/experimental/ppo/ppo_trainer.py of TRL 1.12 computes them, over completions one by one."""
    parts, plain, _ = setting
    rollout, scores, rewards, advantages = phases(parts)
    stats = ppo.step_metrics(parts, rollout, scores, rewards, advantages)
    slow = slow_advantages(parts, plain)
    kl = sum(float((log_probs - reference).sum()) for log_probs, reference, *_ in slow) / 4
    assert stats["objective/kl"] == pytest.approx(kl, rel=1e-3)
    assert stats["objective/entropy"] == pytest.approx(-sum(float(row[0].sum()) for row in slow) / 4, rel=1e-4)
    assert stats["objective/scores"] == pytest.approx((sum(SCORES) - 0.25) / 4)
    assert stats["objective/non_score_reward"] == pytest.approx(-KL_COEF * kl, rel=1e-3)
    both = stats["objective/non_score_reward"] + stats["objective/scores"]
    assert stats["objective/rlhf_reward"] == pytest.approx(both, rel=1e-4)
    assert stats["val/num_eos_tokens"] == 3
    policy, critic = update_both(parts, rollout, rewards, advantages)
    assert policy["loss/policy_avg"] == pytest.approx(0.0, abs=1e-5)  # ratios are 1, and advantages white
    errors = [float(((row[2] - row[4]) ** 2).sum()) for row in slow]
    assert critic["loss/value_avg"] == pytest.approx(sum(errors) / 2 / sum(length for _, length in LENGTHS), rel=1e-3)


def test_a_checkpoint_restores_everything(setting, tmp_path):
    parts, _, _ = setting
    ppo.ppo_step(parts, 0)
    parts.kl_controller.coef = 0.123
    parts.score_moments.update([1.0, 5.0])
    ppo.save_checkpoint(parts, tmp_path / "checkpoint-1")
    drawn = torch.rand(3)
    ppo.ppo_step(parts, 1)
    other = copy_of(parts)
    ppo.load_checkpoint(other, tmp_path / "checkpoint-1")
    assert torch.equal(torch.rand(3), drawn)
    assert other.kl_controller.coef == 0.123
    assert other.score_moments == ppo.RunningMoments(2, 3.0, 8.0)
    ppo.ppo_step(other, 1)
    for one, two in zip(parts.policy.parameters, other.policy.parameters, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(parts.critic.parameters, other.critic.parameters, strict=True):
        assert torch.equal(one, two)


# As a user runs it.

SMALL = ("--rollout-batch-size", 8, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2)
FEW = (*SMALL, "--num-ppo-epochs", 2, "--critic-warmup-steps", 1, "--max-completion-length", 24)
FORMAT = re.compile(r"<think>.*\S.*</think><answer>.*\S.*</answer>")


def steps(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_reward_model_and_a_reward_function_score_and_a_run_resumes_after_ctrl_c(merged, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def disclaimer(texts):\n"
        "    return [float('no advice' in text) - 2 * any(map(str.isdigit, text[:50])) for text in texts]\n"
    )
    reward, run = tmp_path / "reward", tmp_path / "run"
    done = run_recipe("reward", "--model", merged, "--output-dir", reward, "--max-steps", 4, "--lora-dropout", 0.5)
    assert done.returncode == 0, done.stderr
    flags = ("--model", merged, "--reward-model", reward, *FEW, "--max-steps", 4, "--save-steps", 1)
    flags += ("--rewards", f"{tmp_path / 'mine.py'}:disclaimer=0.5", "--difficulty", "hard", "--save-total-limit", 9)
    done = run_recipe("ppo", "--output-dir", run, *flags)
    assert done.returncode == 0, done.stderr

    rows = steps(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy begins as the reference policy
    assert rows[-1]["objective/kl"] != 0
    times = ("time/sample", "time/reward", "time/advantages", "time/update")
    of_policy = {"loss/policy_avg", "policy/approx_kl", "policy/clipfrac_avg", "val/ratio"}
    for row in rows:
        both = row["rewards/reward_model/mean"] + 0.5 * row["rewards/disclaimer/mean"]
        assert row["score/mean"] == pytest.approx(both, abs=1e-6)
        assert row["score/reward_model"] + row["score/reward_functions"] == pytest.approx(row["score/mean"], abs=1e-6)
        assert row["episode"] == 8 * row["step"]
        assert {*times, *ppo.LIVE_LINE.values()} - of_policy <= row.keys()
        assert row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(row.get("loss/policy_avg", 0) + row["loss/value_avg"])
    assert not of_policy & rows[0].keys()  # the critic's own step
    assert of_policy <= rows[1].keys()
    samples = read_jsonl(run / "samples.jsonl")
    assert len(samples) == 4 * 3
    for sample in samples:
        assert sample["rewards"]["disclaimer"] == -2 * any(map(str.isdigit, sample["completion"][:50]))
    assert not list((run / "adapter").glob("critic"))
    arguments = json.loads((run / "run.json").read_text(encoding="utf-8"))["arguments"]
    assert arguments["critic_init"] == {"value": "reward", "from": "recipe"}

    stopped = tmp_path / "stopped"
    done = interrupt("SIGINT", 2, "ppo", "--output-dir", stopped, *flags)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped by SIGINT after step 2 of 4; ")
    again = run_recipe("ppo", "--output-dir", stopped, *flags)
    assert again.returncode == 0, again.stderr
    for name in ("score/mean", "loss", "objective/kl"):
        assert [row[name] for row in steps(stopped)] == [row[name] for row in rows]
    assert adapter_bytes(stopped) == adapter_bytes(run)
    assert read_jsonl(stopped / "samples.jsonl") == samples
    last = Path("checkpoints", "checkpoint-4", "critic")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (stopped / last / name).read_bytes() == (run / last / name).read_bytes()

    done = run_recipe("ppo", "--reward-model", reward, cwd=tmp_path)
    assert done.returncode == 2
    assert "was trained on another base" in done.stderr


@pytest.mark.slow
def test_without_a_reward_model_sums_are_scored_by_math_and_format(tmp_path):
    done = run_recipe("ppo", *FEW, "--max-steps", 3, "--logging-steps", 2, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["arguments"]["rewards"] == {"value": ["math", "format=0.2"], "from": "recipe"}
    assert record["arguments"]["critic_init"]["value"] == "base"
    rows = steps(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]  # the last step is logged, too
    assert {"rewards/math/mean", "rewards/format/mean"} <= rows[0].keys()
    assert "rewards/reward_model/mean" not in rows[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_model_learns_what_the_scores_prefer_and_what_is_right(merged, tmp_path):
    """With the card's settings but fewer steps: a reward model of 300 scores, which prefers plain reasoning, and math.

    It takes two minutes of a processor, and on a machine that is shared several times as long.
    """
    reward, run = tmp_path / "reward", tmp_path / "run"
    done = run_recipe("reward", "--model", merged, "--output-dir", reward, seconds=600)
    assert done.returncode == 0, done.stderr
    flags = ("--model", merged, "--reward-model", reward, "--rewards", "math", "--max-steps", 12, "--eval-ratio", 0.1)
    done = run_recipe("ppo", "--output-dir", run, *flags, seconds=1200)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((run / "run.json").read_text())["held_out"][when] for when in ("before", "after"))
    # On five seeds 0.98 to 1.19 standard deviations in 18 steps (docs/results.md), where the score ends at 2.1.
    assert after["score"] >= before["score"] + 0.75 * before["score_std"]
    assert after["score"] > 1.6
    assert after["kl"] < 10
    last = read_jsonl(run / "samples.jsonl")[-12:]
    assert sum(FORMAT.fullmatch(sample["completion"]) is not None for sample in last) >= 11


# Bad input: one clear message, before anything slow is loaded and before anything is written.

PROMPT = {"prompt": "a"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RATING = {"prompt": "a", "response": "b", "score": 1}
BAD = {
    "nothing that rewards": (PROMPT, [], r"nothing rewards the completions: the rows \(prompt\) have no gold answers"),
    "scores without a reward model": (RATING, [], "make reward MODEL=tiny DATA=data.jsonl\n.*STAGES=reward,ppo"),
    "pairs without a reward model": (PAIR, [], r"\(preference\) have no gold answers. Train a reward model on these"),
    "no reward at all": (PROMPT, ["--rewards"], "give --reward-model or --rewards"),
    "no reward model": (PROMPT, ["--reward-model", "nowhere"], "has no adapter with a head.json"),
    "a critic from nothing": (PROMPT, ["--critic-init", "reward"], "--critic-init reward needs --reward-model"),
    "a batch that does not fit": (PROMPT, [*SMALL, "--rollout-batch-size", 9], "must be a multiple of"),
    "an unknown reward function": (PROMPT, ["--rewards", "formt"], "did you mean format?"),
    "a reward function without its column": (PROMPT, ["--rewards", "math"], "math: needs the column answer"),
    "a reward function that breaks": (PROMPT, ["--rewards", "mine.py:broken"], "mine.py:2: broken raised ZeroDivision"),
    "nothing to choose from": (PROMPT, ["--temperature", 0], "must be above 0"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, monkeypatch, fault):
    row, flags, message = BAD[fault]
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text("def broken(completions):\n    return [1 / 0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--data", "data.jsonl", *map(str, flags)])
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr(ppo, "Stop", lambda time_limit: None)  # no signal handlers in the process of the tests
    with pytest.raises(ppo.InputError, match=f"(?s){message}"):
        ppo.main()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.jsonl", "mine.py"]


def test_data_with_scores_is_read_for_its_prompts_where_something_else_rewards(tmp_path, monkeypatch):
    """It gets as far as planning the run."""
    (tmp_path / "data.jsonl").write_text(json.dumps(RATING) + "\n", encoding="utf-8")
    planned = {}

    def plan_run(*_, arguments, inputs, **__):
        planned.update(arguments)

    monkeypatch.setattr("sys.argv", ["ppo.py", "--data", str(tmp_path / "data.jsonl"), "--rewards", "format"])
    monkeypatch.setattr(ppo, "plan_run", plan_run)
    monkeypatch.setattr(ppo, "Stop", lambda time_limit: None)
    ppo.main()
    assert planned["rewards"] == ("format",)
    assert planned["critic_init"] == "base"


def test_until_the_run_is_planned_nothing_imports_torch_or_transformers():
    """Unsloth has to be imported before them; a reward model among --rewards is loaded, and tried, after it."""
    script = "import sys, ppo; ppo.plan_run = lambda *_, **__: print({'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", f"{script}; ppo.main()", "--rewards", "model:tiny", "format"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "set()\n", done.stderr


def test_a_run_is_refused_where_the_reward_model_adapts_other_modules(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj", "up_proj"]}))
    assert ppo.target_modules(ppo.Args(), tmp_path) == ["q_proj", "up_proj"]
    assert ppo.target_modules(ppo.Args(), None) == list(ppo.ATTENTION)
    with pytest.raises(ppo.InputError, match="the reward model adapts q_proj up_proj"):
        ppo.target_modules(ppo.Args(lora_target_modules=("q_proj",)), tmp_path)


def test_two_ranks_compute_what_one_does_and_a_slow_loop(setting, tmp_path):
    """Scores, whitened advantages, losses and gradients, over the rows of both; the weights bit for bit on both."""
    parts, plain, _ = setting
    slow = slow_advantages(parts, plain)  # of all rows together, in 64 bit

    def work(rank: int, scores: list[float]) -> dict:
        torch.manual_seed(5 + rank)  # the order of minibatches is the first rank's
        parts.reward_functions = [Reward("given", 1.0, lambda completions, **_: scores[: len(completions)])]
        rollout, given, rewards, advantages = phases(parts)
        one_row = ppo.all_values(parts, rollout.take([3]))  # of which the second rank has none
        metrics = ppo.update(parts, rollout, rewards, advantages, policy_learns=True)
        weights = [*parts.policy.parameters, *parts.critic.parameters]
        fields = (given.total, advantages.advantages, advantages.returns, rewards.kl, one_row)
        return {"fields": fields, "metrics": metrics, "weights": [weight.detach() for weight in weights]}

    def task(rank: int, folder: Path) -> None:
        torch.save(work(rank, SCORES[2 * rank : 2 * rank + 2]), folder / f"{rank}.pt")

    in_two_ranks(task, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole = work(0, SCORES)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)
    assert first["fields"][0] == second["fields"][0] == SCORES
    for one, other, expected in zip(first["fields"][1:], second["fields"][1:], whole["fields"][1:], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    for one, other, expected in zip(first["weights"], second["weights"], whole["weights"], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)  # Adam enlarges what rounding changes
    assert_rows(first["fields"][1], [row[3] for row in slow], 1e-3)
    assert_rows(first["fields"][2], [row[4] for row in slow], 1e-3)


def test_two_ranks_take_the_step_of_one_with_the_sum_of_their_gradients(tmp_path):
    """Bit for bit the same on both, though they began apart, and one of them has no rows in the second step."""

    def task(rank: int, folder: Path) -> None:
        one = two_tensors(tmp_path, seed=rank)
        for losses in LOSSES_OF_RANKS:
            if losses[rank] is not None:
                one.backward(losses[rank](one.parameters))
            norm = one.step()
        torch.save([*one.parameters, norm], folder / f"{rank}.pt")

    in_two_ranks(task, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole = two_tensors(tmp_path, seed=0)
    for losses in LOSSES_OF_RANKS:
        for loss in losses:
            if loss is not None:
                whole.backward(loss(whole.parameters))
        norm = whole.step()
    for one, other, expected in zip(first, second, [*whole.parameters, norm], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-7)


LOSSES_OF_RANKS = (
    (lambda both: (both[0] ** 2).sum(), lambda both: (both[1] * 3).sum()),
    (lambda both: (both[0] * both[1].sum()).sum(), None),
)


def two_tensors(folder: Path, seed: int) -> Learner:
    torch.manual_seed(seed)
    settings = TrainingArguments(output_dir=str(folder), optim="adamw_torch", max_grad_norm=0.5, warmup_steps=0)
    return Learner([torch.nn.Parameter(torch.randn(size)) for size in ((3, 2), (4,))], settings, 0.1, 10)
