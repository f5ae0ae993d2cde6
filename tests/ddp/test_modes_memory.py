"""What is fed to the algorithm: momentum correction against DGC written out, and residuals that follow the rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import ConfigError, Dense, MajorityVote, MomentumCorrection, OneBitAllReduce, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from sparcomm.ddp import advice
from support.modes import assert_replicas, debts, flat, loss_of, net, over_ranks, owed, simply
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, wrap

TIMEOUT = 30.0


def floats(n: int, rank: int, step: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * step + rank))


class Reference:
    """One rank of Deep Gradient Compression, as in the paper: all ranks' are run side by side."""

    def __init__(self, n: int, kept: int, memory: MomentumCorrection) -> None:
        self.u, self.v, self.kept, self.memory = torch.zeros(n), torch.zeros(n), kept, memory

    def send(self, g: Tensor) -> Tensor:
        m = self.memory.momentum
        self.u = m * self.u + g
        self.v = self.v + (g + m * self.u if self.memory.nesterov else self.u)
        chosen = torch.zeros_like(g, dtype=torch.bool)
        chosen[self.v.abs().topk(self.kept).indices] = True
        sent = torch.where(chosen, self.v, 0)
        self.v = torch.where(chosen, 0, self.v)
        if self.memory.masking:
            self.u = torch.where(chosen, 0, self.u)
        return sent


def as_published(rank: int, size: int, memory: MomentumCorrection) -> None:
    n, algorithm = 400, TopKAllGather(density=0.05, values="float32")
    ddp = wrap(Fed((n,)))
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, memory=memory)
    kept = int(torch.count_nonzero(gradient_step(wrap_probe(algorithm, n), [floats(n, 0, 0)])[0]))
    references = [Reference(n, kept, memory) for _ in range(size)]
    for step in range(12):
        (mean,) = gradient_step(ddp, [floats(n, rank, step)])
        want = sum(ref.send(floats(n, r, step)) for r, ref in enumerate(references)) / size
        assert torch.allclose(mean, want, atol=1e-5), step
        assert torch.allclose(owed(state)["p.0"], references[rank].v, atol=1e-5), step
        assert torch.allclose(owed(state, "velocity")["p.0"], references[rank].u, atol=1e-5), step
    assert_replicas([mean])
    state.close()


def wrap_probe(algorithm: Algorithm, n: int) -> torch.nn.Module:
    """A module of one's own, which tells how many entries a rank selects."""
    import torch.distributed as dist

    mine = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    ddp = wrap(Fed((n,)), process_group=mine)
    sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    return ddp


MEMORIES = [
    MomentumCorrection(0.9),
    MomentumCorrection(0.5, nesterov=True),
    MomentumCorrection(0.9, masking=False),
    MomentumCorrection(0.0),
]


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
def test_momentum_correction_is_as_published(memory: MomentumCorrection) -> None:
    pool(3).run(as_published, memory)


def as_momentum(rank: int, size: int, nesterov: bool, algorithm: Algorithm) -> None:
    """At density 1 it is SGD with momentum, kept before the reduction instead of behind it."""
    plain, ours = wrap(net()), wrap(net())
    memory = MomentumCorrection(0.8, nesterov=nesterov)
    state = sparcomm.attach(ours, algorithm, timeout=TIMEOUT, memory=memory)
    optimizers = [
        torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov),
        torch.optim.SGD(ours.parameters(), lr=0.1),
    ]
    for ddp, optimizer in zip((plain, ours), optimizers, strict=True):
        for step in range(8):
            optimizer.zero_grad()
            loss_of(ddp, rank=rank, step=step).backward()
            optimizer.step()
    assert torch.allclose(flat(plain), flat(ours), atol=1e-5)
    assert_replicas(ours.parameters())
    state.close()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("algorithm", [Dense(), SparDL(density=1.0)], ids=lambda a: a.name)
