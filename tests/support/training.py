"""Small DDP modules whose gradients are exactly what a test says, and algorithms that misbehave on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparcomm.algorithms import Algorithm, Reduced, State
from sparcomm.algorithms.base import Cost, derived, per_element, shared
from sparcomm.algorithms.dense import Dense
from sparcomm.dtypes import working_dtype
from sparcomm.transport.base import Transport

SIZES = (700, 300, 40, 900, 5, 60)
TINY_MB = 0.001  # of bucket: about 260 float32 elements, so that SIZES make several buckets


class Fed(nn.Module):
    """Parameters of the given lengths; ``backward`` of the output gives parameter i the gradient ``gradients[i]``."""

    def __init__(self, sizes: Sequence[int] = SIZES, dtypes: Iterable[torch.dtype] = ()) -> None:
        super().__init__()
        kinds = list(dtypes) or [torch.float32] * len(sizes)
        self.p = nn.ParameterList([nn.Parameter(torch.zeros(n, dtype=d)) for n, d in zip(sizes, kinds, strict=True)])

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        used = [
            (p.to(working_dtype(p.dtype)) * g).sum() for p, g in zip(self.p, gradients, strict=True) if g is not None
        ]
        return torch.stack([u.double() for u in used]).sum()


def wrap(module: nn.Module, **kwargs: Any) -> DistributedDataParallel:
    """In DDP with small buckets."""
    return DistributedDataParallel(module, **({"bucket_cap_mb": TINY_MB} | kwargs))


def integers(sizes: Sequence[int], rank: int, step: int, bound: int = 8) -> list[Tensor]:
    """Small integer gradients; magnitudes differ between entries, so that a selection has something to select."""
    made = torch.Generator().manual_seed(10_000 * step + rank)
    return [torch.randint(-bound, bound + 1, (n,), generator=made).float() for n in sizes]


def gradient_step(ddp: nn.Module, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """One synchronised forward and backward pass; the means DDP delivers, by parameter, as copies."""
    ddp.zero_grad()
    ddp(gradients).backward()
    return [torch.empty(0) if p.grad is None else p.grad.detach().clone() for p in ddp.parameters()]


def small_net(width: int = 24) -> nn.Module:
    """A few layers, the same weights wherever it is made."""
    torch.manual_seed(7)
    layers = [nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def net_step(ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    """One training step on this rank's own random data: learn the first inputs."""
    made = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 16, generator=made)
    optimizer.zero_grad()
    loss = (ddp(x) - x[:, :4]).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@dataclass(frozen=True)
class Breaking(Dense):
    """Dense, but rank ``rank`` raises ValueError in unit 0 of step ``at``."""

    name: ClassVar[str] = "breaking"
    rank: int = 1
    at: int = 3

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        if transport.rank == self.rank and step == self.at:
            raise ValueError(f"no luck on rank {self.rank}")
        return super()._reduce(grad, residual, state, step, transport)


@dataclass
class HalvesState(State):
    """``seen``: sum of this rank's gradients; ``count``: steps committed; ``scratch``: never saved."""

    seen: Tensor = per_element(default_factory=lambda: torch.zeros(0))
    count: Tensor = shared(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    scratch: int = derived(default=0)


@dataclass(frozen=True)
class Halves(Algorithm):
    """Sends every entry whose index plus step is even and keeps the others: a residual of known content."""

    name: ClassVar[str] = "halves"

    @property
    def conserves(self) -> bool:
        return True

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        return [cls()]

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> HalvesState:
        return HalvesState(seen=torch.zeros(n, dtype=working_dtype(dtype), device=device))

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        assert isinstance(state, HalvesState)
        wide = grad.to(working_dtype(grad.dtype))
        x = wide.clone() if residual is None else wide + residual
        sent = torch.arange(x.numel()) % 2 == step % 2
        total = torch.where(sent, x, 0)
        transport.all_reduce(total)
        ok = torch.isfinite(x).all().to(torch.uint8)
        transport.all_reduce(ok.view(1), "band")
        kept = torch.where(sent, 0, x)
        return Reduced(
            total, kept, None, replace(state, seen=state.seen + wide, count=state.count + 1), ok.view(()) != 0
        )

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        return Cost(0, 0, 0)

    def kept(self, n: int, size: int) -> int:
        return n
