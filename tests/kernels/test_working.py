"""A step's sums: compensate, merge, select, deduct, settle, against full vectors and a full sort."""

from __future__ import annotations

from typing import Any

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
    block_of,
    data,
    layouts,
    same,
    thinned,
    top,
)


def begin(
    kernels: Any, grad: torch.Tensor, layout: Layout, k: int, residual: torch.Tensor | None = None
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The sums, ``out`` and the flags."""
    out = torch.full(grad.shape, float("nan"), dtype=working_dtype(grad.dtype))
    flags = torch.zeros(1, dtype=torch.uint8)
    return kernels.compensate(grad, residual, out, layout, k, flags), out, flags


def check_select(kernels: Any, work: Any, x: torch.Tensor, block: int, k: int) -> None:
    values = block_of(x, work.layout, block)
    index, value = kernels.select(work, block, k)
    assert index.tolist() == top(values, k)
    assert same(value, values[index])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_compensate_adds_and_changes_nothing_else(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    grad, working = data(kind, n, dtype), working_dtype(dtype)
    for layout in layouts(n):
        for residual in (None, data("spread", n, working, seed=1)):
            before = grad.clone()
            _, out, flags = begin(kernels, grad, layout, max(1, layout.length // 50), residual)
            expected = grad.to(working) if residual is None else grad.to(working) + residual
            assert same(out, expected)
            assert same(grad, before)
            assert flags.item() == (0 if expected.isfinite().all() else wire.NONFINITE)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_one_nonfinite_element_anywhere_is_flagged(kernels: Any, dtype: torch.dtype, bad: float) -> None:
    for n, like in ((70, 1.0), (9000, 1.0), (9000, None)):  # of equals too many reach the floor to be listed
        for at in (0, 33, n - 1):
            grad = torch.full((n,), like, dtype=dtype) if like else data("normal", n, dtype)
            grad[at] = bad
            assert begin(kernels, grad, dealt(n, 3), 5)[2].item() == wire.NONFINITE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_gradient_is_widened_exactly(kernels: Any, dtype: torch.dtype) -> None:
    grad = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    assert same(begin(kernels, grad, whole(grad.numel()), 100)[1], grad.to(torch.float32))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WORKING)
def test_select_finds_exactly_the_largest(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    x = data(kind, n, dtype)
    cases = [
        (layout, k, hint)
        for layout in layouts(n)
        for k in sorted({0, min(1, layout.length), layout.length // 100, layout.length // 2,
                         max(0, layout.length - 1), layout.length})
        for hint in sorted({k, 1})
    ]  # fmt: skip
    for layout, k, hint in thinned(kernels, cases, 11, (dtype, kind, n)):
        work, _, _ = begin(kernels, x, layout, hint)
        for b in sorted({0, layout.blocks // 2, layout.blocks - 1}):
            check_select(kernels, work, x, b, k)


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_select_settles_values_that_differ_in_the_last_bit(kernels: Any, dtype: torch.dtype, share: float) -> None:
    n, layout = 20_000, dealt(20_000, 2)
    rng = torch.Generator().manual_seed(3)
    x = 1 + torch.finfo(dtype).eps * torch.randint(0, 9, (n,), generator=rng).to(dtype)  # nine values
    x[torch.rand(n, generator=rng) < share] = 0
    for k in (1, 100, 4000, 9000):
        work, _, _ = begin(kernels, x, layout, k)
        for b in range(2):
            check_select(kernels, work, x, b, k)


@pytest.mark.parametrize("hint", [0, 1, 100, 5000])
@pytest.mark.parametrize("kind", ["sparse", "magnitudes", "equal", "halves"])
def test_select_does_not_depend_on_the_hint(kernels: Any, kind: str, hint: int) -> None:
    n = 15_000  # blocks that are large enough to be sampled
    rng = torch.Generator().manual_seed(5)
    x = {
        "sparse": torch.where(torch.rand(n, generator=rng) < 0.004, torch.randn(n, generator=rng), 0.0),
        "magnitudes": torch.logspace(-44, 38, n)[torch.randperm(n, generator=rng)],
        "equal": torch.where(torch.rand(n, generator=rng) < 0.5, 2.0, -2.0),
        "halves": torch.cat([torch.randn(n // 2, generator=rng), 1e-6 * torch.randn(n - n // 2, generator=rng)]),
    }[kind]
    for layout in (whole(n), dealt(n, 3), contiguous(n, 4)):
        for k in (1, 40, 1000):
            work, _, _ = begin(kernels, x, layout, hint)
            check_select(kernels, work, x, layout.blocks - 1, k)


@pytest.mark.parametrize("n", [40, 12_000])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_what_was_large_may_be_cancelled_by_what_arrives(kernels: Any, n: int, share: float) -> None:
    layout, k = dealt(n, 2), n // 40
    x = data("normal", n, torch.float32)
    work, out, flags = begin(kernels, x, layout, k)
    sums = block_of(x, layout, 1)
    for _ in range(3):  # the largest of each time
        index = torch.tensor(top(sums, 4 * k))
        kernels.merge(work, 1, index, -share * sums[index])
        sums[index] += -share * sums[index]
    index, value = kernels.select(work, 1, k)
    assert index.tolist() == top(sums, k)
    assert same(value, sums[index])
    assert same(out, x), "sums are kept apart from out until they are settled"
    assert not flags


@st.composite
def bits_of_a_step(draw: st.DrawFn) -> tuple[list[int], int, int, list[tuple[list[int], int]]]:
    # A signalling NaN is left out: any addition makes it a quiet one, of another magnitude.
    word = st.integers(-(1 << 31), (1 << 31) - 1).filter(lambda w: not 0x7F800001 <= w & 0x7FFFFFFF <= 0x7FBFFFFF)
    bits = draw(st.lists(word, max_size=150))
    blocks, hint = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    arriving = st.tuples(st.lists(st.integers(0, 200), unique=True, max_size=30), st.integers(0, 4))
    return bits, blocks, hint, draw(st.lists(arriving, max_size=4))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(case=bits_of_a_step(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_step_among_arbitrary_bits(name: str, case: Any, data: st.DataObject) -> None:
    bits, blocks, hint, arriving = case
    kernels = IMPLEMENTATIONS[name]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    layout = dealt(x.numel(), blocks)
    work, out, flags = begin(kernels, x, layout, min(hint, layout.length))
    sums = [block_of(x, layout, b) for b in range(blocks)]
    where = [layout.to_global(torch.arange(layout.length), b) for b in range(blocks)]
    for positions, b in arriving:
        index = torch.tensor(sorted(i for i in positions if i < layout.length), dtype=torch.int64)
        value = torch.linspace(-3, 3, index.numel())
        kernels.merge(work, b % blocks, index, value)
        kept = where[b % blocks][index] < x.numel()
        sums[b % blocks][index[kept]] += value[kept]
    expected = x.clone()
    k = data.draw(st.integers(0, layout.length))
    for b in range(blocks):
        index, value = kernels.select(work, b, k)
        assert index.tolist() == top(sums[b], k)
        assert same(value, sums[b][index])
        kernels.deduct(work, b, value / 2)
        sums[b][index] -= value / 2
        settled = torch.tensor(sorted(data.draw(st.sets(st.integers(0, layout.length + 3)))), dtype=torch.int64)
        kernels.settle(work, b, settled)
        inside = settled[settled < layout.length]
        inside = inside[where[b][inside] < x.numel()]
        expected[where[b][inside]] = sums[b][inside]
    assert same(out, expected)
    assert flags.item() == (0 if x.isfinite().all() and all(s.isfinite().all() for s in sums) else wire.NONFINITE)


@pytest.mark.parametrize("wild", [-1, 10, 1 << 31, 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("n", [0, 30])
def test_positions_outside_a_block_touch_nothing(kernels: Any, n: int, wild: int) -> None:
    layout = dealt(n, 3) if n else whole(n)
    assert layout.length <= 10
    x, index = data("normal", n, torch.float32), torch.tensor([wild])
    work, out, flags = begin(kernels, x, layout, 1)
    kernels.merge(work, 0, index, torch.ones(1))
    assert flags.item() == wire.DAMAGED
    kernels.settle(work, 0, index)
    assert same(out, x)
    check_select(kernels, work, x, 0, min(2, layout.length))


def test_misuse_of_a_step_is_an_error(kernels: Any) -> None:
    x, layout = data("normal", 100, torch.float32), whole(100)
    work, _, _ = begin(kernels, x, layout, 5)
    with pytest.raises(SparcommError, match=r"block 0.*selected"):
        kernels.deduct(work, 0, torch.ones(5))
    for k in (-1, 101):
        with pytest.raises(SparcommError, match=f"k={k} must be in"):
            kernels.select(work, 0, k)
    kernels.select(work, 0, 5)
    with pytest.raises(SparcommError, match=r"block 0.*4 values"):
        kernels.deduct(work, 0, torch.ones(4))
    with pytest.raises(SparcommError, match="block 0 has been selected from"):
        kernels.select(work, 0, 5)
    with pytest.raises(SparcommError, match="block 0 has been selected from, but nothing deducted"):
        kernels.merge(work, 0, torch.arange(2), torch.ones(2))
    other = next(k for k in IMPLEMENTATIONS.values() if k is not kernels)
    with pytest.raises(SparcommError, match="was not made by"):
        other.settle(work, 0, torch.arange(2))


@pytest.mark.parametrize("offset", [0, 1])
def test_vectors_beyond_the_caches(offset: int) -> None:
    """Large vectors are written past the caches, if they start at a cache line."""
    n = (1 << 22) + 77
    grad, residual, out = (torch.empty(n + 1)[offset : n + offset] for _ in range(3))
    grad.copy_(data("normal", n, torch.float32))
    residual.copy_(data("normal", n, torch.float32, seed=1))
    kernels, flags = IMPLEMENTATIONS["cpu"], torch.zeros(1, dtype=torch.uint8)
    for layout in (dealt(n, 4), contiguous(n, 3), whole(n)):
        work = kernels.compensate(grad, residual, out.fill_(0), layout, 500, flags)
        assert torch.equal(out, grad + residual)
        where = layout.to_global(torch.arange(layout.length), layout.blocks - 1)
        values = torch.where(where < n, out[where.clamp(max=n - 1)], 0)
        order = values.abs().sort(descending=True, stable=True).indices[:500].sort().values
        index, value = kernels.select(work, layout.blocks - 1, 500)
        assert torch.equal(index, order)
        assert torch.equal(value, values[order])
