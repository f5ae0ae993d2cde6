"""Ways to train: each a model, how DDP wraps it, and a loop that a plain replica and a hooked one run alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sparcomm import HookState
from support.training import small_net, wrap

IN, OUT, WIDTH = 16, 4, 48


class Way(NamedTuple):
    """One way to train.

    Attributes:
        make: the module, with the same weights wherever it is made.
        train: (ddp, rank, steps): trains; every rank on data of its own.
        ddp: arguments of DistributedDataParallel.
        tolerance: of weights against plain DDP's, at density 1.
    """

    make: Callable[[], nn.Module]
    train: Callable[[nn.Module, int, int], None]
    ddp: Mapping[str, Any] = MappingProxyType({})
    tolerance: float = 1e-5


def batch(rank: int, step: int, part: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    """This rank's own inputs (rows, IN) and what to learn of them (rows, OUT); rank -1 has those for the test."""
    made = torch.Generator().manual_seed(1 + 100_000 * part + 1000 * step + rank)
    x = torch.randn(rows, IN, generator=made)
    return x, x[:, :OUT]


def loss_of(model: Callable[..., Tensor], *of: Any, rank: int = -1, step: int = 0, part: int = 0) -> Tensor:
    """Mean squared error on a batch; further arguments go to the model."""
    x, y = batch(rank, step, part, rows=256 if rank < 0 else 8)
    return (model(x, *of).float() - y).square().mean()


def sgd(module: nn.Module, lr: float = 0.5) -> torch.optim.Optimizer:
    """The optimizer of all ways."""
    return torch.optim.SGD(module.parameters(), lr=lr)


def flat(module: nn.Module) -> Tensor:
    """All weights as one vector, in float64."""
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


def assert_replicas(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """All ranks of the group hold the same bits."""
    mine = torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    assert all(torch.equal(mine, other) for other in everyone), "replicas differ"


# ---- loops --------------------------------------------------------------------------------------------------------


def simply(ddp: nn.Module, rank: int, steps: int) -> None:
    """Forward, backward, step."""
    optimizer = sgd(ddp)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        optimizer.step()


def accumulating(ddp: DistributedDataParallel, rank: int, steps: int) -> None:
    """Three micro-batches a step, two of them without synchronisation; gradients are zeroed, not dropped."""
    optimizer = sgd(ddp)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(3):
            with ddp.no_sync() if part < 2 else contextlib.nullcontext():
                (loss_of(ddp, rank=rank, step=step, part=part) / 3).backward()
        optimizer.step()


def alternating(ddp: nn.Module, rank: int, steps: int) -> None:
    """A branch by step and rank: sometimes a branch is unused on one rank, every third step on all."""
    optimizer = sgd(ddp)
    for step in range(steps):
        optimizer.zero_grad()
        branch = 0 if step % 3 == 0 else (step + rank) % 2
        loss_of(ddp, branch, rank=rank, step=step).backward()
        optimizer.step()


def in_phases(ddp: nn.Module, rank: int, steps: int) -> None:
    """The first layer learns in every second phase of five steps only: it is frozen after it was wrapped."""
    optimizer = sgd(ddp)
    first = next(m for m in ddp.modules() if isinstance(m, nn.Linear))
    for step in range(steps):
        first.requires_grad_(step // 5 % 2 == 0)
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        optimizer.step()
    first.requires_grad_(True)


def autocast(ddp: nn.Module, rank: int, steps: int) -> None:
    """Forward in bfloat16; weights and gradients are float32."""
    optimizer = sgd(ddp)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(ddp, rank=rank, step=step)
        loss.backward()
        optimizer.step()


def unevenly(ddp: DistributedDataParallel, rank: int, steps: int) -> None:
    """Rank 0 has three batches less than the others."""
    optimizer = sgd(ddp)
    with ddp.join():
        for step in range(steps - 3 * (rank == 0)):
            optimizer.zero_grad()
            loss_of(ddp, rank=rank, step=step).backward()
            optimizer.step()


def scaled(ddp: nn.Module, rank: int, steps: int) -> None:
    """With a scale that grows every fourth step."""
    optimizer = sgd(ddp)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, rank=rank, step=step)).backward()
        scaler.step(optimizer)
        scaler.update()


