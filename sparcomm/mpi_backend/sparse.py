"""All-reduce of sparse COO tensors, as gradients of embeddings are: entries are gathered on all ranks, and added."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend.channel import Channel
from sparcomm.mpi_backend.work import Steps


def check(t: Tensor, op: Any) -> None:
    """Raises ValueError unless the operation is a sum or mean."""
    if op != dist.ReduceOp.SUM and op != dist.ReduceOp.AVG:
        raise ValueError(f"all_reduce of a sparse tensor of {t.dtype}: takes SUM and AVG")


def reduce_all(channel: Channel, t: Tensor, op: Any, tag: int) -> Steps:
    """``t`` becomes the sum, or mean, of all ranks' ``t``, coalesced."""
    check(t, op)
    mine = t.detach().coalesce().to("cpu")
    count = torch.tensor([mine.values().shape[0]])
    counts = torch.empty(channel.size, dtype=torch.int64)
    yield from channel.gather_all(counts, count, tag)
    everyone = range(channel.size)
    gathered: list[Tensor] = []
    for part in (mine.indices().t().contiguous(), mine.values().contiguous()):
        rows = [part.new_empty((int(n), *part.shape[1:])) for n in counts]
        yield from channel.exchange(dict.fromkeys(everyone, part), dict(enumerate(rows)), tag)
        gathered.append(torch.cat(rows))
    total = torch.sparse_coo_tensor(gathered[0].t(), gathered[1], t.shape).coalesce()
    with torch.no_grad():
        t.copy_(total / channel.size if op == dist.ReduceOp.AVG else total)
