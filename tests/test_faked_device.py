"""The faked device keeps a device's rules, or what is tested on it would prove nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.faked_device import FakedDevice


def test_it_refuses_what_a_device_refuses(faked: FakedDevice) -> None:
    there, here = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    assert str(there.device) == "cuda:0"
    with pytest.raises(RuntimeError, match="found at least two devices"):
        there + here
    with pytest.raises(RuntimeError, match="found at least two devices"):
        torch.cat([there, here])
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        there.numpy()
    assert (there + 1).cpu().tolist() == (here + 1).tolist()
    there[1:, [0, 2]] = here[1:, :2] * 7
    assert there.cpu().sum() == 8 + 4 * 7


def test_memory_is_taken_and_given_back(faked: FakedDevice) -> None:
    faked.budget = 10_000
    rows = torch.zeros(1000, device="cuda")
    assert torch.cuda.mem_get_info() == (10_000 - 4096, 10_000)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(2000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        rows.double()
    view = rows[10:]
    del rows
    assert faked.used == 4096
    del view
    assert (faked.used, faked.most_used) == (0, 4096)


def test_launches_and_copies_are_counted_in_every_thread(faked: FakedDevice) -> None:
    def use(_: int) -> float:
        there = torch.arange(3.0).to("cuda", non_blocking=True)
        return float((there * 2).sum().cpu())

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(use, range(4))) == [6.0] * 4
    assert (faked.uploads, faked.downloads) == (4, 4)
    assert faked.launches["mul"] == faked.launches["sum"] == 4
    faked.reset()
    torch.empty(3, device="cuda")[1:].view(2, 1)
    assert not faked.launches
