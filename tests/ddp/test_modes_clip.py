"""Clipping that knows the dense norm, and clipping of each rank's own gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import ConfigError, Dense, NotInitializedError, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from support.modes import assert_replicas, debts, flat, loss_of, net, over_ranks, sgd
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, wrap

TIMEOUT = 30.0


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def bounds(rank: int, size: int, algorithm: Algorithm) -> None:
    """The bound is the mean of local norms; where it is within the limit, nothing is touched."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    above = 0
    for _ in range(25):  # steady gradients: what comes every 20th step comes 20-fold
        means = gradient_step(ddp, integers(SIZES, rank, 0))
        everyone = [integers(SIZES, r, 0) for r in range(size)]
        dense = norm([sum(g[i] for g in everyone) / size for i in range(len(SIZES))])
        limit = sum(norm(g) for g in everyone) / size
        bound = state.clip_grad_norm_(limit * 1.001)
        assert float(bound) == pytest.approx(limit, rel=1e-5)
        assert float(bound) >= dense * (1 - 1e-6)
        assert all(torch.equal(p.grad, m) for p, m in zip(ddp.parameters(), means, strict=True))
        above += norm(means) > limit * 1.001
    # What would have been cut by the norm of the compressed mean.
    assert above if isinstance(algorithm, TopKAllGather) else not above
    state.close()


@pytest.mark.parametrize("algorithm", [Dense(), TopKAllGather(density=0.05)], ids=lambda a: a.name)
@pytest.mark.parametrize("size", [1, 3])
def test_the_bound_is_the_mean_of_local_norms_and_bursts_within_it_pass(size: int, algorithm: Algorithm) -> None:
    pool(size).run(bounds, algorithm)


def cut(rank: int, size: int, algorithm: Algorithm, defer: bool) -> None:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    fed, applied, dropped = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(3))
    for step in range(6):
        gradients = integers(SIZES, rank, step)
        means = gradient_step(ddp, gradients)
        limit = 20.0 if step != 3 else 1e9
        bound = float(state.clip_grad_norm_(limit, defer=defer))
        factor = min(1.0, limit / (bound + 1e-6))
        assert (factor < 1) == (step != 3)
        for i, (p, mean) in enumerate(zip(ddp.parameters(), means, strict=True)):
            assert torch.allclose(p.grad, mean * factor, rtol=1e-5)
            fed[i] += gradients[i]
            applied[i] += p.grad
            dropped[i] += mean - p.grad
    everything, owed = over_ranks(fed), over_ranks(debts(state, SIZES))
    for i in range(len(SIZES)):
        gone = everything[i] - size * applied[i] - owed[i]
        assert torch.allclose(gone, torch.zeros(()).double() if defer else size * dropped[i], atol=2e-3), i
    assert any(d.abs().max() > 1 for d in dropped)
    assert_replicas(p.grad for p in ddp.parameters())
    state.close()


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.05)], ids=lambda a: a.name)
def test_what_is_cut_is_dropped_or_owed(algorithm: Algorithm, defer: bool) -> None:
    pool(2).run(cut, algorithm, defer)


def like_torch(rank: int, size: int) -> None:
    """Where all ranks have the same data the bound is the norm."""
    plain, ours = wrap(net()), wrap(net())
    state = sparcomm.attach(ours, SparDL(density=1.0), timeout=TIMEOUT)
    for ddp in (plain, ours):
        optimizer = sgd(ddp)
        for step in range(6):
            optimizer.zero_grad()
            loss_of(ddp, rank=0, step=step).backward()
            if ddp is plain:
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.3)
            else:
                assert float(state.clip_grad_norm_(0.3)) > 0.3
            optimizer.step()
    assert torch.allclose(flat(plain), flat(ours), atol=1e-5)
    state.close()


def test_ranks_of_one_mind_are_clipped_as_by_torch() -> None:
    pool(2).run(like_torch)


def scaled(rank: int, size: int) -> None:
    """After ``unscale_`` the limit is in units of the loss itself; a step that overflowed is left alone."""
    ddp = wrap(Fed())
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT, scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    for step in range(4):
        gradients = integers(SIZES, rank, step)
        if step == 2 and rank == 1:
            gradients[0][0] = torch.inf
        limit = sum(norm(integers(SIZES, r, step)) for r in range(size)) / size
        ddp.zero_grad()
        scaler.scale(ddp(gradients)).backward()
        scaler.unscale_(optimizer)
        before = [p.grad.clone() for p in ddp.parameters()]
        bound = float(state.clip_grad_norm_(limit / 2))
        if step == 2:
            assert not math.isfinite(bound)
            for p, b in zip(ddp.parameters(), before, strict=True):
                assert torch.equal(p.grad, b) or b.isnan().all()
            with pytest.raises(RuntimeError, match="not finite"):
                state.clip_grad_norm_(limit, error_if_nonfinite=True)
        else:
            assert bound == pytest.approx(limit, rel=1e-5)
            for p, b in zip(ddp.parameters(), before, strict=True):
                assert torch.allclose(p.grad, b / 2, rtol=1e-4)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 256
    state.close()


