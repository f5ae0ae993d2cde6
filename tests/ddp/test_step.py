"""The transaction: what is committed, what is dropped, and where casting errors go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.futures import Future

from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.spardl import SparDL
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.options import Options
from sparcomm.ddp.plan import Plan
from sparcomm.ddp.reduction import Reducer
from sparcomm.ddp.step import Step
from sparcomm.ddp.units import Carried, Partition, Unit
from sparcomm.transport import sim
from support.training import Halves, HalvesState

CPU = torch.device("cpu")


def training(
    algorithm: Algorithm, steps: list[list[list[Tensor]]], transport: sim.SimTransport, on_host: bool
) -> tuple[list[list[Tensor]], list[Unit], list[bool]]:
    """Feeds ``steps[step][rank][unit]``; the means by step and unit, the units at the end, what was committed."""
    partition = Partition(final=True)
    params = [torch.empty_like(g) for g in steps[0][0]]
    for p in params:
        partition.add([p], p.dtype, CPU, algorithm, transport.size, Carried())
    means, goods = [], []
    for number, by_rank in enumerate(steps):
        step = Step(number, partition, Reducer(Options(), transport), Plan(), on_host)
        buffers = [g.clone() for g in by_rank[transport.rank]]
        for p, buffer in zip(params, buffers, strict=True):
            for unit in step.place([p], buffer, Delivery(buffer, Future())):
                step.reduce(unit)
        step.check_complete()
        goods.append(bool(step.commit()))
        means.append(buffers)
    return means, partition.units, goods


def run(algorithm: Algorithm, steps: list[list[list[Tensor]]], on_host: bool = True) -> list[Any]:
    return sim.run(len(steps[0]), lambda t: training(algorithm, steps, t, on_host)).results


def gradients(size: int, steps: int, dtype: torch.dtype, seed: int, integer: bool) -> list[list[list[Tensor]]]:
    made = torch.Generator().manual_seed(seed)

    def one(n: int) -> Tensor:
        x = torch.randint(-8, 9, (n,), generator=made) if integer else torch.randn(n, generator=made)
        return x.to(dtype)

    return [[[one(257), one(64)] for _ in range(size)] for _ in range(steps)]


def delivered_and_owed(results: list[Any], unit: int, size: int) -> Tensor:
    means = sum(step[unit].double() for step in results[0][0]) * size
    owed = [units[unit].residual for _, units, _ in results]
    return means + sum(r.double() for r in owed if r is not None)


@pytest.mark.parametrize("algorithm", [SparDL(density=0.05), SparDL(density=0.1, values="bfloat16"), Halves()])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_nothing_is_lost_over_steps_of_float32(algorithm: Algorithm, size: int) -> None:
    # Divided by 4 exactly; by 3 the mean is rounded, so only to rounding there.
    fed = gradients(size, 4, torch.float32, 1, integer=True)
    results = run(algorithm, fed)
    for unit in range(2):
        put_in = sum(g[unit].double() for step in fed for g in step)
        got = delivered_and_owed(results, unit, size)
        if size == 3:
            torch.testing.assert_close(got, put_in, rtol=0, atol=1e-5)
        else:
            assert torch.equal(got, put_in)
        assert all(torch.equal(r[0][3][unit], results[0][0][3][unit]) for r in results)


@given(dtype=st.sampled_from([torch.float16, torch.bfloat16]), size=st.integers(2, 5), seed=st.integers(0, 10_000))
def test_the_cast_of_the_mean_loses_nothing_in_16_bits(dtype: torch.dtype, size: int, seed: int) -> None:
    fed = gradients(size, 3, dtype, seed, integer=False)
    results = run(Halves(), fed)
    for unit in range(2):
        put_in = sum(g[unit].double() for step in fed for g in step)
        got = delivered_and_owed(results, unit, size)
        # float32 sums: without the correction the error is near 2**-8 (bfloat16) or 2**-11 (float16).
        torch.testing.assert_close(got, put_in, rtol=0, atol=2e-5)


def test_every_rank_keeps_some_of_the_casting_errors() -> None:
    fed = gradients(3, 8, torch.bfloat16, 5, integer=False)
    one_unit_each = [[[r[0]] for r in step] for step in fed]
    results = run(Halves(), one_unit_each)
    # What Halves itself keeps after step 7 are entries of the parity not sent; the others hold casting errors alone.
    errors = [units[0].residual[1::2].abs().sum().item() for _, units, _ in results]
    assert sum(e > 0 for e in errors) == 1
    assert {_keeper_of(step) for step in range(64)} == {0, 1, 2}


def _keeper_of(step: int) -> int:
    from sparcomm.ddp.reduction import keeper

    return keeper(step, 0, 3)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.1), Dense(), Dense(native=True)])
def test_one_bad_unit_on_one_rank_drops_the_whole_step(algorithm: Algorithm, bad: float, on_host: bool) -> None:
    fed = gradients(3, 4, torch.float32, 2, integer=True)
    spoiled = [[[g.clone() for g in r] for r in step] for step in fed]
    spoiled[2][1][1][7] = bad
    results = run(algorithm, spoiled, on_host)
    # As if the step had never been: the same steps without it, under the same numbers.
    before = run(algorithm, fed[:2], on_host)
    for rank, (means, units, good) in enumerate(results):
        assert good == [True, True, False, True]
        assert not means[2][1].isfinite().any()
        assert means[2][0].isfinite().all()
        assert means[3][0].isfinite().all()
        assert means[3][1].isfinite().all()
        for unit, old in zip(units, before[rank][1], strict=True):
            assert unit.residual is None or unit.residual.isfinite().all()
            if isinstance(unit.state, HalvesState):
                assert unit.state.count.item() == 3
                grads = fed[3][rank][unit.number]
                assert torch.equal(unit.state.seen, old.state.seen + grads)


@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.1, schedule="direct"), SparDL(density=1.0), Dense()])
def test_the_device_side_commit_does_what_the_host_does(algorithm: Algorithm) -> None:
    fed = gradients(2, 5, torch.float32, 3, integer=False)
    fed[1][0][0][0] = torch.inf
    fed[3][1][1][0] = torch.nan
    for host, device in zip(run(algorithm, fed, True), run(algorithm, fed, False), strict=True):
        assert host[2] == device[2] == [True, False, True, False, True]
        for a, b in zip(host[0], device[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(host[1], device[1], strict=True):
            assert (a.residual is None) == (b.residual is None)
            assert a.residual is None or torch.equal(a.residual, b.residual)


def test_a_mean_beyond_float16_counts_as_not_finite_and_leaves_no_trace() -> None:
    fed = [[[torch.full((4,), 60000.0, dtype=torch.float16)] for _ in range(2)] for _ in range(2)]
    # Step 0 keeps the odd entries; step 1 sends them doubled: 2·60000 is finite as a sum, not as a float16 mean.
    results = run(Halves(), fed)
    for means, units, good in results:
        assert good == [True, False]
        assert means[1][0].isnan().all()
        assert units[0].residual.tolist() == [0, 60000, 0, 60000]


def test_the_commit_swaps_buffers_and_gives_the_old_ones_back() -> None:
    fed = gradients(2, 6, torch.float32, 4, integer=True)

    def rank(transport: sim.SimTransport) -> int:
        _, units, _ = training(SparDL(density=0.1), fed, transport, True)
        return len(units[0].state.workspace._free)

    assert max(sim.run(2, rank).results) <= 4  # total and residual of two units: steady, not one more a step
