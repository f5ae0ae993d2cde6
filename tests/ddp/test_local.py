"""keep_local: a DDP module whose gradients stay each rank's own, and optimizers that train it, over real Gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sparcomm import ConfigError, Dense, PeerError, SparDL, attach, keep_local
from sparcomm.optim import OneBitAdam, Signum
from support.modes import assert_replicas, loss_of, net
from support.pool import pool
from support.training import Fed, wrap

MAKES: dict[str, Any] = {
    "signum": lambda p, **k: Signum(p, lr=3e-3, **k),
    "onebit": lambda p, **k: OneBitAdam(p, lr=3e-3, betas=(0.9, 0.95), warmup=3, **k),
}


def gradients_stay(rank: int, size: int, options: dict[str, Any]) -> None:
    ddp = wrap(Fed((700, 300, 40)), **options)
    keep_local(ddp)
    for step in range(3):
        own = [torch.full((n,), 10.0 * step + rank) for n in (700, 300, 40)]
        ddp.zero_grad(set_to_none=step == 1)
        twice = step == 2 and "static_graph" not in options
        if twice:
            with ddp.no_sync():
                ddp(own).backward()
        ddp(own).backward()
        for p, g in zip(ddp.parameters(), own, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, g * (2 if twice else 1))
    with pytest.raises(ConfigError, match=r"communication hook already \(pass_back\)"):
        attach(ddp, SparDL(density=0.01))


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}],
    ids=lambda o: next(iter(o), "plain"),
)  # fmt: skip
def test_gradients_are_each_rank_s_own(options: dict[str, Any]) -> None:
    pool(2).run(gradients_stay, options)


def training(rank: int, size: int, kind: str) -> tuple[float, float, int, int]:
    torch.manual_seed(rank)  # DDP makes the weights equal
    ddp = wrap(net(), gradient_as_bucket_view=rank % 2 == 0)
    keep_local(ddp)
    optimizer = MAKES[kind](ddp.parameters(), timeout=30.0)
    before = float(loss_of(ddp.module).detach())
    for step in range(12):
        if step == 5:  # as a job that was killed: each rank goes on from its own file
            saved = optimizer.state_dict()
            optimizer.close()
            optimizer = MAKES[kind](ddp.parameters(), timeout=30.0)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        optimizer.step()
        assert_replicas(ddp.parameters())
    sent, n = optimizer.traffic.bytes_sent, sum(p.numel() for p in ddp.parameters())
    optimizer.close()
    return before, float(loss_of(ddp.module).detach()), sent, n


@pytest.mark.parametrize("kind", MAKES)
def test_ddp_trains_with_an_optimizer_that_communicates(kind: str) -> None:
    for before, after, sent, n in pool(3).run(training, kind):
        assert after < 0.8 * before
        assert sent < 0.1 * 7 * 4 * n * 2 * 2 / 3  # a tenth of what seven dense steps send


def in_a_subgroup(rank: int, size: int) -> float:
    """Ranks 0 and 2 train together, rank 1 alone; with DDP's own means the result is the same as with local ones."""
    together = dist.new_group([0, 2])
    alone = dist.new_group([1])
    group = alone if rank == 1 else together
    weights: list[float] = []
    for local in (True, False):
        ddp = DistributedDataParallel(Fed((9,)), process_group=group)
        if local:
            keep_local(ddp)
        optimizer = Signum(ddp.parameters(), lr=1.0, momentum=0.0, process_group=group, algorithm=Dense())
        ddp([torch.full((9,), 3.0 if rank == 0 else -1.0)]).backward()
        optimizer.step()
        weights.append(next(ddp.parameters())[0].item())
        optimizer.close()
    assert weights[0] == weights[1]
    return weights[0]


def test_a_group_of_some_ranks() -> None:
    assert pool(3).run(in_a_subgroup) == [-1.0, 1.0, -1.0]


def failing(rank: int, size: int) -> None:
    ddp = wrap(Fed((50,)))
    keep_local(ddp)
    optimizer = Signum(ddp.parameters(), timeout=20.0)
    for step in range(2):
        ddp([torch.ones(50)]).backward()
        if step == 1 and rank == 1:
            (p,) = ddp.parameters()
            p.grad = torch.ones(50).to_sparse()
            with pytest.raises(TypeError, match="layout"):
                optimizer.step()
            break
        if step == 1:
            with pytest.raises(PeerError):
                optimizer.step()
            with pytest.raises(PeerError, match="has ended"):
                optimizer.step()
            break
        optimizer.step()
    optimizer.close()


def test_a_rank_that_fails_is_noticed_at_once() -> None:
    pool(2).run(failing, timeout=15)
