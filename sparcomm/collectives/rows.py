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
from sparcomm.collectives.bitmap import bitmap_all_reduce, bitmap_traffic
from sparcomm.collectives.dense import dense_traffic, ordered_all_reduce
from sparcomm.kernels import Kernels
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace


def union_traffic(keys: int, union: int, width: int, itemsize: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank) of ``union_all_reduce`` where ``union`` of ``keys`` rows are had."""
    first = bitmap_traffic(keys, size)
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

    Raises:
        DamagedBag: bytes that arrived were not what was sent; on devices, too, since the host waits anyway.
    """
    kernels = bags.kernels
    words = workspace.take(wire.bitmap_words(keys), torch.int32, key.device)
    with clock.span("code"):
        kernels.bitmap_encode(key, keys, words)
    bitmap_all_reduce(words, words, bags, transport, clock, workspace)
    bags.refuse_damage()  # the union of a damaged bitmap would have a size of its own
    with clock.span("code"):
        union = kernels.ones(words)
        mine = spread(key, value, words, union.numel(), kernels)
    workspace.give(words)
    total = sum_compacted(mine.view(-1), bags, transport, clock).view_as(mine)
    bags.refuse_damage()
    return union, total


def spread(key: Tensor, value: Tensor, words: Tensor, union: int, kernels: Kernels) -> Tensor:
    """(union, width): ``value`` (k, width), of rows ``key``, at their places in a bitmap's rows; zeros elsewhere."""
    mine = value.new_zeros(union, value.shape[1])
    mine[kernels.rank(words, kernels.prefix(words), key)] = value
    return mine


def sum_compacted(mine: Tensor, bags: Bags, transport: Transport, clock: Clock) -> Tensor:
    """The sum over ranks, in their order, of ``mine`` (m,), float32 or float64; nothing is sent if m is 0. Collective.

    For an m that follows the data, the same on all ranks: no buffers are kept, which would pile up.
    """
    total = torch.empty_like(mine)
    if total.numel():
        ordered_all_reduce(mine, total, bags, transport, clock, Workspace())
    return total