# ---- models -------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    """Three hidden layers."""
    return small_net(WIDTH)


class Branches(nn.Module):
    """Two towers; a batch goes through one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([net(), net()])

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        return self.towers[branch](x)


def frozen() -> nn.Module:
    """The first layer is fixed before DDP sees it."""
    module = net()
    module[0].requires_grad_(False)
    return module


def tied() -> nn.Module:
    """Two layers share a weight."""
    module = net()
    module[4].weight = module[2].weight
    return module


class Mixed(nn.Module):
    """Layers of float32, bfloat16 and float64."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
        linear = [layer for layer in net() if isinstance(layer, nn.Linear)]
        self.layers = nn.ModuleList([layer.to(kind) for layer, kind in zip(linear, kinds, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.tanh().to(layer.weight.dtype) if layer is not self.layers[0] else x)
        return x


class Checkpointed(nn.Module):
    """Activations of the middle are computed again in the backward pass, where autograd may call itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        layers = list(net())
        self.first, self.middle, self.last = layers[0], nn.Sequential(*layers[1:-1]), layers[-1]
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


class _GroupMean(torch.autograd.Function):
    """Mean over the ranks of DDP's own group, in both directions, as SyncBatchNorm's statistics are made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


class SyncNorm(nn.Module):
    """Batch norm over all ranks. PyTorch's SyncBatchNorm has no CPU kernels; this one communicates where that does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        moments = _GroupMean.apply(torch.cat([x.mean(0), x.square().mean(0)]))
        mean, square = moments.chunk(2)
        self.norm.running_mean.lerp_(mean.detach(), 0.1)
        return (x - mean) * (square - mean**2 + 1e-3).rsqrt() * self.norm.weight + self.norm.bias


def normed() -> nn.Module:
    """A synchronised batch norm behind every hidden layer."""
    layers: list[nn.Module] = []
    for layer in net():
        layers += [SyncNorm(WIDTH), layer] if isinstance(layer, nn.Tanh) else [layer]
    return nn.Sequential(*layers)


WAYS = {
    "plain": Way(net, simply),
    "bucket view": Way(net, simply, {"gradient_as_bucket_view": True}),
    "static graph": Way(net, simply, {"static_graph": True}),
    "no_sync": Way(net, accumulating),
    "no_sync, bucket view": Way(net, accumulating, {"gradient_as_bucket_view": True}),
    "find_unused": Way(Branches, alternating, {"find_unused_parameters": True}),
    "find_unused, bucket view": Way(
        Branches, alternating, {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    ),
    "frozen before": Way(frozen, simply),
    "frozen in phases": Way(net, in_phases, {"find_unused_parameters": True}),
    "join": Way(net, unevenly),
    "tied": Way(tied, simply),
    # Plain DDP adds bfloat16 gradients in bfloat16.
    "mixed dtypes": Way(Mixed, simply, tolerance=2e-2),
    "checkpointing": Way(lambda: Checkpointed(False), simply),
    "reentrant checkpointing, static graph": Way(lambda: Checkpointed(True), simply, {"static_graph": True}),
    "collectives of the model's own": Way(normed, simply),
    "bf16 autocast": Way(net, autocast),
    "GradScaler": Way(net, scaled),
}


def wrapped(way: Way) -> DistributedDataParallel:
    """A replica in DDP, with several buckets."""
    return wrap(way.make(), **{"bucket_cap_mb": 0.01, **way.ddp})


def owed(state: HookState, what: str = "residuals") -> dict[str, Tensor]:
    """This rank's committed residuals (or "velocity") by parameter, as a checkpoint has them."""
    (entry,) = state.state_dict().values()
    return entry["owed"][0][what]


def debts(state: HookState, sizes: Sequence[int]) -> list[Tensor]:
    """Residuals of a ``Fed`` module, zeros where nothing is owed, in float64."""
    found = owed(state)
    return [found.get(f"p.{i}", torch.zeros(n)).double() for i, n in enumerate(sizes)]


def over_ranks(mine: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all ranks, in float64."""
    sums = [t.detach().double().clone() for t in mine]
    for t in sums:
        dist.all_reduce(t)
    return sums
