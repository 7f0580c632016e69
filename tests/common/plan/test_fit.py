"""`--fit auto`, and the settings that are named where a GPU's memory is full."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from common.errors import InputError, MachineError
from common.lm.cards import read_card
from common.lm.hub import find_model
from common.plan import fit as fitting
from common.plan import search
from common.plan.memory import Memory
from common.plan.search import BATCH, MARGIN, device_with, measure
from common.plan.shape import sizes_in
from common.plan.workload import COUNTED, METHODS, settings, workload
from conftest import ROOT


def chosen(gib: float, method: str = "sft", typed: set[str] | None = None, **given):
    card = read_card("qwen2.5-7b")
    return fitting.choose(card, method, settings(card, method, given), typed or set(), device_with(gib))


def test_room_gives_16_bit_without_recomputation_and_none_gives_nf4_with_it():
    assert chosen(130).changed == {"load_in_4bit": False, "gradient_checkpointing": False}
    small = chosen(7.5)
    assert small.work.precision == "nf4"
    assert small.work.gradient_checkpointing
    assert small.work.rows * small.work.accumulation == 16


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_not_learned_changes(method):
    for gib in (12, 24, 48, 130):
        allowed = {"load_in_4bit", "gradient_checkpointing", "checkpoint_skip_layers", "per_device_train_batch_size"}
        assert set(chosen(gib, method).changed) <= allowed | {"gradient_accumulation_steps"}


def test_what_the_user_typed_stays():
    assert chosen(130, typed={"load_in_4bit"}).changed == {"gradient_checkpointing": False}
    assert "per_device_train_batch_size" not in chosen(24, typed={"per_device_train_batch_size"}).changed


def test_where_nothing_fits_the_message_says_what_would():
    with pytest.raises(MachineError, match=r"fits into 7\.3 GiB: --max-length 1024.* would need 6\."):
        chosen(7.3)
    with pytest.raises(MachineError, match="take a larger GPU or a smaller model"):
        chosen(3)


def test_the_line_has_the_choice_and_its_reason():
    card = read_card("qwen2.5-7b")
    given, device = settings(card, "sft"), device_with(130)
    found = fitting.choose(card, "sft", given, set(), device)
    line = fitting.why(card, "sft", given, found, device)
    assert line.startswith("--fit=auto: 16 bit, nothing recomputed, 4 x 4 rows: ")
    assert "times as fast as nf4" in line
    assert "\n" not in line
    tight = fitting.why(card, "sft", given, chosen(7.5), device_with(7.5))
    assert "as it was, nf4, activations recomputed, 4 x 4 rows, it takes" in tight


def test_a_model_without_a_card_is_planned_from_its_config():
    card = read_card("qwen2.5-7b")
    shape = card.architecture
    config = {
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "vocab_size": shape.vocab_size,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": False,
    }  # fmt: skip
    found = sizes_in(config)
    assert vars(found.architecture) == shape.model_dump()
    assert found.parameters == pytest.approx(card.parameters, rel=0.001)
    assert sizes_in({"text_config": config, "tie_word_embeddings": False}).parameters == found.parameters
    for unknown in ({"model_type": "t5"}, {"text_config": None}, {**config, "num_attention_heads": None}):
        assert sizes_in(unknown) is None


FULL = """
import sys, types
sys.path.insert(0, "recipes")
import sft
from common.cli import parse
from common.errors import run_command
GIB = 2**30
class OutOfMemoryError(RuntimeError): pass
def main():
    parse(sft.Args, "sft", "")
    sys.modules["torch"] = torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(
        current_device=lambda: 0, get_per_process_memory_fraction=lambda: 1.0, memory_reserved=lambda: 15 * GIB,
        mem_get_info=lambda: (GIB, 16 * GIB),
        get_device_properties=lambda index: types.SimpleNamespace(total_memory=16 * GIB, name="Tesla T4"))
    raise OutOfMemoryError("CUDA out of memory.")
run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("spelling", "named"), [("make", "LOAD_IN_4BIT=yes"), ("", "--load-in-4bit")])
def test_a_full_gpu_names_settings_that_would_have_fit(spelling, named):
    """What a recipe prints after torch's error, in a process of its own where torch is a GPU of 16 GiB."""
    words = ["--model", "qwen2.5-7b", "--no-load-in-4bit", "--max-length", "512"]
    environment = {**os.environ, "RECIPES_SPELLING": spelling}
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "CUDA out of memory."
    assert "GiB, of 16.0 that this run could have" in lines[2]
    assert lines[3] == "These would have fit:"
    assert lines[4].startswith(f"  {named}")
    assert 1 <= len(lines[4:]) <= 3


