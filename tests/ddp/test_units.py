"""Buckets cut and joined to units, and state that follows its parameter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.futures import Future

from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.options import Options
from sparcomm.ddp.plan import Plan
from sparcomm.ddp.reduction import Reducer
from sparcomm.ddp.step import Step
from sparcomm.ddp.units import Carried, Partition
from sparcomm.errors import HookError
from sparcomm.transport import sim
from support.training import Halves, HalvesState

CPU = torch.device("cpu")
ALGORITHM = Halves()


def partition(groups: list[list[Tensor]], carried: Carried | None = None) -> Partition:
    made = Partition(final=True)
    for group in groups:
        made.add(group, torch.float32, CPU, ALGORITHM, 1, carried or Carried())
    return made


def cut(params: list[Tensor], at: list[int]) -> list[list[Tensor]]:
    bounds = [0, *sorted(set(at)), len(params)]
    return [group for a, b in pairwise(bounds) if (group := params[a:b])]


def values(carried: dict[int, Tensor], params: list[Tensor]) -> list[list[float]]:
    return [carried[id(p)].tolist() for p in params]


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    old=st.lists(st.integers(1, 5), max_size=3),
    new=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_state_follows_its_parameter_over_any_change_of_units(
    sizes: list[int], old: list[int], new: list[int], data: st.DataObject
) -> None:
    params = [torch.zeros(n) for n in sizes]
    shuffled = data.draw(st.permutations(params))
    first = partition(cut(params, old))
    for unit in first.units:
        unit.residual = torch.randn(unit.numel)
        assert isinstance(unit.state, HalvesState)
        unit.state.seen = torch.randn(unit.numel)
    carried = first.carry()
    second = partition(cut(shuffled, new), carried).carry()
    assert values(second.residual, params) == values(carried.residual, params)
    assert values(second.per_element["seen"], params) == values(carried.per_element["seen"], params)


def test_shared_state_comes_from_the_unit_of_the_first_parameter_and_is_not_shared_between_units() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    first = partition([[a, b]])
    assert isinstance(first.units[0].state, HalvesState)
    first.units[0].state.count += 5
    states = [unit.state for unit in partition([[b], [a]], first.carry()).units]
    assert [s.count.item() for s in states if isinstance(s, HalvesState)] == [5, 5]
    assert states[0].count is not states[1].count  # type: ignore[attr-defined]


def test_a_parameter_without_residual_owes_nothing() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    first = partition([[a], [b]])
    assert partition([[a, b]], first.carry()).units[0].residual is None
    first.units[1].residual = torch.ones(3)
    joined = partition([[b, a]], first.carry()).units[0].residual
    assert joined is not None
    assert joined.tolist() == [1, 1, 1, 0, 0]


def test_whole_needs_the_same_parameters_in_the_same_order() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    made = partition([[a, b]])
    assert made.whole([a, b]) is made.units[0]
    assert made.whole([b, a]) is made.whole([a]) is made.whole([torch.zeros(2)]) is made.whole([]) is None


def run(groups: list[list[Tensor]], buckets: list[list[Tensor]], grads: dict[int, Tensor]) -> list[Tensor]:
    """One step of one rank whose buckets are not its units; the buffers after it."""

    def rank(transport: sim.SimTransport) -> list[Tensor]:
        step = Step(0, partition(groups), Reducer(Options(), transport), Plan(), True)
        buffers, futures = [], []
        for bucket in buckets:
            buffer = torch.cat([grads[id(p)] for p in bucket])
            futures.append(Future())
            buffers.append(buffer)
            for unit in step.place(bucket, buffer, Delivery(buffer, futures[-1])):
                step.reduce(unit)
        step.check_complete()
        assert all(f.done() and f.value() is b for f, b in zip(futures, buffers, strict=True))
        assert bool(step.commit())
        return buffers

    return sim.run(1, rank).results[0]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    units=st.lists(st.integers(1, 5), max_size=3),
    buckets=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_the_mean_does_not_depend_on_how_buckets_cut_the_units(
    sizes: list[int], units: list[int], buckets: list[int], data: st.DataObject
) -> None:
    params = [torch.zeros(n) for n in sizes]
    grads = {id(p): torch.arange(1.0, p.numel() + 1) + 10 * i for i, p in enumerate(params)}
    groups = cut(params, units)
    ordered = data.draw(st.permutations(params))
    by_unit = run(groups, groups, grads)
    expected = {id(p): m for g, b in zip(groups, by_unit, strict=True) for p, m in zip(g, split(b, g), strict=True)}
    cutting = cut(ordered, buckets)
    for bucket, buffer in zip(cutting, run(groups, cutting, grads), strict=True):
        for p, mean in zip(bucket, split(buffer, bucket), strict=True):
            assert mean.tolist() == expected[id(p)].tolist()


def split(buffer: Tensor, params: list[Tensor]) -> list[Tensor]:
    return list(buffer.split([p.numel() for p in params]))


def placed(step: Step, bucket: list[Tensor]) -> list[int]:
    buffer = torch.zeros(sum(p.numel() for p in bucket))
    return [u.number for u in step.place(bucket, buffer, Delivery(buffer, Future()))]


def test_units_come_in_the_order_of_their_numbers_once_all_their_parameters_have() -> None:
    a, b, c, d = (torch.zeros(2) for _ in range(4))

    def rank(transport: sim.SimTransport) -> None:
        step = Step(0, partition([[a, c], [b], [d]]), Reducer(Options(), transport), Plan(), True)
        assert placed(step, [d, b, a]) == [1, 2]
        with pytest.raises(HookError, match="1 of 2 parameters of unit 0"):
            step.check_complete()
        assert placed(step, [c]) == [0]
        step.check_complete()
        with pytest.raises(HookError, match="came twice"):
            placed(step, [a])
        with pytest.raises(HookError, match="belongs to no compression unit"):
            placed(step, [torch.zeros(1)])

    sim.run(1, rank)
