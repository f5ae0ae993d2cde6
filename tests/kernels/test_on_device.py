"""Tests for CPU tensors mean the same for a device's: its kernels see what is there, and what they write comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparcomm.errors import SparcommError
from sparcomm.kernels import cpu
from sparcomm.layout import dealt, whole
from support.everything import everything
from support.kernels import data, same
from support.on_device import Held, OnDevice

MOVED: Any = OnDevice(cpu, "cpu")  # to memory of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_are_the_same(dtype: torch.dtype) -> None:
    here, there = (everything(k, dtype) for k in (cpu, MOVED))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_sums_go_on_writing_to_the_memory_they_were_given() -> None:
    layout, x, flags = dealt(100, 2), data("normal", 100, torch.float32), torch.zeros(1, dtype=torch.uint8)
    room = torch.full((102,), 7.0)
    work = MOVED.compensate(x, None, room[1:101], layout, 5, flags)
    assert isinstance(work, Held)
    assert same(work.out, x)
    assert room[[0, 101]].tolist() == [7, 7]
    index, value = MOVED.select(work, 1, 5)
    MOVED.deduct(work, 1, value)
    MOVED.settle(work, 1, index)
    assert not work.out[layout.to_global(index, 1)].any()
    assert same(work.out, room[1:101])
    MOVED.merge(work, 0, index, torch.full((5,), float("inf")))
    assert flags.item()
    with pytest.raises(SparcommError, match="block=2"):
        MOVED.select(work, 2, 1)


def test_views_of_one_memory_stay_that() -> None:
    rows = torch.arange(12, dtype=torch.int32).view(3, 4)
    MOVED.unite(rows, rows[1])
    assert rows.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [8, 9, 10, 11]]
    x = torch.zeros(10)
    MOVED.scatter(x[2:7], torch.tensor([0, 4]), torch.ones(2), whole(5), 0)
    assert x.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