def test_at_density_1_momentum_correction_is_sgd_with_momentum(nesterov: bool, algorithm: Algorithm) -> None:
    pool(2).run(as_momentum, nesterov, algorithm)


def velocity_kept(rank: int, size: int) -> None:
    """A step that is skipped leaves velocities alone, and so do the rebuild and a joined rank."""
    ddp = wrap(Fed())
    memory = MomentumCorrection(0.5, masking=False)
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT, memory=memory)
    u = [torch.zeros(n) for n in SIZES]
    for step in range(5):
        gradients = integers(SIZES, rank, step)
        if step == 3:
            gradients[2][rank] = torch.nan
        gradient_step(ddp, gradients)
        if step != 3:
            u = [0.5 * a + g for a, g in zip(u, gradients, strict=True)]
        found = owed(state, "velocity")
        assert all(torch.equal(found[f"p.{i}"], a) for i, a in enumerate(u)), step
    before = owed(state, "velocity")
    with ddp.join():
        for step in range(3 * rank):
            gradient_step(ddp, integers(SIZES, rank, step))
    same = [torch.equal(t, before[name]) for name, t in owed(state, "velocity").items()]
    assert all(same) if rank == 0 else not any(same)
    state.close()


def test_velocities_are_part_of_the_step() -> None:
    pool(2).run(velocity_kept)


def corrected(rank: int, size: int, memory: Any, momentum: float) -> float:
    ddp = wrap(net(), bucket_cap_mb=1)
    start = float(loss_of(ddp.module).detach())
    state = sparcomm.attach(
        ddp, SparDL(density=0.01), timeout=TIMEOUT, memory=memory, warmup=sparcomm.DensityWarmup(20)
    )
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=momentum)
    for step in range(100):
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        optimizer.step()
    state.close()
    assert_replicas(ddp.parameters())
    return float(loss_of(ddp.module).detach()) / start


@pytest.mark.slow
def test_with_momentum_correction_it_learns_where_the_optimizers_own_momentum_fails() -> None:
    (ours, _), (plain, _) = (
        pool(2).run(corrected, memory, momentum) for memory, momentum in ((MomentumCorrection(0.9), 0.0), (None, 0.9))
    )
    assert ours < 0.2
    assert not plain < ours  # NaN, too, is no success


@pytest.mark.parametrize("kwargs", [{"momentum": 1.0}, {"momentum": -0.1}, {"momentum": "1"}, {"nesterov": 1}])
def test_a_momentum_is_below_1(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        MomentumCorrection(**kwargs)


def following_rates(rank: int, size: int, clamp: Any, rates: list[float]) -> None:
    """What was owed at one rate is delivered at another such that rate times gradient is what it was."""
    ddp = wrap(Fed())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=rates[0])
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT, optimizer=optimizer, lr_aware=clamp)
    limit = 10.0 if clamp is True else float(clamp)
    residual = [torch.zeros(n) for n in SIZES]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        ratio = 1.0 if step == 0 else min(max(rates[step - 1] / rate, 1 / limit), limit)
        gradients = integers(SIZES, rank, step)
        means = gradient_step(ddp, gradients)
        x = [r * ratio + g for r, g in zip(residual, gradients, strict=True)]
        kept = [d.float() for d in debts(state, SIZES)]
        sums = over_ranks([a - b for a, b in zip(x, kept, strict=True)])
        for i, mean in enumerate(means):
            assert torch.allclose(size * mean.double(), sums[i], atol=1e-3), (step, i)
            assert torch.allclose(torch.where(kept[i] != 0, x[i], 0), kept[i], atol=1e-3), (step, i)
        residual = kept
    assert any(r.any() for r in residual)
    state.close()


@pytest.mark.parametrize("clamp", [True, 3.0])
def test_residuals_follow_the_learning_rate_within_a_clamp(clamp: Any) -> None:
    pool(2).run(following_rates, clamp, [0.1, 0.1, 0.1, 0.05, 0.05, 0.2, 0.2, 0.001, 0.001])


