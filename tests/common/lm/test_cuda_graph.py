"""Which streams CUDA graphs are recorded on; what they compute is tested on a GPU, in tests/system/test_gpu.py."""

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from common.lm import cuda_graph


class Owner:
    """Whoever records graphs."""


@pytest.fixture
def streams(monkeypatch):
    """Three streams that come again and again, as torch's 32 do."""
    again = cycle([SimpleNamespace(cuda_stream=number) for number in range(3)])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: next(again))
    monkeypatch.setattr(cuda_graph, "STREAMS", 3)
    monkeypatch.setattr(cuda_graph, "IN_USE", set())


def test_no_two_owners_of_graphs_that_live_share_a_stream(streams):
    kept, other = Owner(), Owner()
    assert cuda_graph.own_stream(kept).cuda_stream == 0
    assert cuda_graph.own_stream(other).cuda_stream == 1
    for _ in range(5):  # each ends before the next comes
        assert cuda_graph.own_stream(Owner()).cuda_stream == 2
    third = Owner()
    assert cuda_graph.own_stream(third).cuda_stream == 2
    with pytest.raises(RuntimeError, match="3 owners of CUDA graphs have taken every stream"):
        cuda_graph.own_stream(Owner())
    del other
    assert cuda_graph.own_stream(Owner()).cuda_stream == 1


def test_work_for_which_no_stream_is_left_runs_and_says_so_once(streams, monkeypatch, capsys):
    owners = [Owner() for _ in range(3)]
    for owner in owners:
        cuda_graph.own_stream(owner)
    monkeypatch.setattr(torch.cuda, "MemPool", Owner)
    recorded = cuda_graph.Recorded(torch.nn.Identity(), lambda x: (2 * x,), "Doubling")
    for _ in range(3):
        assert recorded(torch.ones(2))[0].tolist() == [2, 2]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("Doubling cannot be recorded, so it is slower: 3 owners of CUDA graphs have taken every")
    monkeypatch.setenv("RANK", "1")
    cuda_graph.say_not_recorded("Doubling", RuntimeError("no room\nand more"))
    assert capsys.readouterr().err == "Rank 1: Doubling cannot be recorded, so it is slower: no room\n"
