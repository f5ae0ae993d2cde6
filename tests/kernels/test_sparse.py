"""Loops over positions: gather, subtract, add, scatter, expand, merge_sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.layout import Layout, dealt, whole
from sparcomm.sparse import Sparse
from support.kernels import GRADIENTS, IMPLEMENTATIONS, WORKING, data, increasing, layouts, same

N = (0, 1, 33, 500)


def cases(n: int) -> list[tuple[Layout, int, torch.Tensor]]:
    """Layouts, blocks and positions: none, all (padding included), some."""
    return [
        (layout, b, increasing(k, layout.length, seed=k))
        for layout in layouts(n)
        for b in sorted({0, layout.blocks - 1})
        for k in sorted({0, layout.length // 3, layout.length})
    ]


def stored(index: torch.Tensor, layout: Layout, block: int) -> list[tuple[int, int]]:
    """(place in the list, global position) of what is neither padding nor outside."""
    inside = [i for i, at in enumerate(index.tolist()) if 0 <= at < layout.length]
    where = layout.to_global(index[inside], block).tolist() if inside else []
    return [(i, j) for i, j in zip(inside, where, strict=True) if j < layout.numel]


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("dtype", WORKING)
def test_gather_subtract_and_scatter(kernels: Any, dtype: torch.dtype, n: int) -> None:
    for layout, b, index in cases(n):
        x, value = data("special", n, dtype), data("normal", index.numel(), dtype, seed=2)
        read, less, put = torch.zeros_like(value), x.clone(), x.clone()
        for i, j in stored(index, layout, b):
            read[i] = x[j]
            less[j] = x[j] - value[i]
            put[j] = value[i]
        assert same(kernels.gather(x, index, layout, b), read)
        y = x.clone()
        kernels.subtract(y, index, value, layout, b)
        assert same(y, less)
        y = x.clone()
        kernels.scatter(y, index, value, layout, b)
        assert same(y, put)


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("dtype", WORKING)
def test_add(kernels: Any, dtype: torch.dtype, n: int) -> None:
    for kind in ("normal", "special"):
        for layout, b, index in cases(n):
            x, value = data(kind, n, dtype), data("spread", index.numel(), dtype, seed=2)
            expected = x.clone()
            for i, j in stored(index, layout, b):
                expected[j] = x[j] + value[i]
            flags = torch.zeros(1, dtype=torch.uint8)
            kernels.add(x, index, value, layout, b, flags)
            assert same(x, expected)
            touched = [j for _, j in stored(index, layout, b)]
            assert flags.item() == (0 if expected[touched].isfinite().all() else wire.NONFINITE)


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_expand_writes_every_element(kernels: Any, dtype: torch.dtype, n: int) -> None:
    for layout in layouts(n):
        index = [increasing(layout.length // (2 + b % 3), layout.length, seed=b) for b in range(layout.blocks)]
        value = [data("special", i.numel(), torch.float32, seed=b) for b, i in enumerate(index)]
        if layout.length > 2:
            index[0] = torch.tensor([-5, 0, 2, layout.length + 1, 1 << 40])  # what is outside is ignored
            value[0] = torch.arange(1.0, 6.0)
        expected, out = torch.zeros(n, dtype=dtype), torch.full((n,), 9.0, dtype=dtype)
        for b in range(layout.blocks):
            for i, j in stored(index[b], layout, b):
                expected[j] = value[b][i]
        kernels.expand(out, index, value, layout)
        assert same(out, expected)


def test_expand_needs_a_list_for_every_block(kernels: Any) -> None:
    with pytest.raises(SparcommError, match="1 and 2 lists for 2 blocks"):
        kernels.expand(torch.ones(50), [torch.arange(2)], [torch.ones(2)] * 2, dealt(50, 2))


@pytest.mark.parametrize("offset", [0, 1])
def test_expand_beyond_the_caches(offset: int) -> None:
    n = (1 << 23) + 77
    out = torch.empty(n + 1)[offset : n + offset].fill_(3)
    for layout in (dealt(n, 2), whole(n)):
        index = [increasing(1000, layout.length, seed=b) for b in range(layout.blocks)]
        value = [torch.arange(1.0, 1001) + 1000 * b for b in range(layout.blocks)]
        IMPLEMENTATIONS["cpu"].expand(out, index, value, layout)
        where = torch.cat([layout.to_global(i, b) for b, i in enumerate(index)])
        stored_ = where < n
        assert torch.equal(out[where[stored_]], torch.cat(value)[stored_])
        assert int(out.count_nonzero()) == int(stored_.sum())


@pytest.mark.parametrize("wild", [-1, 10, 1 << 31, 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("n", [0, 30])
def test_positions_outside_a_block_touch_nothing(kernels: Any, n: int, wild: int) -> None:
    layout = whole(n) if not n else dealt(n, 3)
    assert layout.length <= 10
    index = torch.tensor([wild])
    x = data("normal", n, torch.float32)
    before, value, flags = x.clone(), torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    kernels.add(x, index, value, layout, 0, flags)
    assert flags.item() == wire.DAMAGED
    kernels.subtract(x, index, value, layout, 0)
    kernels.scatter(x, index, value, layout, 0)
    assert torch.equal(x, before)
    assert kernels.gather(x, index, layout, 0).tolist() == [0.0]


sparse_lists = st.dictionaries(st.integers(0, 40), st.floats(width=32), max_size=30)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", WORKING)
@given(first=sparse_lists, second=sparse_lists)
@settings(deadline=None, max_examples=60)
def test_merge_sum_is_the_union(
    name: str, dtype: torch.dtype, first: dict[int, float], second: dict[int, float]
) -> None:
    a, b = (
        Sparse(torch.tensor(sorted(d), dtype=torch.int64), torch.tensor([d[i] for i in sorted(d)], dtype=dtype), 41)
        for d in (first, second)
    )
    total = IMPLEMENTATIONS[name].merge_sum(a, b)
    union = sorted({*first, *second})
    assert total.index.tolist() == union
    assert total.numel == 41
    in_a, in_b = (dict(zip(s.index.tolist(), s.value, strict=True)) for s in (a, b))
    expected = [in_a[i] + in_b[i] if i in in_a and i in in_b else in_a.get(i, in_b.get(i)) for i in union]
    assert same(total.value, torch.tensor(expected, dtype=dtype))


def test_merge_sum_of_indices_beyond_two_to_the_31(kernels: Any) -> None:
    big = 1 << 33
    a = Sparse(torch.tensor([5, big - 2]), torch.tensor([1.0, 2.0]), big)
    b = Sparse(torch.tensor([6, big - 2, big - 1]), torch.tensor([3.0, 4.0, 5.0]), big)
    total = kernels.merge_sum(a, b)
    assert total.index.tolist() == [5, 6, big - 2, big - 1]
    assert total.value.tolist() == [1.0, 3.0, 6.0, 5.0]
