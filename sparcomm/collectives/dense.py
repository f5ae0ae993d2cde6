"""Our dense all-reduce: sums in rank order, so that every rank and every backend gives the same bits.

all_to_all of p chunks, each owner adds them in rank order, all_gather of the sums; every chunk travels in a bag. The
sparse algorithms fall back to it where its bytes are fewer, and ``Dense`` is it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace


def log2_ceil(size: int) -> int:
    """Rounds of a Bruck all-gather over ``size`` ranks."""
    return (size - 1).bit_length()


def dense_traffic(n: int, itemsize: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank) of ``ordered_all_reduce`` of n elements over ``size`` ranks."""
    if size == 1 or n == 0:
        return 0, 0, 0
    bag = wire.WORD * wire.HEADER_WORDS + -(-n // size) * itemsize
    return 1 + log2_ceil(size), size - 1 + log2_ceil(size), 2 * (size - 1) * bag


def ordered_all_reduce(
    x: Tensor, out: Tensor, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
) -> None:
    """Writes into ``out`` (n,) the sum over ranks of ``x`` (n,), both float32 or float64; sets bags' non-finite bit."""
    n, size = x.numel(), transport.size
    if size == 1:
        bags.note_nonfinite(x)
        out.copy_(x)
        return
    chunk = -(-n // size)
    with clock.span("code"):
        words = wire.HEADER_WORDS + chunk * x.element_size() // wire.WORD
        buffers = [workspace.take(size * words, torch.int32, x.device) for _ in range(2)]
        rows, arrived = (b.view(size, words) for b in buffers)
        values = _values(rows, x.dtype)
        whole = n // chunk
        values[:whole] = x[: whole * chunk].view(whole, chunk)
        values[whole:] = 0
        if n % chunk:
            values[whole, : n % chunk] = x[whole * chunk :]
        for rank in range(size):
            bags.seal(rows[rank])
    with clock.span("wire"):
        transport.all_to_all(arrived, rows)
    with clock.span("code"):
        total = _values(arrived, x.dtype)
        mine = rows[0]  # reused: all of ``rows`` has been sent
        acc = _values(rows, x.dtype)[0]
        for rank in range(size):
            bags.open(arrived[rank], rank)
            acc.copy_(total[rank]) if rank == 0 else acc.add_(total[rank])
        bags.note_nonfinite(acc)
        bags.seal(mine)
    with clock.span("wire"):
        transport.all_gather(arrived, mine)
    with clock.span("code"):
        for rank in range(size):
            bags.open(arrived[rank], rank)
            part = out[rank * chunk : (rank + 1) * chunk]
            part.copy_(total[rank, : part.numel()])
    workspace.give(*buffers)


def _values(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The payloads of ``rows`` (size, words) as (size, chunk) of ``dtype``: a view that skips the headers."""
    return rows.view(dtype)[:, wire.HEADER_WORDS * wire.WORD // dtype.itemsize :]
