"""Training on the backend mpi4py: the same numbers as one process that sees all the data."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler

ROWS = 8  # of each rank's share of a batch


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).double()


def batch(step: int, p: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS * p, 12, generator=generator, dtype=torch.float64)
    return x, x[:, :4].sin()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, share: slice, p: int, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        x, y = batch(step, p)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[share]), y[share]).backward()
        optimizer.step()


def alone(p: int, count: int) -> list[Tensor]:
    """The parameters after so many steps on one process."""
    net = model()
    steps(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), slice(None), p, count)
    return [parameter.detach() for parameter in net.parameters()]


def mine(r: int) -> slice:
    return slice(r * ROWS, (r + 1) * ROWS)


def ddp(r: int, p: int) -> None:
    want = alone(p, 4)
    for options in ({}, {"bucket_cap_mb": 0.01}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        net = DistributedDataParallel(model(), **options)
        steps(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), mine(r), p, 4)
        for parameter, wanted in zip(net.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-12)
    # With a hook, whose future is the backend's.
    net = DistributedDataParallel(model(), bucket_cap_mb=0.01)
    net.register_comm_hook(None, default_hooks.allreduce_hook)
    steps(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), mine(r), p, 4)
    for parameter, wanted in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-12)


def ddp_uneven(r: int, p: int) -> None:
    """Ranks with different numbers of batches, and unused parameters that are not the same everywhere."""
    net = DistributedDataParallel(model())
    with net.join():
        for _ in range(2 + r):
            net(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    parts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.parts[which](x)

    choice = DistributedDataParallel(Choice(), find_unused_parameters=True)
    choice(torch.ones(1, 3), r % 2).sum().backward()
    count = len([i for i in range(p) if i % 2 == 1])
    gradient = parts[1].bias.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((3,), count / p))


def sparse_embedding(r: int, p: int) -> None:
    torch.manual_seed(5)
    net = DistributedDataParallel(nn.Embedding(6, 2, sparse=True))
    net(torch.tensor([r, 5])).sum().backward()
    gradient = net.module.weight.grad
    assert gradient is not None
    want = torch.zeros(6, 2)
    want[:p] += 1 / p
    want[5] += 1
    torch.testing.assert_close(gradient.to_dense(), want)


def sampler(r: int, p: int) -> None:
    data = TensorDataset(torch.arange(4 * p))
    own = list(DistributedSampler(data, seed=7))
    everyone: list[Any] = [None] * p
    dist.all_gather_object(everyone, own)
    assert sorted(i for each in everyone for i in each) == list(range(4 * p))


def sharded() -> Any:
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(net)


def fsdp(r: int, p: int) -> None:
    net = sharded()
    steps(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), mine(r), p, 4)
    for parameter, wanted in zip(net.parameters(), alone(p, 4), strict=True):
        torch.testing.assert_close(parameter.full_tensor().detach(), wanted, rtol=1e-12, atol=1e-12)


def checkpoint(r: int, p: int) -> None:
    folder = Path(sys.argv[1]) / "checkpoint"
    net = sharded()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    steps(net, optimizer, mine(r), p, 2)
    dcp.save({"model": net.state_dict()}, checkpoint_id=folder)
    kept = copy.deepcopy(net.state_dict())
    steps(net, optimizer, mine(r), p, 1, first=2)
    assert not torch.equal(net.state_dict()["0.weight"].to_local(), kept["0.weight"].to_local())
    state = {"model": net.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    net.load_state_dict(state["model"])
    for name, value in net.state_dict().items():
        assert torch.equal(value.to_local(), kept[name].to_local()), name


TRAINING: tuple[Callable[[int, int], None], ...] = (ddp, ddp_uneven, sparse_embedding, sampler, fsdp, checkpoint)
