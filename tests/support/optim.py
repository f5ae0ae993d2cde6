"""Parameters that are fed with gradients of known content, on any number of simulated ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparcomm.optim.collective import CollectiveOptimizer
from sparcomm.transport import sim
from sparcomm.transport.base import Transport

SHAPES = ((5,), (3, 4), (1,), (33,), (0,))

Make = Callable[..., CollectiveOptimizer]


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[nn.Parameter]:
    """The same on every rank; dtypes take turns."""
    made = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=made) for shape in SHAPES]
    return [nn.Parameter(x.to(dtypes[i % len(dtypes)])) for i, x in enumerate(found)]


def gradients(rank: int, step: int) -> list[Tensor]:
    """Each rank's own, of very different sizes."""
    made = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=made) * 10.0 ** (i - 1) for i, shape in enumerate(SHAPES)]


def mean_gradients(size: int, step: int) -> list[Tensor]:
    """Their means over ``size`` ranks, in float64."""
    each = [gradients(rank, step) for rank in range(size)]
    return [torch.stack([g.double() for g in same]).mean(0) for same in zip(*each, strict=True)]


def feed(params: list[nn.Parameter], rank: int, step: int) -> None:
    """Sets every parameter's gradient to this rank's."""
    for p, g in zip(params, gradients(rank, step), strict=True):
        p.grad = g.to(p.dtype)


def flat(params: list[nn.Parameter]) -> Tensor:
    """All weights, in float64."""
    return torch.cat([p.detach().double().reshape(-1) for p in params])


def train(
    make: Make, size: int, steps: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,), **settings: Any
) -> list[Tensor]:
    """Weights after so many steps, by rank."""

    def rank(transport: Transport) -> Tensor:
        params = parameters(dtypes)
        optimizer = make(params, transport=transport, **settings)
        for step in range(steps):
            feed(params, transport.rank, step)
            optimizer.step()
        assert optimizer.steps == steps
        return flat(params)

    return sim.run(size, rank).results


def assert_same_bits(found: list[Tensor]) -> None:
    """All ranks have the same."""
    assert all(torch.equal(x, found[0]) for x in found)
