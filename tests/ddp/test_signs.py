"""The sign methods behind the hook: means of plus and minus one, and nothing lost with error feedback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import MajorityVote, OneBitAllReduce
from sparcomm.algorithms import Algorithm
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, wrap


def delivered(rank: int, size: int, algorithm: Algorithm, steps: int, flush: bool) -> list[list[Tensor]]:
    """Means by step and parameter, and last what a flush adds."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=30.0)
    means = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(steps)]
    if flush:
        ddp.zero_grad()
        state.flush()
        means.append(
            [torch.zeros(n) if p.grad is None else p.grad for n, p in zip(SIZES, ddp.parameters(), strict=True)]
        )
    state.close()
    return means


def test_means_are_plus_and_minus_one() -> None:
    ranks = pool(4).run(delivered, MajorityVote(), 3, False)
    for step in range(3):
        everyone = [integers(SIZES, rank, step) for rank in range(4)]
        for i, mean in enumerate(ranks[0][step]):
            assert (mean.abs() == 1).all()
            votes = sum(g[i].sign() for g in everyone)
            clear = votes.abs() > sum((g[i] == 0).float() for g in everyone)
            assert torch.equal(mean[clear], votes[clear].sign())
            assert all(torch.equal(mean, means[step][i]) for means in ranks)


@pytest.mark.parametrize("algorithm", [MajorityVote(mask=True, scale=True, error_feedback=True), OneBitAllReduce()])
def test_a_flush_delivers_what_is_owed(algorithm: Algorithm) -> None:
    ranks = pool(4).run(delivered, algorithm, 4, True)
    for i in range(len(SIZES)):
        fed = sum(integers(SIZES, rank, step)[i].double() for rank in range(4) for step in range(4)) / 4
        got = sum(means[i].double() for means in ranks[0])
        torch.testing.assert_close(got, fed, rtol=0, atol=1e-5)