def after_oom(method: str, monkeypatch, gib: float, **given) -> tuple[list[str], list[dict], object]:
    """What is printed where a GPU of that size was full: the first lines, the named settings, and the arguments."""
    recipe = importlib.import_module(method)
    args = dataclasses.replace(recipe.Args(), model="qwen2.5-7b", **given)
    monkeypatch.setattr(fitting, "this_gpu", lambda: device_with(gib))
    first, *lines = fitting.where_it_fits(find_model("qwen2.5-7b"), method, args).splitlines()
    named = []
    for line in lines[1:]:
        flags = re.findall(r"--(no-)?([a-z0-9-]+)(?: ([^ (-]\S*))?", line.rpartition("  (")[0])
        named.append({name.replace("-", "_"): not no if value == "" else value for no, name, value in flags})
    return [first, *lines[:1]], named, args


@pytest.mark.parametrize("method", METHODS)
def test_of_every_recipe_the_named_settings_are_its_own_and_fit_and_keep_the_batch(method, monkeypatch):
    card, device = read_card("qwen2.5-7b"), device_with(20)
    given = {"load_in_4bit": False, "gradient_checkpointing": False}
    head, named, args = after_oom(method, monkeypatch, 20, **given)
    assert re.fullmatch(r"The plan for these settings: [\d.]+ GiB, of 20.0 that this run could have\.", head[0])
    assert head[1] == "These would have fit:"
    assert 1 <= len(named) <= 3
    for one in named:
        values = {
            name: type(getattr(args, name))(value) if value not in (True, False) else value
            for name, value in one.items()
        }
        changed = dataclasses.replace(args, **values)  # each name is an argument of the recipe
        plan_of = {name: value for name, value in dataclasses.asdict(changed).items() if name in COUNTED}
        assert measure(card, workload(card, method, plan_of), device).total <= MARGIN * 20
        rows = [each.per_device_train_batch_size * each.gradient_accumulation_steps for each in (args, changed)]
        assert rows[0] == rows[1]
        if method == "grpo":
            importlib.import_module("grpo").check_groups(changed)


@pytest.mark.parametrize(
    ("method", "given"),
    [("dpo", {"loss_type": ("bco_pair",)}), ("grpo", {"loss_type": "bnpo"}), ("grpo", {"share_prompts": True})],
)
def test_a_smaller_micro_batch_is_not_named_where_it_learns_something_else(method, given, monkeypatch):
    for gib in (8, 12, 16, 24, 40):
        _, named, _ = after_oom(method, monkeypatch, gib, load_in_4bit=False, gradient_checkpointing=False, **given)
        assert [one for one in named if one.keys() & set(BATCH)] == []


def test_the_numbers_of_the_plan_decide_what_is_named(monkeypatch):
    """Planted: 16 bit needs 30 GiB and nf4 10, whatever the rest; so nf4 alone is what fits into 16."""

    def planted(card, work, gib):
        needed = 30.0 if work.precision == "16 bit" else 10.0
        return Memory(*(needed if field.name == "weights" else 0.0 for field in dataclasses.fields(Memory)))

    monkeypatch.setattr(search, "peak", planted)
    head, named, _ = after_oom("dpo", monkeypatch, 16, load_in_4bit=False)
    assert head[0].startswith("The plan for these settings: 30.0 GiB, of 16.0")
    assert named[0] == {"load_in_4bit": True}
    assert all(one.get("load_in_4bit") for one in named)
    head, _, _ = after_oom("dpo", monkeypatch, 40, load_in_4bit=False)  # the plan has it that it fits
    assert "Another program may have taken memory since; nvidia-smi shows it." in head[0]
    head, named, _ = after_oom("dpo", monkeypatch, 9, load_in_4bit=False)
    assert (head[1], named) == ("No settings for this model and method fit; take a larger GPU or a smaller model.", [])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"fit": "auto", "use_peft": False}, "--no-use-peft trains every weight"),
        ({"fit": "auto", "rollouts": "vllm"}, "does not count the memory of --rollouts=vllm"),
        ({"checkpoint_skip_layers": -1}, "give 0 or more"),
        ({"checkpoint_skip_layers": 2, "gradient_checkpointing": False}, "every layer keeps its activations"),
    ],
)
def test_what_a_plan_does_not_count_is_refused(arguments, why):
    given = {"fit": "off", "gradient_checkpointing": True, "checkpoint_skip_layers": 0, **arguments}
    with pytest.raises(InputError, match=why):
        fitting.check_fit(SimpleNamespace(**given))
    fitting.check_fit(SimpleNamespace(**{**given, "fit": "off", "checkpoint_skip_layers": 0}))


def test_fit_is_refused_beside_unsloths_own_variable(monkeypatch):
    given = SimpleNamespace(fit="auto", gradient_checkpointing=True, checkpoint_skip_layers=0)
    monkeypatch.setenv("UNSLOTH_GC_KEEP_LAYERS", "8")
    with pytest.raises(InputError, match="UNSLOTH_GC_KEEP_LAYERS=8"):
        fitting.check_fit(given)
    monkeypatch.setenv("UNSLOTH_GC_KEEP_LAYERS", "0")
    fitting.check_fit(given)
