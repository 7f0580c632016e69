"""What every recipe keeps to, so that who knows one knows all: names, order, and declarations that are the same."""

import ast
import dataclasses
import functools
import subprocess
import sys
import typing
from pathlib import Path

import in_process
import pytest
from common.data.feedback import LABELLED_OR_RATED
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, PROMPT_FORMATS, RATING_FORMATS, SFT_FORMATS
from conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
# Arguments that no library has: ours, with the same name and meaning in every recipe.
OURS = {
    "model", "data", "format", "columns", "max_truncated", "eval_ratio", "sample_prompts", "sample_tokens",
    "system_prompt", "max_prompt_length", "rewards", "difficulty", "difficulty_by", "difficulty_prompts", "refill",
    "stand_alone", "eval_data", "reward_model", "reward_weight", "normalize_scores", "score_clip", "kl_horizon",
    "rollout_batch_size", "max_approx_kl", "critic_learning_rate", "critic_init", "critic_warmup_steps",
    "time_limit", "stop_on_fault", "rollouts", "rollout_correction", "threshold", "share_prompts", "train_embeddings",
    "fit", "sharded", "skip_bad_steps", "oom", "load_pickle",
    "checkpoint_skip_layers",  # of Unsloth's get_peft_model, which has it on a GPU only
    "load_in_fp8",  # of Unsloth's from_pretrained
    "embedding_learning_rate",  # of Unsloth's UnslothTrainingArguments
    # Of PPO, as TRL's PPOConfig had them; TRL 1.15 has no PPO.
    "cliprange", "cliprange_value", "gamma", "lam", "kl_coef", "kl_estimator", "kl_target", "missing_eos_penalty",
    "num_ppo_epochs",
}  # fmt: skip
LEADING = ["model", "data", "output_dir"]
# Arguments with one type, one default and one help text in every recipe that has them, in this order.
SAME = [
    "load_pickle", "trust_remote_code",
    "chat_template_path", "pad_token", "load_in_4bit", "load_in_fp8", "dtype", "lora_r", "lora_alpha", "lora_dropout",
    "gradient_accumulation_steps", "max_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
    "gradient_checkpointing", "checkpoint_skip_layers", "fit", "seed", "full_determinism", "save_steps",
    "save_total_limit", "skip_bad_steps", "oom", "time_limit", "stop_on_fault", "report_to",
]  # fmt: skip
FORMATS_OF = {
    "sft": SFT_FORMATS,
    "dpo": PAIR_FORMATS,
    "kto": LABELLED_OR_RATED,
    "grpo": PROBLEM_FORMATS,
    "ppo": PROMPT_FORMATS,
    "reward": {**PAIR_FORMATS, **RATING_FORMATS},
    "test-rewards": PROBLEM_FORMATS,
}
# Statements and expressions of every main.
EVERYWHERE = [
    "stop = Stop(args.time_limit)",
    "source = find_source(args.data)",
    "identify(base, args.chat_template_path)",
    "if run is None:\n    return",
    "console = loading(base.name, data.notes)",
    "import unsloth",
    "base = fetch(base)",
    "load_chat_tokenizer(base, args.chat_template_path, args.pad_token)",
    "on_gpu = torch.cuda.is_available()",
    "dtype = choose_dtype(args.dtype)",
    "checkpointing = 'unsloth' if args.gradient_checkpointing else False",
    "run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())",
    "os.environ['TENSORBOARD_LOGGING_DIR'] = str(run.folder / 'tensorboard')",
    "newest_checkpoint(run)",
    "tokenizer.save_pretrained(part)",
    "show_ending(console, run, saved)",
]
# Calls whose keywords have the same values wherever two recipes give them, but for some.
ALIKE = {
    "plan_run": {"inputs"},
    "from_pretrained": {"max_seq_length", "load_in_4bit"},
    "get_peft_model": {"lora_dropout", "target_modules"},
    "SFTConfig DPOConfig KTOConfig GRPOConfig TrainingArguments": {"loss_type"},
    "Trainer RewardTrainer": {"train_dataset", "callbacks", "args", "data_collator"},
    "CheckpointCallback": set(),
}
LONGEST_MAIN, LONGEST_MODULE = 190, 300


@functools.cache
def tree(recipe: Path) -> ast.Module:
    return ast.parse(recipe.read_text(encoding="utf-8"))


def main_of(recipe: Path) -> ast.FunctionDef:
    (main,) = (node for node in tree(recipe).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return main


def declared(recipe: Path) -> dict[str, tuple[str, str, str]]:
    """The arguments of a recipe: type, default and help of each, by name and in order."""
    (args,) = (node for node in tree(recipe).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found = {}
    for node, following in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else ""
            found[node.target.id] = (ast.unparse(node.annotation), ast.unparse(node.value), text)
    return found


def calls(recipe: Path, names: str) -> list[ast.Call]:
    """The calls in main of a function or method of one of these names."""
    found = [node for node in ast.walk(main_of(recipe)) if isinstance(node, ast.Call)]
    return [node for node in found if ast.unparse(node.func).split(".")[-1] in names.split()]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.stem)
def recipe(request):
    return request.param, in_process.command(request.param)


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} == {"sft", "dpo", "kto", "grpo", "ppo", "reward"}


