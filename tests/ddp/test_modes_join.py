"""Uneven inputs: a rank that has run out of data takes part with zeros, and keeps what it owes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join

import sparcomm
from sparcomm import Dense, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from support.modes import assert_replicas, debts, owed
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, wrap

TIMEOUT = 30.0


def steps_of(rank: int) -> int:
    """The first rank stops before DDP's buckets are final."""
    return 1 + 2 * rank


def uneven_means(rank: int, size: int, algorithm: Algorithm | None, kwargs: dict[str, Any]) -> list[list[Tensor]]:
    ddp = wrap(Fed(), **kwargs)
    state = None if algorithm is None else sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    with ddp.join():
        means = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(steps_of(rank))]
    if state is not None:
        assert state.step == steps_of(size - 1)
        state.close()
    return means


@pytest.mark.parametrize("kwargs", [{}, {"find_unused_parameters": True}], ids=["", "find_unused"])
@pytest.mark.parametrize("algorithm", [Dense(), SparDL(density=1.0)], ids=repr)
def test_a_joined_rank_counts_as_zero_as_in_plain_ddp(algorithm: Algorithm, kwargs: dict[str, Any]) -> None:
    plain, ours = (pool(3).run(uneven_means, a, kwargs) for a in (None, algorithm))
    for rank in range(3):
        for step in range(steps_of(rank)):
            want = [
                sum(integers(SIZES, r, step)[i] for r in range(3) if step < steps_of(r)) / 3 for i in range(len(SIZES))
            ]
            for i, mean in enumerate(want):
                assert torch.equal(ours[rank][step][i], mean), (rank, step, i)
                assert torch.allclose(plain[rank][step][i], mean, atol=1e-5), (rank, step, i)


def uneven_debts(rank: int, size: int, algorithm: Algorithm) -> tuple[list[Tensor], ...]:
    """(gradients fed in all, means delivered in all to this rank, residuals when it ran out, at the end)."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    fed, means = ([torch.zeros(n) for n in SIZES] for _ in range(2))
    with ddp.join():
        for step in range(steps_of(rank)):
            gradients = integers(SIZES, rank, step)
            for i, mean in enumerate(gradient_step(ddp, gradients)):
                fed[i] += gradients[i]
                means[i] += mean
        before = debts(state, SIZES)
    after = debts(state, SIZES)
    state.close()
    return fed, means, before, after


@pytest.mark.parametrize(
    "algorithm", [Halves(), TopKAllGather(density=0.05), SparDL(density=0.05)], ids=lambda a: a.name
)
def test_a_joined_rank_keeps_what_it_owes_and_nothing_is_lost(algorithm: Algorithm) -> None:
    size = 4  # a power of two: means of small integers are exact
    results = pool(size).run(uneven_debts, algorithm)
    for i in range(len(SIZES)):
        fed, left = sum(r[0][i] for r in results), sum(r[3][i] for r in results)
        delivered = size * results[-1][1][i].double()  # the last rank saw every step
        assert torch.equal(fed.double(), delivered + left), i
    for rank, (_, _, before, after) in enumerate(results[1:], 1):
        left = list(zip(before, after, strict=True))
        assert any(bool((a != 0).any()) for a, _ in left), rank
        if not isinstance(algorithm, SparDL):  # there, what is dropped on the way stays with the rank that drops it
            assert all(torch.equal(a, b) for a, b in left), rank


def by_active_ranks(rank: int, size: int) -> str:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    with pytest.raises(Exception) as caught, ddp.join(divide_by_initial_world_size=False):  # noqa: PT011, PT012
        for step in range(steps_of(rank)):
            gradient_step(ddp, integers(SIZES, rank, step))
    state.close()
    return str(caught.value)


def test_dividing_by_the_ranks_that_remain_is_refused() -> None:
    """DDP tells its hooks nothing of that number, and PyTorch's own then divide by the wrong one in silence."""
    for text in pool(2).run(by_active_ranks):
        assert "divide_by_initial_world_size" in text


def accumulating(rank: int, size: int, hooked: bool) -> list[list[Tensor]]:
    """Micro-batches within ``no_sync``, which joined ranks must not answer with a step."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT) if hooked else None
    means = []
    with ddp.join():
        for step in range(steps_of(rank)):
            ddp.zero_grad()
            with ddp.no_sync():
                ddp(integers(SIZES, rank, 10 * step)).backward()
            ddp(integers(SIZES, rank, 10 * step + 1)).backward()
            means.append([p.grad.clone() for p in ddp.parameters()])
    if state is not None:
        assert state.step == steps_of(size - 1)
        state.close()
    return means


def test_accumulation_in_uneven_training() -> None:
    plain, ours = (pool(2).run(accumulating, hooked) for hooked in (False, True))
    for a, b in zip(plain, ours, strict=True):
        for s, t in zip(a, b, strict=True):
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(s, t, strict=True))


def several(rank: int, size: int) -> None:
    """Two modules under one Join, then even training: a hook must not take a rank for joined any longer."""
    nets = [wrap(Fed()), wrap(Fed())]
    states = [sparcomm.attach(net, Halves(), timeout=TIMEOUT) for net in nets]
    with Join(nets):
        for step in range(1 + rank):
            for net in nets:
                gradient_step(net, integers(SIZES, rank, step))
    for net in nets:
        gradient_step(net, integers(SIZES, rank, 9))
        assert_replicas(p.grad for p in net.parameters())
    assert [s.step for s in states] == [size + 1] * 2
    for i, n in enumerate(SIZES):
        fed = sum(integers(SIZES, rank, s)[i] for s in (*range(1 + rank), 9))
        seen = owed(states[0], "per_element")["seen"][f"p.{i}"]
        assert torch.equal(seen, fed), (i, n)
    dist.barrier()
    for state in states:
        state.close()


def test_two_modules_under_one_join_and_even_training_behind_it() -> None:
    pool(3).run(several)
