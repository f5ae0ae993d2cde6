"""Every way to train, on real ranks: at density 1 as plain DDP does it, at 1 % nearly as well."""

from __future__ import annotations

import pytest

import sparcomm
from sparcomm import Dense, SparDL
from sparcomm.algorithms import Algorithm
from support.modes import WAYS, assert_replicas, flat, loss_of, wrapped
from support.pool import pool

TIMEOUT = 30.0


def as_plain(rank: int, size: int, name: str, algorithms: list[Algorithm], steps: int) -> None:
    way = WAYS[name]
    plain = wrapped(way)
    start = flat(plain)
    way.train(plain, rank, steps)
    for algorithm in algorithms:
        ours = wrapped(way)
        state = sparcomm.attach(ours, algorithm, timeout=TIMEOUT)
        way.train(ours, rank, steps)
        assert state.step == steps
        state.close()
        moved, apart = float((flat(plain) - start).norm()), float((flat(plain) - flat(ours)).norm())
        assert moved > 0.1
        assert apart <= way.tolerance * moved, (algorithm, apart / moved)
        assert_replicas(ours.parameters())


@pytest.mark.parametrize("name", WAYS)
def test_at_density_1_it_trains_as_plain_ddp_does(name: str) -> None:
    pool(2).run(as_plain, name, [Dense(), SparDL(density=1.0)], 9)


def at_1_percent(rank: int, size: int, name: str, steps: int) -> tuple[float, float, float, float]:
    """The loss at the start, of plain DDP at the end, and at 1 % at the end; how much of the gradient travels."""
    way = WAYS[name]
    plain, ours = wrapped(way), wrapped(way)
    start = float(loss_of(plain.module).detach())
    way.train(plain, rank, steps)
    state = sparcomm.attach(ours, SparDL(density=0.01), timeout=TIMEOUT)
    way.train(ours, rank, steps)
    stats = state.stats()
    state.close()
    assert stats["skipped"] == 0
    assert_replicas(ours.parameters())
    numel = sum(unit["numel"] for unit in stats["per_unit"])
    ends = [float(loss_of(ddp.module).detach()) for ddp in (plain, ours)]
    return start, *ends, stats["kept"] / numel


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_at_1_percent_it_learns_nearly_as_much(name: str) -> None:
    for start, dense, sparse, sent in pool(2).run(at_1_percent, name, 55):
        assert dense < 0.2 * start
        assert start - sparse > 0.95 * (start - dense), (start, dense, sparse)
        assert sent < 0.02
