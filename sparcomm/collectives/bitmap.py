"""OR of the ranks' bitmaps, on any backend: NCCL has no bitwise OR, and a sum of uint8 wraps at 256.

Two ways, chosen by sizes alone, so that all ranks choose alike. In two phases: all_to_all of p chunks, each owner ORs
what arrives, all_gather of the results; 2(p-1)/p of the bitmap are sent, however many ranks there are. Flat: all_gather
of whole bitmaps, and everybody ORs all of them, which saves the round of p-1 messages before. All travels in bags.
"""

from __future__ import annotations

from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import Rows, log2_ceil, payloads
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace

# What saving a round is worth in bytes. It takes 0.1 ms or more in Ethernet, in which 4 KiB pass from 40 MB/s on; on a
# slower link a third of a millisecond at most may be lost (at 12 MB/s), and only by bitmaps that are small anyway.
ROUND_BYTES = 4096


def bitmap_traffic(m: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank) of ``bitmap_all_reduce`` over m positions and ``size`` ranks."""
    words = wire.bitmap_words(m)
    if size == 1 or words == 0:
        return 0, 0, 0
    gather = log2_ceil(size)
    if is_flat(words, size):
        return gather, gather, (size - 1) * _bag_bytes(words)
    return 1 + gather, size - 1 + gather, 2 * (size - 1) * _bag_bytes(-(-words // size))


def is_flat(words: int, size: int) -> bool:
    """Whether whole bitmaps of so many words go to everybody: no more bytes than two phases plus ROUND_BYTES."""
    return (size - 1) * (_bag_bytes(words) - 2 * _bag_bytes(-(-words // size))) <= ROUND_BYTES


def bitmap_all_reduce(
    words: Tensor, out: Tensor, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
) -> None:
    """Writes into ``out`` the OR over ranks of ``words``, both (w,) int32; ``out`` may be ``words``. Collective.

    The bags' status bits travel with it: afterwards all ranks have seen those of all.

    Raises:
        DamagedBag: (CPU) what a rank sent did not arrive as it was.
    """
    if transport.size == 1 or words.numel() == 0:
        out.copy_(words)
    elif is_flat(words.numel(), transport.size):
        _flat(words, out, bags, transport, clock, workspace)
    else:
        _two_phases(words, out, bags, transport, clock, workspace)


def _bag_bytes(words: int) -> int:
    return wire.WORD * (wire.HEADER_WORDS + words)


def _flat(words: Tensor, out: Tensor, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace) -> None:
    size, length = transport.size, wire.HEADER_WORDS + words.numel()
    buffer = workspace.take(size * length, words.dtype, words.device)
    arrived = buffer.view(size, length)
    with clock.span("code"):
        own = arrived[transport.rank]
        own[wire.HEADER_WORDS :] = words
        bags.seal(own)
    with clock.span("wire"):
        transport.all_gather(arrived, own)
    with clock.span("code"):
        for rank in range(size):
            bags.open(arrived[rank], rank)
        bags.kernels.unite(payloads(arrived, words.dtype), out)
    workspace.give(buffer)


def _two_phases(
    words: Tensor, out: Tensor, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
) -> None:
    rows = Rows(-(-words.numel() // transport.size), words, bags, transport, clock, workspace)
    with clock.span("code"):
        rows.fill(words)
    rows.exchange()
    with clock.span("code"):
        for rank in range(transport.size):
            bags.open(rows.arrived[rank], rank)
        bags.kernels.unite(rows.came, rows.values[0])
        bags.seal(rows.bags[0])
    with clock.span("wire"):
        transport.all_gather(rows.arrived, rows.bags[0])
    with clock.span("code"):
        rows.collect(out)
    workspace.give(*rows.buffers)
