"""Every combination of --rollouts, --rollout-correction and --importance-sampling-level has an answer."""

import pytest
from common.errors import InputError, MachineError
from common.lm.rollout import backends
from common.lm.rollout.backends import check_sampling, corrects

REFUSED = "refused"
GIVES = {"graph": True, "vllm": True, "generate": False}  # log-probabilities
# rollouts, the backends that it can end up with
ENDS = {"auto": ["graph", "vllm", "generate"], "graph": ["graph"], "vllm": ["vllm"], "generate": ["generate"]}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["off", "token"])
@pytest.mark.parametrize(("rollouts", "backend"), [(one, end) for one, ends in ENDS.items() for end in ends])
def test_losses_are_weighted_only_by_what_the_backend_gives(monkeypatch, rollouts, backend, correction, level):
    monkeypatch.setattr(backends, "has_vllm", lambda: True)
    try:
        check_sampling(rollouts, correction, level)
        found = corrects(correction, backend)
    except InputError:
        found = REFUSED
    possible = GIVES[backend] and level == "token"
    assert found is {"off": False, "token": True if possible else REFUSED}[correction]


def test_what_refuses_a_fallback_names_the_way_out():
    check_sampling("auto", "token")
    with pytest.raises(InputError, match=r"had to take transformers' generate.*give --rollout-correction=off"):
        corrects("token", "generate")


def test_vllm_by_name_where_it_is_not_installed_names_the_variant(monkeypatch):
    monkeypatch.setattr(backends, "has_vllm", lambda: False)
    with pytest.raises(MachineError, match="make setup VARIANT=cuda-vllm"):
        check_sampling("vllm")
    for other in ("auto", "graph", "generate"):
        check_sampling(other)


@pytest.mark.parametrize("installed", [True, False])
def test_vllm_is_refused_on_several_ranks_whether_it_is_installed_or_not(monkeypatch, installed):
    monkeypatch.setattr(backends, "has_vllm", lambda: installed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="samples in one process, and this run has 2: give --rollouts=graph"):
        check_sampling("vllm")
    check_sampling("auto")
