"""Parameters that a step does not use: whatever is owed for them waits, and nothing of it is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import ConfigError, Dense, SparDL
from sparcomm.algorithms import Algorithm
from support.modes import assert_replicas, debts, over_ranks
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, wrap

TIMEOUT = 30.0


def conserved(rank: int, size: int, algorithm: Algorithm, kwargs: dict[str, Any], how: str, keep: bool) -> None:
    """Parameter 0 is never used on rank 0, parameter 1 on no rank from step 2 on, parameter 3 in turns."""
    ddp = wrap(Fed(), find_unused_parameters=True, **kwargs)
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    fed, means = ([torch.zeros(n) for n in SIZES] for _ in range(2))
    idle = None
    for step in range(7):
        gradients: list[Tensor | None] = [*integers(SIZES, rank, step)]
        unused = {0: rank == 0, 1: step >= 2, 3: step % 2 == 1}
        for i, gone in unused.items():
            if gone and (how == "left out" or i == 0):
                gradients[i] = None
            ddp.module.p[i].requires_grad_(not (gone and gradients[i] is not None))
        if step == 2:
            idle = debts(state, SIZES)[1]
        for p in ddp.parameters():
            p.grad = None if p.grad is None or not keep else p.grad.zero_()
        ddp(gradients).backward()
        for i, p in enumerate(ddp.parameters()):
            if gradients[i] is not None and p.requires_grad:
                fed[i] += gradients[i]
            if p.grad is not None:
                means[i] += p.grad
    after = debts(state, SIZES)
    if not kwargs and not isinstance(algorithm, SparDL):
        assert idle is not None
        assert bool((idle != 0).any())
        assert torch.equal(after[1], idle)
    everything, owed = over_ranks(fed), over_ranks(after)
    for i in range(len(SIZES)):
        assert torch.equal(everything[i], size * means[i].double() + owed[i]), i
    assert_replicas(means)
    state.close()


@pytest.mark.parametrize("how", ["left out", "frozen"])
@pytest.mark.parametrize("keep", [False, True], ids=["grads dropped", "grads zeroed"])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_as_bucket_view": True}], ids=["copied", "bucket view"])
@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.05)], ids=lambda a: a.name)
def test_nothing_owed_for_an_unused_parameter_is_lost(
    algorithm: Algorithm, kwargs: dict[str, Any], keep: bool, how: str
) -> None:
    pool(2).run(conserved, algorithm, kwargs, how, keep)


def uneven_and_unused(rank: int, size: int) -> None:
    """A joined rank owes for a parameter that nobody uses any longer."""
    ddp = wrap(Fed(), find_unused_parameters=True)
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT)
    fed, means = ([torch.zeros(n) for n in SIZES] for _ in range(2))
    with ddp.join():
        for step in range(3 + 3 * rank):
            gradients: list[Tensor | None] = [*integers(SIZES, rank, step)]
            if step >= 3:
                gradients[1] = None
            for i, mean in enumerate(gradient_step(ddp, gradients)):
                if gradients[i] is not None:
                    fed[i] += gradients[i]
                if mean.numel():
                    means[i] += mean
    # Rank 1 saw every step.
    everything, left, seen = over_ranks(fed), over_ranks(debts(state, SIZES)), over_ranks([m * rank for m in means])
    for i in range(len(SIZES)):
        assert torch.equal(everything[i], size * seen[i] + left[i]), i
    state.close()


def test_a_joined_rank_owes_for_a_parameter_that_nobody_uses() -> None:
    pool(2).run(uneven_and_unused)


def left_out(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    if not hasattr(ddp, "skip_all_reduce_unused_params"):
        return
    ddp = wrap(Fed(), find_unused_parameters=True, skip_all_reduce_unused_params=True)
    with pytest.raises(ConfigError, match="skip_all_reduce_unused_params"):
        sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)


def test_buckets_that_ddp_would_leave_out_are_refused() -> None:
    """Without its last bucket no step would ever count, and all residuals would be forgotten in silence."""
    pool(2).run(left_out)


def never_used(rank: int, size: int) -> None:
    """A static graph without one parameter, and one that DDP is told to ignore."""
    module = Fed()
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["p.2"])
    ddp = wrap(module, static_graph=True)
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT)
    for step in range(4):
        gradients: list[Tensor | None] = [*integers(SIZES, rank, step)]
        gradients[4] = None
        means = gradient_step(ddp, gradients)
        assert torch.equal(means[2], integers(SIZES, rank, step)[2])  # this rank's own
    assert set(state.stats()["per_parameter"]) == {f"p.{i}" for i in range(len(SIZES)) if i != 2}
    assert not debts(state, SIZES)[4].any()
    assert state.step == 4
    state.close()


def test_parameters_that_are_never_used_or_ignored() -> None:
    pool(2).run(never_used)