def rate_of_zero(rank: int, size: int) -> None:
    ddp = wrap(net(), bucket_cap_mb=1)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    start = float(loss_of(ddp.module).detach())
    state = sparcomm.attach(ddp, SparDL(density=0.01), timeout=TIMEOUT, optimizer=optimizer, lr_aware=True)
    for step in range(64):  # beyond the rate of zero and up again
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        optimizer.step()
        scheduler.step()
    assert flat(ddp).isfinite().all()
    assert float(loss_of(ddp.module).detach()) < 0.2 * start
    assert_replicas(ddp.parameters())
    state.close()


@pytest.mark.slow
def test_a_rate_that_goes_to_zero_and_back() -> None:
    pool(2).run(rate_of_zero)


def test_rates_need_an_optimizer_and_a_clamp_of_at_least_1() -> None:
    with pytest.raises(ConfigError, match="optimizer="):
        sparcomm.HookState(SparDL(density=0.1), lr_aware=True)
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    for clamp in (0.5, "x", -1.0):
        with pytest.raises(ConfigError, match="lr_aware="):
            sparcomm.HookState(SparDL(density=0.1), lr_aware=clamp, optimizer=optimizer)  # type: ignore[arg-type]


def test_adam_with_plain_error_feedback_warns_once_and_names_the_recipe(recwarn: pytest.WarningsRecorder) -> None:
    advice._told.clear()
    params = list(net().parameters())
    adam, sgd = torch.optim.AdamW(params), torch.optim.SGD(params, lr=0.1)
    for algorithm, optimizer in ((Dense(), adam), (SparDL(density=0.01), sgd), (SparDL(density=1.0), adam)):
        sparcomm.HookState(algorithm, optimizer=optimizer)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"AdamW .*docs/tuning\.md"):
        sparcomm.HookState(SparDL(density=0.01), optimizer=adam)
    sparcomm.HookState(SparDL(density=0.01), optimizer=adam)
    assert not recwarn.list
    advice._told.clear()


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "says"),
    [
        (MajorityVote(), torch.optim.AdamW, "AdamW's second moment"),
        (OneBitAllReduce(), torch.optim.Adam, r"optim\.OneBitAdam"),
        (MajorityVote(), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), r"every weight by up to 0\.1 in"),
        (SparDL(density=0.01), sparcomm.optim.Signum, r"keep_local\(ddp\)"),
        (MajorityVote(), lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), None),
        (MajorityVote(scale=True), lambda p: torch.optim.SGD(p, lr=0.1), None),
        (OneBitAllReduce(), lambda p: torch.optim.SGD(p, lr=0.1), None),
    ],
)
def test_signs_and_an_optimizer_that_does_not_fit_them(
    algorithm: Any, optimizer: Any, says: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    advice._told.clear()
    made = optimizer(list(net().parameters()))
    if says is None:
        sparcomm.HookState(algorithm, optimizer=made)
    else:
        with pytest.warns(UserWarning, match=says):
            sparcomm.HookState(algorithm, optimizer=made)
    sparcomm.HookState(algorithm, optimizer=made)
    assert not recwarn.list
    advice._told.clear()


def untouched(rank: int, size: int) -> None:
    """The plainest options change nothing: bit for bit the same run."""
    nets = [wrap(net()), wrap(net())]
    first = sparcomm.attach(nets[0], SparDL(density=0.05), timeout=TIMEOUT)
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.5)
    second = sparcomm.attach(
        nets[1], SparDL(density=0.05), timeout=TIMEOUT, memory=sparcomm.ErrorFeedback(), warmup=0, skip=(),
        local_clip=1e9, optimizer=optimizer, lr_aware=True, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    for ddp in nets:
        simply(ddp, rank, 6)
    assert torch.equal(flat(nets[0]), flat(nets[1]))
    first.close()
    second.close()


def test_options_that_ask_for_nothing_change_nothing() -> None:
    pool(2).run(untouched)
