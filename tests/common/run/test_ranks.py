"""What the processes of a run exchange: by real ones, two of them, over gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common.errors import MachineError
from common.run import ranks, screen
from conftest import ROOT, in_two_ranks


def exchange(rank: int, folder: Path) -> None:
    """Everything that ranks exchange; the first rank is the slower one."""
    tensor = torch.tensor([rank + 1.0, 10.0])
    with ranks.first_of_machine_alone():
        (folder / f"in-{rank}").touch()
        time.sleep(0.2 if rank == 0 else 0)
        alone = [(folder / f"in-{one}").exists() for one in (0, 1)]
    seen = {
        "all": ranks.gather_objects({"rank": rank}),
        "first": ranks.of_first(f"rank {rank}"),
        "sum": ranks.sum_over_ranks(tensor).tolist(),
        "own": tensor.tolist(),
        "alone": alone,
    }
    time.sleep(0 if rank else 0.3)
    (folder / f"before-{rank}").touch()
    ranks.barrier()
    seen["after"] = [(folder / f"before-{one}").exists() for one in (0, 1)]
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def stay_away(rank: int, folder: Path) -> None:
    """The second rank never comes to the barrier; the first one waits a second."""
    ranks.join()
    if rank == 0:
        with pytest.raises(MachineError, match=r"^Rank 0 of 2, on \S+, waited at the end of step 3 for rank 1: it "):
            ranks.barrier("the end of step 3")
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)


def test_ranks_exchange_values_in_their_order(tmp_path):
    in_two_ranks(exchange, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "all": [{"rank": 0}, {"rank": 1}],
            "first": "rank 0",
            "sum": [3.0, 20.0],
            "own": [rank + 1.0, 10.0],
            "alone": [True, rank == 1],
            "after": [True, True],
        }


def hang(rank: int, folder: Path) -> None:
    """The second rank hangs in the step after step 6, while the first one waits for it among tensors."""
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    ranks.reached(6)
    if rank == 0:
        ranks.reached(7)
        with pytest.raises(RuntimeError) as failed:
            ranks.sum_over_ranks(torch.ones(1))
        assert ranks.peer_lost(failed.value), failed.value
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_before_the_wait_ends(tmp_path):
    in_two_ranks(hang, tmp_path, RANKS_TIMEOUT="1.6")
    line = (tmp_path / "0.txt").read_text().splitlines()[0]
    assert line.startswith(
        "Rank 0 of 2 has been in the step after step 7 for 1 s, and ends after 2 s (RANKS_TIMEOUT): "
    )
    assert line.endswith("after step 6.")
    assert "rank 1 on " in line


def test_a_rank_that_does_not_come_is_named(tmp_path):
    in_two_ranks(stay_away, tmp_path, RANKS_TIMEOUT="1")


def test_a_rank_has_its_own_gpu_before_anything_uses_one(monkeypatch):
    queued, chosen = [], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_queued_calls", queued)  # what torch does as soon as CUDA is used
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    screen.loading("a model")  # Unsloth is imported after this
    assert not chosen  # Unsloth first sets what the allocator reads
    for call, _ in queued:
        call()
    assert chosen == [3]


def test_one_process_needs_no_group_and_no_torch():
    code = (
        "import sys; from common.run import ranks\n"
        "ranks.join(); ranks.barrier()\n"
        "with ranks.first_of_machine_alone(): pass\n"
        "assert (ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.is_first()) == (0, 1, 0, True)\n"
        "value = [1]\n"
        "assert ranks.gather_objects(value) == [value] and ranks.of_first(value) is value\n"
        "assert ranks.sum_over_ranks(value) is value\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "recipes")})


def test_the_shares_of_all_ranks_are_the_items_in_their_order():
    for length in range(9):
        for size in (1, 2, 3, 8):
            shares = [ranks.share(range(length), rank, size) for rank in range(size)]
            assert [item for one in shares for item in one] == list(range(length))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ranks.share("abcde", 0, 2) == ["a", "b", "c"]
