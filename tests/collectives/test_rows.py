"""Sums over the union of rows: the bits of the dense all-reduce, in the bytes of the union."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import ordered_all_reduce
from sparcomm.collectives.rows import union_all_reduce, union_traffic
from sparcomm.errors import DamagedBag
from sparcomm.kernels import kernels_for
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace
from support.sums import Damaging

CPU = torch.device("cpu")


def rows_of(rank: int, keys: int, width: int, share: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's rows: about ``share`` of them, values of all magnitudes and some zeros of either sign."""
    made = torch.Generator().manual_seed(1000 * seed + rank)
    key = (torch.rand(keys, generator=made) < share).nonzero().view(-1)
    value = torch.randn(key.numel(), width, generator=made, dtype=dtype)
    value *= 10.0 ** torch.randint(-6, 7, value.shape, generator=made)
    value[torch.rand(value.shape, generator=made) < 0.1] = -0.0
    return key, value


def whole(key: Tensor, value: Tensor, keys: int) -> Tensor:
    """The same as one dense vector."""
    return value.new_zeros(keys, value.shape[1]).index_copy_(0, key, value).view(-1)


def both_ways(transport: Transport, key: Tensor, value: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
    """(union, total, the dense all-reduce's sum, ok of either)."""
    bags = Bags(kernels_for(value), 3, 7, CPU)
    union, total = union_all_reduce(key, value, keys, bags, transport, Clock(), Workspace())
    moved = vars(transport.traffic).copy()
    expected = union_traffic(keys, union.numel(), value.shape[1], value.element_size(), transport.size)
    assert (moved["rounds"], moved["messages"], moved["bytes_sent"]) == expected
    dense, again = torch.empty(keys * value.shape[1], dtype=value.dtype), Bags(kernels_for(value), 4, 7, CPU)
    if keys:
        ordered_all_reduce(whole(key, value, keys), dense, again, transport, Clock(), Workspace())
    return union, total, dense, bool(bags.ok()), bool(again.ok())


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 3, 4, 7]),
    st.sampled_from([0, 1, 2, 31, 32, 33, 100, 257]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_sum_has_the_bits_of_the_dense_one(
    size: int, keys: int, width: int, share: float, seed: int, dtype: torch.dtype
) -> None:
    given_rows = [rows_of(rank, keys, width, share, seed, dtype) for rank in range(size)]
    copies = [(k.clone(), v.clone()) for k, v in given_rows]
    found = sim.run(size, lambda t: both_ways(t, *given_rows[t.rank], keys)).results
    anyone = sorted(set().union(*(set(k.tolist()) for k, _ in given_rows)))
    for union, total, dense, ok, _ in found:
        assert ok
        assert union.tolist() == anyone
        assert union.dtype == torch.int64
        assert total.shape == (len(anyone), width)
        assert whole(union, total, keys).view(torch.uint8).equal(dense.view(torch.uint8))
    for (k, v), (was_k, was_v) in zip(given_rows, copies, strict=True):
        assert k.equal(was_k)
        assert v.view(torch.uint8).equal(was_v.view(torch.uint8)), "an argument was modified"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 3])
def test_all_ranks_hear_of_what_is_not_finite(size: int, bad: float) -> None:
    def rank(t: Transport) -> bool:
        key, value = rows_of(t.rank, 50, 3, 0.2, 0, torch.float32)
        if t.rank == size - 1:
            value[-1, 1] = bad
        union, _, _, ok, dense_ok = both_ways(t, key, value, 50)
        assert union.numel()
        return ok or dense_ok

    assert sim.run(size, rank).results == [False] * size


def test_damaged_bytes_in_any_round_are_an_error() -> None:
    """Flat bitmap, then the two rounds of the sum: no rank goes on with a union of its own."""
    for at in range(4):

        def rank(transport: Transport, at: int = at) -> bool:
            damaging = Damaging(transport, at if transport.rank == 1 else 10**9, seed=at)
            key, value = rows_of(transport.rank, 300, 2, 0.2, 0, torch.float32)
            bags = Bags(kernels_for(value), 3, 7, CPU)
            union_all_reduce(key, value, 300, bags, damaging, Clock(), Workspace())  # type: ignore[arg-type]
            return damaging.hit

        if at < 3:
            with pytest.raises(DamagedBag):
                sim.run(3, rank)
        else:
            assert not any(sim.run(3, rank).results)


def test_steady_steps_do_not_pile_up_buffers() -> None:
    def rank(t: Transport) -> int:
        space = Workspace()
        for step in range(6):
            key, value = rows_of(t.rank, 400, 2, 0.1, step, torch.float32)
            union_all_reduce(key, value, 400, Bags(kernels_for(value), 0, step, CPU), t, Clock(), space)
        return len(space._free)

    assert max(sim.run(2, rank).results) <= 3
