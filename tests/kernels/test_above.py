"""Selection above a threshold, surveys, floors, and what may be merged after a selection."""

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

INF, NAN = float("inf"), float("nan")


def begin(
    kernels: Any, x: torch.Tensor, layout: Layout, k: int, floor: torch.Tensor | None = None
) -> tuple[Any, torch.Tensor]:
    """A survey of ``x`` and its flags."""
    flags = torch.zeros(1, dtype=torch.uint8)
    return kernels.survey(x, layout, k, flags, floor), flags


def exceeds(values: torch.Tensor, threshold: float) -> list[bool]:
    """Whether magnitudes are above a threshold, as Python compares floats; NaN is above all."""
    return [not abs(v) <= threshold for v in values.tolist()]


def check_above(kernels: Any, work: Any, sums: torch.Tensor, block: int, threshold: float, k: int) -> torch.Tensor:
    """Compares with the rule, one position at a time; returns the positions."""
    over = exceeds(sums, threshold)
    assert kernels.count_above(work, block, threshold) == sum(over)
    first = [i for i, above in enumerate(over) if above][:k]
    rest = [i for i, above in enumerate(over) if not above][: k - len(first)]
    index, value = kernels.above(work, block, threshold, k)
    assert index.tolist() == sorted(first + rest)
    kept = torch.tensor([over[i] for i in index.tolist()], dtype=torch.bool)
    assert same(value, torch.where(kept, sums[index], torch.zeros((), dtype=sums.dtype)))
    return index


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WORKING)
def test_above_takes_the_first_that_exceed_a_threshold(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    x = data(kind, n, dtype)
    before = x.clone()
    some = x.abs().nan_to_num(1.0, 1.0)[: n // 2].max().item() if n > 1 else 1.0
    cases = [
        (layout, threshold, k)
        for layout in layouts(n)
        for threshold in (0.0, some, some / 2, torch.finfo(torch.float64).max)
        for k in sorted({0, min(1, layout.length), layout.length // 100, layout.length // 2, layout.length})
    ]
    for layout, threshold, k in thinned(kernels, cases, 7, (dtype, kind, n)):
        work, flags = begin(kernels, x, layout, max(k // 2, 1))
        b = layout.blocks - 1 if k % 2 else 0
        check_above(kernels, work, block_of(x, layout, b), b, threshold, k)
        assert flags.item() == (0 if x.isfinite().all() else wire.NONFINITE)
        assert work.out is x
    assert same(x, before)


@pytest.mark.parametrize("threshold", [1.5, 1.5 + 1e-12, 1.5 - 1e-12, 1.5 - 2**-24, 1e308])
@pytest.mark.parametrize("dtype", WORKING)
def test_thresholds_are_compared_exactly(kernels: Any, dtype: torch.dtype, threshold: float) -> None:
    x = torch.tensor([1.5, -1.5, INF, 0.0, NAN, torch.finfo(dtype).max], dtype=dtype)
    work, _ = begin(kernels, x, whole(6), 1)
    check_above(kernels, work, x, 0, float(threshold), 6)


@pytest.mark.parametrize("hint", [None, 0.0, 0.5, 1.0, 3.0, 1e30, NAN, INF, -1.0])
def test_floors_and_their_absence_change_no_result(kernels: Any, hint: float | None) -> None:
    n = 15_000
    x = data("normal", n, torch.float32)
    for layout in (whole(n), dealt(n, 3), contiguous(n, 4)):
        floor = None if hint is None else torch.full((layout.blocks,), hint)
        for k in (1, 40, 1000):
            for b in (0, layout.blocks - 1):
                values = block_of(x, layout, b)
                work, _ = begin(kernels, x, layout, k, floor)
                index, value = kernels.select(work, b, k)
                assert index.tolist() == top(values, k)
                assert same(value, values[index])
            for threshold in (0.2, 1.0, 2.5, 9.0):
                work, _ = begin(kernels, x, layout, k, floor)
                check_above(kernels, work, values, layout.blocks - 1, threshold, k)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    value = st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0, INF, NAN, 1e-45, 3e38])
    x = draw(st.lists(value, max_size=150))
    positions = st.lists(st.integers(0, 160), unique=True, max_size=30)
    return {
        "x": torch.tensor(x, dtype=torch.float32),
        "blocks": draw(st.integers(1, 4)),
        "k": draw(st.integers(0, 160)),
        "floors": draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 4.0, 1e38, INF, NAN]), min_size=4, max_size=4)),
        "threshold": draw(st.floats(0, 9) | st.sampled_from([0.0, 1e-46, 1e300])),
        "early": draw(positions),
        "late": draw(positions),
    }


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(case=steps(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_block_that_is_merged_into_before_and_after(name: str, case: dict[str, Any], data: st.DataObject) -> None:
    kernels, x = IMPLEMENTATIONS[name], case["x"]
    layout, flags = dealt(x.numel(), case["blocks"]), torch.zeros(1, dtype=torch.uint8)
    k, b = min(case["k"], layout.length), case["blocks"] - 1
    out, floor = torch.full_like(x, NAN), torch.tensor(case["floors"][: layout.blocks])
    work = kernels.compensate(x, None, out, layout, 1, flags, floor)
    sums = block_of(x, layout, b)
    where = layout.to_global(torch.arange(layout.length), b)

    def arrive(positions: list[int], largest: float) -> None:
        index = torch.tensor(sorted(i for i in positions if i < layout.length), dtype=torch.int64)
        value = largest * torch.linspace(-1, 1, index.numel())
        kernels.merge(work, b, index, value)
        kept = where[index] < x.numel()
        total = sums[index[kept]] + value[kept]
        if largest > 4:  # late: what was finite stays so
            total = torch.where(sums[index[kept]].isfinite(), total.nan_to_num(), total)
        sums[index[kept]] = total

    arrive(case["early"], 4.0)
    if data.draw(st.booleans()):
        index, value = kernels.select(work, b, k)
        assert index.tolist() == top(sums, k)
    else:
        index = check_above(kernels, work, sums, b, case["threshold"], k)
        value = torch.where(torch.tensor(exceeds(sums[index], case["threshold"]), dtype=torch.bool), sums[index], 0.0)
    sent = torch.where(value.isfinite(), value / 2, value) + data.draw(st.sampled_from([0.0, 1.0]))
    kernels.deduct(work, b, sent)
    stored = where[index] < x.numel()
    sums[index[stored]] -= sent[stored]
    flagged = flags.item()
    arrive(case["late"], 3e38)
    arrive(case["late"], 3e38)
    everywhere = torch.arange(layout.length)
    kernels.settle(work, b, everywhere)
    expected = x.clone()
    expected[where[where < x.numel()]] = sums[where < x.numel()]
    assert same(out, expected)
    if x.isfinite().all() and not flagged:
        assert not flags, "an overflow of what is left is no news to anybody"


def test_sums_that_overflow_saturate_only_after_a_selection(kernels: Any) -> None:
    largest = torch.finfo(torch.float32).max
    x, index = torch.tensor([largest, -largest, 1.0, INF]), torch.arange(4)
    extra = torch.tensor([largest, -largest, INF, -largest])
    out, flags = torch.empty(4), torch.zeros(1, dtype=torch.uint8)
    work = kernels.compensate(x, None, out, whole(4), 4, flags)
    kernels.select(work, 0, 0)
    kernels.deduct(work, 0, torch.empty(0))
    flags.zero_()
    kernels.merge(work, 0, index[:2], extra[:2])
    assert not flags
    kernels.merge(work, 0, index, extra)
    assert flags.item() == wire.NONFINITE
    kernels.settle(work, 0, index)
    assert out.tolist() == [largest, -largest, INF, INF]
    flags.zero_()
    work = kernels.compensate(x[:2], None, torch.empty(2), whole(2), 1, flags)
    kernels.merge(work, 0, index[:2], extra[:2])
    assert flags.item() == wire.NONFINITE


def test_what_is_wrong_is_said(kernels: Any) -> None:
    x, layout = data("normal", 100, torch.float32), whole(100)
    work, flags = begin(kernels, x, layout, 5)
    for threshold in (-1.0, INF, NAN):
        with pytest.raises(SparcommError, match=r"threshold=.* must be a finite number"):
            kernels.count_above(work, 0, threshold)
        with pytest.raises(SparcommError, match=r"threshold=.* must be a finite number"):
            kernels.above(work, 0, threshold, 3)
    for k in (-1, 101):
        with pytest.raises(SparcommError, match=f"k={k} must be in"):
            kernels.above(work, 0, 1.0, k)
    with pytest.raises(SparcommError, match="only read"):
        kernels.settle(work, 0, torch.arange(3))
    _, value = kernels.above(work, 0, 1.0, 5)
    for again in (lambda: kernels.above(work, 0, 1.0, 5), lambda: kernels.count_above(work, 0, 1.0)):
        with pytest.raises(SparcommError, match="block 0 has been selected from"):
            again()
    with pytest.raises(SparcommError, match="nothing deducted"):
        kernels.merge(work, 0, torch.arange(2), torch.ones(2))
    kernels.deduct(work, 0, value)
    kernels.merge(work, 0, torch.arange(2), torch.ones(2))
    with pytest.raises(SparcommError, match=r"block 0.*5 values"):
        kernels.deduct(work, 0, value)
    with pytest.raises(SparcommError, match="block 0 has been selected from"):
        kernels.select(work, 0, 5)
    for bad in (torch.ones(2), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(SparcommError, match=r"floor is .*must be torch.float32\[1\]"):
            kernels.survey(x, layout, 5, flags, bad)
        with pytest.raises(SparcommError, match=r"floor is .*must be torch.float32\[1\]"):
            kernels.compensate(x, None, torch.empty(100), layout, 5, flags, bad)
    for wrong in (x.half(), x[:99], torch.ones(200)[::2]):
        with pytest.raises(SparcommError, match=r"must be float32 or float64|flat and contiguous"):
            kernels.survey(wrong, layout, 5, flags)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WORKING)
def test_top_of_a_sparse_list(kernels: Any, dtype: torch.dtype, kind: str, n: int) -> None:
    value, index = data(kind, n, dtype), 3 * torch.arange(n)
    for k in sorted({0, min(1, n), n // 3, n}):
        assert kernels.top(index, value, k).tolist() == top(value, k)
    for k in (-1, n + 1):
        with pytest.raises(SparcommError, match=f"k={k} must be in"):
            kernels.top(index, value, k)
    with pytest.raises(SparcommError, match="must be equal"):
        kernels.top(torch.arange(n + 1), value, 0)


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("n", [*SIZES, (1 << 17) + 3])
def test_a_sample_has_one_element_of_every_share(kernels: Any, dtype: torch.dtype, n: int) -> None:
    grad = data("normal", n, dtype)
    residual = torch.arange(n, dtype=working_dtype(dtype)) * 4096
    for count in (1, 2, 32, 1024):
        for owed in (None, residual):
            got = kernels.sample(grad, owed, count)
            places = list(range(n))
            if n > count:
                mixed = [(i * 0x9E3779B97F4A7C15 % (1 << 64)) >> 40 for i in range(count)]
                places = [(i * n + (c * n >> 24)) // count for i, c in enumerate(mixed)]
                assert all(i * n // count <= at <= ((i + 1) * n - 1) // count for i, at in enumerate(places))
            assert same(got, grad[places].to(residual.dtype) + (0 if owed is None else owed[places]))
    for count in (0, -1, 3, 48):
        with pytest.raises(SparcommError, match=f"count={count} .*power of two"):
            kernels.sample(grad, None, count)
    with pytest.raises(SparcommError, match="of one shape"):
        kernels.sample(grad, torch.ones(n + 1), 8)
