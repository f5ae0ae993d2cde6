"""Running an algorithm on the simulator, and the sums that must come out of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms import Algorithm, Reduced, State
from sparcomm.dtypes import working_dtype
from sparcomm.transport import sim
from sparcomm.transport.base import Traffic, Transport


def integers(n: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, a quarter of them zero: their sums are exact in every width."""
    made = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randint(-8, 9, (n,), generator=made)
    return (x * (torch.rand(n, generator=made) > 0.25)).to(dtype)


def normals(n: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values."""
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def steps(
    algorithm: Algorithm, gradients: list[list[Tensor]], transport: Transport, wants_total: bool = True
) -> tuple[list[Reduced], State, list[Traffic]]:
    """Feeds this rank's ``gradients[step][rank]`` through ``algorithm`` with error feedback; traffic of every step."""
    first = gradients[0][transport.rank]
    state = algorithm.init(first.numel(), first.dtype, first.device, transport.size)
    state.wants_total = wants_total
    residual, done, traffic = None, [], []
    for step, by_rank in enumerate(gradients):
        before = vars(transport.traffic).copy()
        reduced = algorithm.reduce(by_rank[transport.rank], residual, state, step, transport)
        residual, state = reduced.residual, reduced.state
        done.append(reduced)
        after = vars(transport.traffic)
        traffic.append(Traffic(**{k: after[k] - before[k] for k in before}))
    return done, state, traffic


def simulate(
    algorithm: Algorithm, gradients: list[list[Tensor]], wants_total: bool = True
) -> list[tuple[list[Reduced], State, list[Traffic]]]:
    """``steps`` on every rank of a simulated group: one result per rank."""
    return sim.run(len(gradients[0]), lambda t: steps(algorithm, gradients, t, wants_total)).results


def recycled(algorithm: Algorithm, gradients: list[list[Tensor]]) -> list[list[Reduced]]:
    """``steps``, but every buffer is spoilt and given back as soon as it can be; copies of what came out.

    Checks that neither gradients nor residuals are modified, and that later steps live on what was given back.
    """

    def rank(transport: Transport) -> list[Reduced]:
        first = gradients[0][transport.rank]
        state = algorithm.init(first.numel(), first.dtype, first.device, transport.size)
        residual, done, buffers = None, [], []
        for step, by_rank in enumerate(gradients):
            grad = by_rank[transport.rank]
            before = [_copy(grad), _copy(residual)]
            reduced = algorithm.reduce(grad, residual, state, step, transport)
            for was, now in zip(before, (grad, residual), strict=True):
                assert was is None or (now is not None and torch.equal(was, now)), "an argument was modified"
            done.append(reduced._replace(total=reduced.total.clone(), residual=_copy(reduced.residual)))
            buffers += [t for t in (reduced.total, reduced.residual) if not any(t is b for b in (None, *buffers))]
            for t in (reduced.total, residual):
                if t is not None:
                    state.workspace.give(t.fill_(float("nan")))
            residual, state = reduced.residual, reduced.state
        assert len(buffers) <= 3, "a total and two residuals are enough"
        return done

    return sim.run(len(gradients[0]), rank).results


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def with_residual(grad: Tensor, residual: Tensor | None) -> Tensor:
    """What a rank puts in: gradient + residual, in the working dtype."""
    wide = grad.to(working_dtype(grad.dtype))
    return wide if residual is None else wide + residual


def owed(residual: Tensor | None, like: Tensor) -> Tensor:
    """A residual as a tensor."""
    return torch.zeros_like(like) if residual is None else residual


class Damaging:
    """A transport that flips one bit of what arrives in its ``at``-th call; everything else is passed on."""

    def __init__(self, transport: Transport, at: int, seed: int, parent: Damaging | None = None) -> None:
        self._transport, self._left, self._random = transport, at, random.Random(seed)
        self._parent = parent
        self.hit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def split(self, color: int, key: int) -> Damaging:
        """Its calls count as this one's."""
        return Damaging(self._transport.split(color, key), 0, 0, self)

    def _count(self, call: Callable[[], None], arrived: Tensor | None, capacity: bool = False) -> None:
        call()
        if capacity and arrived is not None:  # only a bag has arrived, not the room behind it
            arrived = arrived[: wire.HEADER_WORDS + int(arrived[2])]
        self._arrive(arrived)

    def _arrive(self, arrived: Tensor | None) -> None:
        if self._parent is not None:
            self._parent._arrive(arrived)
            return
        self._left -= 1
        if self._left == -1 and arrived is not None and arrived.numel():
            raw = arrived.view(-1).view(torch.uint8)
            raw[self._random.randrange(raw.numel())] ^= 1 << self._random.randrange(8)
            self.hit = True

    def exchange(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, *, capacity: bool = False
    ) -> None:
        self._count(lambda: self._transport.exchange(send, to, recv, source, capacity=capacity), recv, capacity)

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        other = (self._transport.rank + 1) % self._transport.size
        self._count(lambda: self._transport.all_to_all(out, x), out[other])

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        other = (self._transport.rank + 1) % self._transport.size
        self._count(lambda: self._transport.all_gather(out, x), out[other])