def test_clipping_with_a_scaler() -> None:
    pool(2).run(scaled)


def alone(rank: int, size: int) -> str:
    """Rank 1 does not clip: an error on all ranks within the timeout."""
    ddp = wrap(Fed())
    torch.distributed.barrier()
    state = sparcomm.attach(ddp, Dense(), timeout=3.0)
    for step in range(2):  # while DDP rebuilds its buckets, it would itself wait for the rank that has left
        gradient_step(ddp, integers(SIZES, rank, step))

    def go_on() -> None:
        if rank == 0:
            state.clip_grad_norm_(1.0)
        gradient_step(ddp, integers(SIZES, rank, 2))

    with pytest.raises((sparcomm.SparcommError, RuntimeError)) as caught:
        go_on()
    state.close()
    return str(caught.value)


def test_clipping_on_one_rank_only_is_an_error_on_all() -> None:
    texts = pool(2).run(alone)
    # Whoever gives up first names the other.
    assert "rank 1" in texts[0]
    assert "rank 0" in texts[1] or "ranks [0]" in texts[1]


def bad(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    gradient_step(ddp, integers(SIZES, rank, 0))
    for limit in (0, -1.0, float("nan"), "1", True):
        with pytest.raises(ConfigError, match="must be a positive number"):
            state.clip_grad_norm_(limit)
    assert float(state.clip_grad_norm_(torch.tensor(1e6))) > 0
    assert float(state.clip_grad_norm_(math.inf)) > 0
    state.close()
    with pytest.raises(NotInitializedError):
        sparcomm.HookState(Dense()).clip_grad_norm_(1.0)


def test_a_limit_is_a_positive_number() -> None:
    pool(1).run(bad)


def local(rank: int, size: int, algorithm: Algorithm) -> None:
    """Every unit of every rank keeps to its share; what was cut is gone, and nothing else is."""
    ddp = wrap(Fed())
    limit = 40.0
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, local_clip=limit)
    total = sum(SIZES)
    fed, means = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(2))
    fired = 0
    for step in range(5):
        gradients = integers(SIZES, rank, step, bound=8 if step % 2 else 1)
        for i, mean in enumerate(gradient_step(ddp, gradients)):
            means[i] += mean
        for unit in state.stats()["per_unit"]:
            members = [int(name.removeprefix("p.")) for name in unit["names"]]
            share = limit * math.sqrt(unit["numel"] / total)
            length = norm([gradients[i] for i in members])
            fired += length > share
            for i in members:
                fed[i] += gradients[i].double() * min(1.0, share / length)
    assert fired
    everything, owed = over_ranks(fed), over_ranks(debts(state, SIZES))
    for i in range(len(SIZES)):
        assert torch.allclose(everything[i], size * means[i] + owed[i], atol=1e-3), i
    state.close()


@pytest.mark.parametrize("algorithm", [Dense(), SparDL(density=0.05)], ids=lambda a: a.name)
def test_local_clipping_comes_before_error_feedback(algorithm: Algorithm) -> None:
    pool(2).run(local, algorithm)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "1", True])
def test_a_local_limit_is_a_positive_number(limit: object) -> None:
    with pytest.raises(ConfigError, match="local_clip"):
        sparcomm.HookState(Dense(), local_clip=limit)  # type: ignore[arg-type]


def training(rank: int, size: int) -> None:
    """At 1 % with deferred clipping: learns nearly as well as dense training with torch's clipping."""
    plain, ours = wrap(net(), bucket_cap_mb=1), wrap(net(), bucket_cap_mb=1)
    state = sparcomm.attach(ours, SparDL(density=0.01), timeout=TIMEOUT)
    start = float(loss_of(plain.module).detach())
    for ddp in (plain, ours):
        optimizer = sgd(ddp)
        for step in range(80):
            optimizer.zero_grad()
            loss_of(ddp, rank=rank, step=step).backward()
            if ddp is plain:
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
            else:
                state.clip_grad_norm_(0.5, defer=True)
            optimizer.step()
    dense, sparse = (float(loss_of(d.module).detach()) for d in (plain, ours))
    assert dense < 0.2 * start
    assert start - sparse > 0.85 * (start - dense)
    assert_replicas(ours.parameters())
    state.close()


@pytest.mark.slow
def test_clipped_training_at_1_percent() -> None:
    pool(2).run(training)