def test_the_arguments_are_a_frozen_dataclass_that_begins_with_model_data_and_output(recipe):
    _, module = recipe
    names = [field.name for field in dataclasses.fields(module.Args)]
    assert names[: len(LEADING)] == LEADING
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Args().seed = 1
    assert module.Args().model == "tiny"
    assert module.Args().seed == 42


def test_a_policy_and_its_reference_policy_round_alike(recipe):
    """Both are compiled by layers where TRL switches between them: `set_variables` has torch round as without."""
    path, _ = recipe
    (set_variables,) = calls(path, "set_variables")
    given = [ast.unparse(one) for one in set_variables.keywords]
    assert bool(calls(path, "switch_quickly")) == ("reference=True" in given)


@pytest.mark.parametrize("command", FORMATS_OF)
def test_the_formats_to_choose_from_are_those_that_are_read(command):
    """Written out, so that they are known without an import; and all that there are."""
    module = in_process.command(next(ROOT.glob(f"*/{command}.py")))
    assert set(typing.get_args(typing.get_type_hints(module.Args)["format"])) == {"auto", *FORMATS_OF[command]}


def test_every_argument_has_the_name_that_its_library_gives_it(recipe):
    from peft import LoraConfig
    from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, SFTConfig

    configs = (SFTConfig, DPOConfig, KTOConfig, GRPOConfig, ModelConfig)
    known = OURS | {field.name for config in configs for field in dataclasses.fields(config)}
    known |= {f"lora_{field.name}" for field in dataclasses.fields(LoraConfig)}
    _, module = recipe
    assert {field.name for field in dataclasses.fields(module.Args)} <= known


def test_the_docstring_says_what_it_does_how_to_run_it_and_what_it_leaves_out(recipe):
    path, module = recipe
    assert f"make {path.stem}" in module.__doc__
    assert "\n\nLeft out: " in module.__doc__


def test_nothing_slow_is_imported_before_the_data_is_checked():
    """Neither by a recipe nor by what it imports from common; in one process, so by the first that is named."""
    slow = ("torch", "transformers", "trl", "unsloth", "peft", "datasets", "huggingface_hub")
    code = f"""
import runpy, sys
for recipe in sys.argv[1:]:
    runpy.run_path(recipe)
    print(recipe, *[name for name in {slow} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *RECIPES], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(recipe) for recipe in RECIPES]), done.stderr


def test_unsloth_is_imported_before_what_it_patches(recipe):
    path, _ = recipe
    imports = [node for node in main_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert ast.unparse(imports[0]) == "import unsloth"


@pytest.mark.parametrize("name", SAME)
def test_an_argument_that_recipes_share_is_declared_alike(name):
    declarations = {recipe.stem: declared(recipe).get(name) for recipe in RECIPES}
    found = {recipe: declaration for recipe, declaration in declarations.items() if declaration}
    assert len(found) > 1
    assert len(set(found.values())) == 1, found


def test_the_arguments_that_recipes_share_come_in_one_order(recipe):
    path, _ = recipe
    own = [name for name in declared(path) if name in SAME]
    assert own == [name for name in SAME if name in own]


def test_main_begins_with_the_arguments_and_the_signals(recipe):
    path, _ = recipe
    first, second = main_of(path).body[:2]
    assert ast.unparse(first) == f"args, base, origins = parse(Args, '{path.stem}', __doc__)"
    assert ast.unparse(second) == "stop = Stop(args.time_limit)"  # a signal that comes before it is lost


@pytest.mark.parametrize("code", EVERYWHERE)
def test_what_every_main_holds(recipe, code):
    path, _ = recipe
    assert ast.unparse(ast.parse(code)) in {ast.unparse(node) for node in ast.walk(main_of(path))}


@pytest.mark.parametrize("names", ALIKE)
def test_calls_that_recipes_share_have_the_same_values(names):
    values: dict[str, dict[str, str]] = {}
    for recipe in RECIPES:
        for call in calls(recipe, names):
            for keyword in call.keywords:
                if keyword.arg and keyword.arg not in ALIKE[names]:
                    values.setdefault(keyword.arg, {})[recipe.stem] = ast.unparse(keyword.value)
    differing = {name: found for name, found in values.items() if len(set(found.values())) > 1}
    assert differing == {}
    shared = [name for name, found in values.items() if len(found) > 1]
    assert shared or names == "CheckpointCallback"


def test_every_argument_is_read(recipe):
    """An argument that the recipe never reads would be ignored in silence."""
    path, module = recipe
    read = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    read |= {"model", "load_pickle", "trust_remote_code"}  # by cli.parse, for every recipe
    read |= {"skip_bad_steps", "oom", "full_determinism"}  # by BadSteps and Run, from the run's record
    assert {field.name for field in dataclasses.fields(module.Args)} <= read


def test_main_is_read_in_one_sitting(recipe):
    path, _ = recipe
    main = main_of(path)
    assert main.end_lineno - main.lineno + 1 <= LONGEST_MAIN


def test_common_is_a_leaf():
    """recipes/common imports no recipe and no script, and each module is read in one sitting."""
    for module in (ROOT / "recipes" / "common").rglob("*.py"):
        assert len(module.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE, module
        names = {
            node.module or "" for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert not names & {recipe.stem for recipe in RECIPES}, module
