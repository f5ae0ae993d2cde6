"""The all-reduce of vectors that are zero but for some rows: which rows anyone has, then their dense sum.

Two phases. The row numbers of all ranks are united as a bitmap; after that every rank knows the same rows, in the same
order, and the ordered dense all-reduce (``dense.py``) sums them with all others left out. Bytes are those of the
bitmap plus those of a dense vector of the union. Every element is added in rank order and a rank without a row adds
zeros, so the sum has the bits that the dense all-reduce of the whole vectors gives.

The size of the second phase is known to the host only after the first: not for backends that must not wait (NCCL).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import dense_traffic, ordered_all_reduce
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace


def union_traffic(keys: int, union: int, width: int, itemsize: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank) of ``union_all_reduce`` where ``union`` of ``keys`` rows are had."""
    first = _bitmap_traffic(keys, size)
    second = dense_traffic(union * width, itemsize, size)
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]


def union_all_reduce(
    key: Tensor, value: Tensor, keys: int, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Sums rows over ranks. Collective; no rank needs to have any. Arguments are not modified.

    Args:
        key: (k,) int64, strictly increasing row numbers below ``keys``; k differs between ranks.
        value: (k, width) float32 or float64, contiguous; ``width`` is the same on all ranks.
        keys: number of all rows.
        bags: its non-finite bit tells afterwards whether any rank had an inf or NaN, as with the dense all-reduce.
        workspace: lends buffers for the bitmap. What depends on the union is allocated anew: its size varies.

    Returns:
        (u,) int64 increasing, the rows that any rank has, and (u, width) their sums; the same bits on every rank.
    """
    union = _united(key, keys, bags, transport, clock, workspace)
    width = value.shape[1]
    with clock.span("code"):
        mine = value.new_zeros(union.numel(), width)
        mine[torch.searchsorted(union, key)] = value
    total = torch.empty_like(mine)
    if total.numel():  # all ranks agree on that
        passing = Workspace()  # of other sizes in every step: kept, they would pile up
        ordered_all_reduce(mine.view(-1), total.view(-1), bags, transport, clock, passing)
    return union, total


def _bitmap_traffic(keys: int, size: int) -> tuple[int, int, int]:
    words = wire.bitmap_words(keys)
    if size == 1 or not words:
        return 0, 0, 0
    rounds = (size - 1).bit_length()
    return 1 + rounds, size - 1 + rounds, 2 * (size - 1) * -(-words // size) * wire.WORD


def _united(key: Tensor, keys: int, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace) -> Tensor:
    """The rows that any rank has, increasing."""
    with clock.span("code"):
        words = workspace.take(wire.bitmap_words(keys), torch.int32, key.device)
        bags.kernels.bitmap_encode(key, keys, words)
    if words.numel() and transport.size > 1:
        with clock.span("wire"):
            transport.all_reduce(words, "bor")
    with clock.span("code"):
        bits = words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
        workspace.give(words)
        return bits.view(-1).nonzero().view(-1)
