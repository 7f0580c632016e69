"""What every recipe keeps to, so that who knows one knows all: names, order, defaults that come from one place."""

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
# Arguments that no library has: ours, with the same name and meaning in every recipe.
OURS = {
    "model", "data", "format", "columns", "max_truncated", "eval_ratio", "sample_prompts", "sample_tokens",
    "system_prompt", "max_prompt_length", "rewards", "difficulty", "difficulty_by", "difficulty_prompts", "refill",
    "stand_alone", "eval_data", "reward_model", "reward_weight", "normalize_scores", "score_clip", "kl_horizon",
    "rollout_batch_size", "max_approx_kl", "critic_learning_rate", "critic_init", "critic_warmup_steps",
    "time_limit",
    # Of PPO, as TRL's PPOConfig had them; TRL 1.15 has no PPO.
    "cliprange", "cliprange_value", "gamma", "lam", "kl_coef", "kl_estimator", "kl_target", "missing_eos_penalty",
    "num_ppo_epochs",
}  # fmt: skip
LEADING = ["model", "data", "output_dir"]


def load(recipe: Path):
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.stem)
def recipe(request):
    return request.param, load(request.param)


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} == {"sft", "dpo", "grpo", "ppo", "reward"}


def test_the_arguments_are_a_frozen_dataclass_that_begins_with_model_data_and_output(recipe):
    _, module = recipe
    names = [field.name for field in dataclasses.fields(module.Args)]
    assert names[: len(LEADING)] == LEADING
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Args().seed = 1
    assert module.Args().model == "tiny"
    assert module.Args().seed == 42


def test_every_argument_has_the_name_that_its_library_gives_it(recipe):
    from peft import LoraConfig
    from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig

    configs = (SFTConfig, DPOConfig, GRPOConfig, ModelConfig)
    known = OURS | {field.name for config in configs for field in dataclasses.fields(config)}
    known |= {f"lora_{field.name}" for field in dataclasses.fields(LoraConfig)}
    _, module = recipe
    assert {field.name for field in dataclasses.fields(module.Args)} <= known


def test_the_docstring_says_what_it_does_how_to_run_it_and_what_it_leaves_out(recipe):
    path, module = recipe
    assert f"make {path.stem}" in module.__doc__
    assert "Left out:" in module.__doc__


def test_nothing_slow_is_imported_before_the_data_is_checked(recipe):
    path, _ = recipe
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in top} & {"torch", "transformers", "trl", "unsloth", "peft", "datasets"}


def test_checkpoints_and_stopping_are_asked_for_alike_and_acted_on(recipe):
    path, _ = recipe
    text = path.read_text(encoding="utf-8")
    alike = text.partition("    save_steps: ")[2].partition("    report_to: ")[0]
    sft = (ROOT / "recipes" / "sft.py").read_text(encoding="utf-8")
    assert alike == sft.partition("    save_steps: ")[2].partition("    report_to: ")[0]
    assert "time_limit: str | None = None" in alike
    first, second = text.partition("def main() -> None:\n")[2].splitlines()[:2]
    assert first.startswith("    args, base, origins = parse(")
    assert second == "    stop = Stop(args.time_limit)"  # what comes before is not heard
    assert "CheckpointCallback(run, stop, args.save_total_limit" in text


def test_every_argument_is_read(recipe):
    """An argument that the recipe never reads would be ignored in silence."""
    path, module = recipe
    tree = ast.parse(path.read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {"model"}  # by cli.parse, for every recipe
    assert {field.name for field in dataclasses.fields(module.Args)} <= read


def test_common_is_a_leaf():
    """recipes/common imports no recipe and no script, and stays small enough to read in one sitting."""
    for module in (ROOT / "recipes" / "common").rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, module
        names = {
            node.module or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert not names & {recipe.stem for recipe in RECIPES}, module
