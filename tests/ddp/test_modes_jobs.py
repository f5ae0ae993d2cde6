"""Several hooked models in one process, and several jobs in one world."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import sparcomm
from sparcomm import Dense, HookState, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from support.modes import assert_replicas, batch, flat, loss_of, net, sgd, simply
from support.pool import pool
from support.training import small_net, wrap

TIMEOUT = 30.0


def game(
    rank: int, size: int, steps: int, algorithms: tuple[Algorithm, Algorithm] | None
) -> tuple[list[DistributedDataParallel], list[float]]:
    """A generator makes 16 numbers of 16 which a critic is to map onto the first four of them; they take turns.

    The critic learns on what the generator makes, detached; the generator learns through the critic, whose parameters
    are frozen meanwhile. Last, both learn together, through both DDP modules.
    """
    torch.manual_seed(3)
    generator = wrap(torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.Tanh(), torch.nn.Linear(48, 16)))
    critic = wrap(small_net(48))
    players = [generator, critic]
    states: list[HookState] = []
    if algorithms is not None:
        states = [sparcomm.attach(d, a, timeout=TIMEOUT) for d, a in zip(players, algorithms, strict=True)]
    optimizers = [sgd(generator, 0.2), sgd(critic, 0.2)]
    losses = []
    for step in range(steps):
        x, y = batch(rank, step)
        optimizers[1].zero_grad()
        (critic(generator.module(x).detach()) - y).square().mean().backward()
        optimizers[1].step()
        critic.requires_grad_(False)
        optimizers[0].zero_grad()
        (critic.module(generator(x)) - y).square().mean().backward()
        optimizers[0].step()
        critic.requires_grad_(True)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (critic(generator(x)) - y).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    if states:
        assert [s.step for s in states] == [2 * steps] * 2
        for state in states:
            state.close()
        for player in players:
            assert_replicas(player.parameters())
    return players, losses


def game_like_plain(rank: int, size: int) -> None:
    plain, _ = game(rank, size, 6, None)
    ours, _ = game(rank, size, 6, (SparDL(density=1.0), Dense()))
    for a, b in zip(plain, ours, strict=True):
        assert torch.allclose(flat(a), flat(b), atol=1e-6)


def test_two_models_that_learn_against_each_other_do_as_in_plain_ddp() -> None:
    pool(2).run(game_like_plain)


def game_losses(rank: int, size: int, density: float | None) -> list[float]:
    algorithms = None if density is None else (SparDL(density=density), TopKAllGather(density=density))
    return game(rank, size, 60, algorithms)[1]


def test_two_models_that_learn_against_each_other_do_so_at_1_percent() -> None:
    dense, sparse = (pool(2).run(game_losses, density)[0] for density in (None, 0.01))
    start, end = sum(dense[:3]) / 3, sum(dense[-10:]) / 10
    assert end < 0.5 * start
    assert start - sum(sparse[-10:]) / 10 > 0.8 * (start - end)


def a_job(rank: int, group: dist.ProcessGroup, peer: int, algorithm: Algorithm | None, steps: int) -> Tensor:
    ddp = wrap(net(), process_group=group)
    state = None if algorithm is None else sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    simply(ddp, peer, steps)
    if state is not None:
        assert state.step == steps
        state.close()
    assert_replicas(ddp.parameters(), group)
    return flat(ddp)


def two_jobs(rank: int, size: int) -> dict[str, Any]:
    """Ranks 0 and 3 train with one algorithm, 1 and 2 with another, for longer; neither may wait for the other."""
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    job = 0 if rank in (0, 3) else 1
    group, peer = groups[job], dist.get_rank(groups[job])
    lossless, sparse = [(Dense(), TopKAllGather(density=0.05)), (SparDL(density=1.0), SparDL(density=0.01))][job]
    steps = (3, 40)[job]
    plain = a_job(rank, group, peer, None, steps)
    assert torch.allclose(plain, a_job(rank, group, peer, lossless, steps), atol=1e-5)
    ended = a_job(rank, group, peer, sparse, steps)
    # Both jobs still share a world.
    together = torch.ones(1)
    dist.all_reduce(together)
    assert together.item() == size
    return {"job": job, "weights": ended, "plain": plain}


def test_two_jobs_on_disjoint_ranks_of_one_world() -> None:
    results = pool(4).run(two_jobs)
    for a, b in ((0, 3), (1, 2)):
        assert torch.equal(results[a]["weights"], results[b]["weights"])
    assert not torch.equal(results[0]["weights"], results[1]["weights"])
    start = net()
    torch.nn.utils.vector_to_parameters(results[1]["weights"].float(), start.parameters())
    assert float(loss_of(start).detach()) < 0.3 * float(loss_of(net()).detach())


def interleaved(rank: int, size: int) -> None:
    """Three modules; backward passes of the later ones begin before the first one's gradients have been used."""
    nets = [wrap(small_net()) for _ in range(6)]
    states = [sparcomm.attach(d, SparDL(density=1.0), timeout=TIMEOUT) for d in nets[:3]]
    for step, turn in itertools.product(range(4), range(2)):
        order = [(i + step) % 3 for i in range(3)]
        for ddp in [nets[i + 3 * turn] for i in order]:
            ddp.zero_grad()
        # One backward pass through all three: their hooks are called in turns.
        sum(loss_of(nets[i + 3 * turn], rank=rank, step=step, part=i) for i in order).backward()
        for ddp in [nets[i + 3 * turn] for i in order]:
            for p in ddp.parameters():
                p.data.sub_(p.grad, alpha=0.1)
    for ours, plain in zip(nets[:3], nets[3:], strict=True):
        assert torch.allclose(flat(ours), flat(plain), atol=1e-6)
        assert_replicas(ours.parameters())
    for state in states:
        assert state.step == 4
        state.close()


def test_one_backward_pass_through_three_hooked_modules() -> None:
    pool(2).run(interleaved)
