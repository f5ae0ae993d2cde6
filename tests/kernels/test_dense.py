"""Loops over n: compensate, histogram, select."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.errors import SparcommError
from sparcomm.layout import Layout, contiguous, dealt, whole
from support.kernels import (
    GRADIENTS,
    IMPLEMENTATIONS,
    KINDS,
    SIZES,
    WORKING,
    blank,
    block_of,
    data,
    layouts,
    magnitudes,
    same,
    top,
)


def counted(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The histogram by definition: positions of each block, without padding."""
    rows = torch.zeros(layout.blocks, wire.BINS, dtype=torch.int64)
    bins = magnitudes(x) >> (52 if x.dtype == torch.float64 else 20)
    for b in range(layout.blocks):
        where = layout.to_global(torch.arange(layout.length), b)
        where = where[where < layout.numel]
        rows[b] = torch.from_numpy(np.bincount(bins[where.numpy()].astype(np.int64), minlength=wire.BINS))
    return rows


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_compensate_sums_and_counts_in_one_go(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    grad, working = data(kind, n, dtype), working_dtype(dtype)
    for layout in layouts(n):
        for residual in (None, data("spread", n, working, seed=1)):
            out = torch.full((n,), float("nan"), dtype=working)
            stats, flags = blank(layout)
            before = grad.clone()
            kernels.compensate(grad, residual, out, stats, layout, flags)
            expected = grad.to(working) if residual is None else grad.to(working) + residual
            assert same(out, expected)
            assert same(grad, before)
            assert torch.equal(stats, counted(out, layout))
            assert flags.item() == (0 if expected.isfinite().all() else wire.NONFINITE)


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("kind", KINDS)
def test_histogram_counts_without_changing_anything(kernels: Any, dtype: torch.dtype, kind: str) -> None:
    x = data(kind, 5000, dtype)
    before = x.clone()
    for layout in layouts(5000):
        stats, flags = blank(layout)
        flags |= wire.DAMAGED
        kernels.histogram(x, stats, layout, flags)
        assert same(x, before)
        assert torch.equal(stats, counted(x, layout))
        assert flags.item() == wire.DAMAGED | (0 if x.isfinite().all() else wire.NONFINITE)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_one_nonfinite_element_anywhere_is_flagged(kernels: Any, dtype: torch.dtype, bad: float) -> None:
    n, layout = 70, dealt(70, 3)
    for at in (0, 33, 69):
        grad = torch.ones(n, dtype=dtype)
        grad[at] = bad
        stats, flags = blank(layout)
        kernels.compensate(grad, None, torch.empty(n, dtype=working_dtype(dtype)), stats, layout, flags)
        assert flags.item() == wire.NONFINITE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_gradient_is_widened_exactly(kernels: Any, dtype: torch.dtype) -> None:
    grad = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    layout = whole(grad.numel())
    stats, flags = blank(layout)
    out = torch.empty(grad.numel())
    kernels.compensate(grad, None, out, stats, layout, flags)
    assert same(out, grad.to(torch.float32))


def test_unaligned_views_are_counted_right(kernels: Any) -> None:
    x = data("normal", 1001, torch.float32)[1:]  # 4-byte aligned only
    layout = dealt(1000, 3)
    stats, flags = blank(layout)
    kernels.histogram(x, stats, layout, flags)
    assert torch.equal(stats, counted(x.clone(), layout))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WORKING)
def test_select_finds_exactly_the_largest(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    x = data(kind, n, dtype)
    for layout in layouts(n):
        stats, flags = blank(layout)
        kernels.histogram(x, stats, layout, flags)
        length = layout.length
        for b in sorted({0, layout.blocks // 2, layout.blocks - 1}):
            values = block_of(x, layout, b)
            for k in sorted({0, min(1, length), length // 100, length // 2, max(0, length - 1), length}):
                assert kernels.select(x, k, stats, layout, b).tolist() == top(values, k)


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_select_settles_values_that_differ_in_the_last_bit(kernels: Any, dtype: torch.dtype, share: float) -> None:
    n, layout = 20_000, dealt(20_000, 2)
    step = torch.finfo(dtype).eps
    rng = torch.Generator().manual_seed(3)
    x = 1 + step * torch.randint(0, 9, (n,), generator=rng).to(dtype)  # one bin, nine values
    x[torch.rand(n, generator=rng) < share] = 0
    stats, flags = blank(layout)
    kernels.histogram(x, stats, layout, flags)
    for b in range(2):
        values = block_of(x, layout, b)
        for k in (1, 100, 4000, 9000):
            assert kernels.select(x, k, stats, layout, b).tolist() == top(values, k)


def test_select_refuses_what_cannot_be_selected(kernels: Any) -> None:
    x, layout = data("normal", 100, torch.float32), whole(100)
    stats, flags = blank(layout)
    kernels.histogram(x, stats, layout, flags)
    for k in (-1, 101):
        with pytest.raises(SparcommError, match=f"k={k} must be in"):
            kernels.select(x, k, stats, layout, 0)


def test_magnitudes_keep_their_order_across_all_exponents(kernels: Any) -> None:
    x = torch.logspace(-44, 38, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(5))]
    for layout in (whole(3000), contiguous(3000, 7)):
        stats, flags = blank(layout)
        kernels.histogram(x, stats, layout, flags)
        for k in (1, 10, 400):
            assert kernels.select(x, k, stats, layout, 0).tolist() == top(block_of(x, layout, 0), k)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(bits=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=200), blocks=st.integers(1, 5), data=st.data())
@settings(max_examples=100)
def test_select_among_arbitrary_bits(name: str, bits: list[int], blocks: int, data: st.DataObject) -> None:
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    layout = dealt(x.numel(), blocks)
    stats, flags = blank(layout)
    IMPLEMENTATIONS[name].histogram(x, stats, layout, flags)
    k = data.draw(st.integers(0, layout.length))
    for b in range(blocks):
        where = layout.to_global(torch.arange(layout.length), b).tolist()
        values = torch.tensor([bits[j] if j < len(bits) else 0 for j in where], dtype=torch.int32).view(torch.float32)
        assert IMPLEMENTATIONS[name].select(x, k, stats, layout, b).tolist() == top(values, k)
