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
    rows = Rows(chunk, x, bags, transport, clock, workspace)
    with clock.span("code"):
        rows.fill(x)
    rows.reduce_scatter()
    with clock.span("code"):
        bags.seal(rows.bags[0])
    with clock.span("wire"):
        transport.all_gather(rows.arrived, rows.bags[0])
    with clock.span("code"):
        rows.collect(out)
    workspace.give(*rows.buffers)


class Rows:
    """One bag for every rank, each holding that rank's part of a vector, and room for those that come from the others.

    Args:
        chunk: elements of a part.
        like: gives dtype and device.

    Attributes:
        bags, arrived: (size, words) int32 each.
        buffers: what they lie in, of the workspace, for whoever is done with them to give back.
        values, came: (size, chunk), the payloads of ``bags``, of which row r is for rank r, and of ``arrived``.
    """

    def __init__(
        self, chunk: int, like: Tensor, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
    ) -> None:
        self._sealer, self._transport, self._clock = bags, transport, clock
        size = transport.size
        words = wire.HEADER_WORDS + chunk * like.element_size() // wire.WORD
        self.buffers = [workspace.take(size * words, torch.int32, like.device) for _ in range(2)]
        self.bags, self.arrived = (b.view(size, words) for b in self.buffers)
        self.values, self.came = (payloads(b, like.dtype) for b in (self.bags, self.arrived))

    def fill(self, x: Tensor) -> None:
        """Writes a vector of at most size * chunk elements into ``values``, rank after rank, and zeros behind it."""
        deal(x, self.values)

    def exchange(self) -> None:
        """Seals and sends the rows; what came is still to be opened. Collective."""
        with self._clock.span("code"):
            for bag in self.bags:
                self._sealer.seal(bag)
        with self._clock.span("wire"):
            self._transport.all_to_all(self.arrived, self.bags)

    def collect(self, out: Tensor) -> None:
        """Opens the bags of an all-gather in ``arrived``, and writes what they hold into ``out``, rank after rank."""
        chunk = self.came.shape[1]
        for rank in range(self._transport.size):
            self._sealer.open(self.arrived[rank], rank)
            part = out[rank * chunk : (rank + 1) * chunk]
            part.copy_(self.came[rank, : part.numel()])

    def reduce_scatter(self) -> Tensor:
        """Sends the rows, and adds what arrives in rank order; sets bags' non-finite bit. Collective.

        Returns:
            (chunk,) the sum of this rank's part: the payload of ``bags[0]``, which is free again, as all the others.
        """
        self.exchange()
        with self._clock.span("code"):
            total = self.values[0]
            for rank in range(self._transport.size):
                self._sealer.open(self.arrived[rank], rank)
                total.copy_(self.came[rank]) if rank == 0 else total.add_(self.came[rank])
            self._sealer.note_nonfinite(total)
        return total


def deal(x: Tensor, chunks: Tensor) -> None:
    """Writes ``x`` (m,), m at most p * chunk, row after row into ``chunks`` (p, chunk), and zeros behind it."""
    chunk = chunks.shape[1]
    whole, rest = divmod(x.numel(), chunk)
    chunks[:whole] = x[: whole * chunk].view(whole, chunk)
    chunks[whole:] = 0
    if rest:
        chunks[whole, :rest] = x[whole * chunk :]


def payloads(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The payloads of ``rows`` (size, words) as (size, chunk) of ``dtype``: a view that skips the headers."""
    return rows.view(dtype)[:, wire.HEADER_WORDS * wire.WORD // dtype.itemsize :]
