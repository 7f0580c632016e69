from types import SimpleNamespace

import bitsandbytes
import bitsandbytes.optim.optimizer as of_bitsandbytes
import pytest
import torch
from common.run.steps import queue_updates


@pytest.mark.parametrize("paged", [False, True])
def test_only_an_optimizer_with_paged_state_waits_for_the_gpu_after_each_matrix(paged, monkeypatch):
    waits = []
    monkeypatch.setattr(of_bitsandbytes, "sync_gpu", of_bitsandbytes.sync_gpu)  # as it was, after this test
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(True))
    for one in (not paged, paged):  # a run of the other kind came before, in this process
        queue_updates(bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(4))], is_paged=one))
    of_bitsandbytes.sync_gpu(SimpleNamespace(device=torch.device("cuda")))
    assert waits == [True] * paged


def test_other_optimizers_are_left_as_they_are():
    before = of_bitsandbytes.sync_gpu
    queue_updates(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))]))
    assert of_bitsandbytes.sync_gpu is before
