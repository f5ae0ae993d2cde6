"""Exchanges of bags whose lengths only their senders know: each is received into a buffer of the largest size possible.

``Transport.all_gather`` and ``all_to_all`` move equal sizes. Here every message is an ``exchange`` with
``capacity=True``, and the header of a bag says how long it is. Bytes sent are counted as they are; ``gather_traffic``
and ``route_traffic`` give the upper bound, which is also what transports count as received. Hosts only: NCCL needs to
know sizes, and a host would have to wait for a device's header.

``capacity_words`` is always the largest payload of a bag in words (``Packet.words``), the same on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.errors import ConfigError
from sparcomm.transport.base import Transport


def gather_traffic(capacity_words: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank at most) of ``gather_bags``."""
    rounds = log2_ceil(size)
    return rounds, rounds, (size - 1) * wire.WORD * (wire.HEADER_WORDS + capacity_words)


def gather_bags(bags: Bags, transport: Transport, bag: Tensor, capacity_words: int) -> list[Tensor]:
    """All ranks' sealed bags, by rank, each as long as it is and still to be opened.

    Bruck's all-gather: in the round with gap g a rank passes the min(g, p-g) bags it has had longest, its own first, to
    rank-g, back to back in one message. Bruck et al., "Efficient algorithms for all-to-all communications in multiport
    message-passing systems", IEEE TPDS 8(11), 1997.

    Args:
        bag: this rank's, sealed, of at most ``capacity_words`` payload words; it is in the result.

    Raises:
        DamagedBag: a header is not that of this unit and step, or says more words than have room.
        ConfigError: not on CPU, or ``bag`` is too long.
    """
    size, rank = transport.size, transport.rank
    _check_room(bag, capacity_words)
    held = [bag[: bags.length(bag, rank)]]  # of rank, rank + 1, ...
    gap = 1
    while gap < size:
        count = min(gap, size - gap)
        source = (rank + gap) % size
        send = torch.cat(held[:count]) if count > 1 else held[0]
        # Zeros, since what memory held before could be a bag of this very step.
        arrived = torch.zeros(count * (wire.HEADER_WORDS + capacity_words), dtype=torch.int32, device=bag.device)
        transport.exchange(send, (rank - gap) % size, arrived, source, capacity=True)
        held += split_bags(bags, arrived, [(source + i) % size for i in range(count)], capacity_words)
        gap *= 2
    return held[size - rank :] + held[: size - rank]


def split_bags(bags: Bags, words: Tensor, sources: list[int], capacity_words: int) -> list[Tensor]:
    """Cuts ``words``, in which bags from ``sources`` lie back to back, by their headers. Views; none is opened.

    Raises:
        DamagedBag: a header is not that of this unit and step, or says more words than are left or than a bag may have.
        ConfigError: not on CPU.
    """
    found: list[Tensor] = []
    for source in sources:
        length = bags.length(words[: wire.HEADER_WORDS + capacity_words], source)
        found.append(words[:length])
        words = words[length:]
    return found


def route_traffic(capacity_words: int, size: int) -> tuple[int, int, int]:
    """(rounds, messages, bytes sent per rank at most) of ``route_bags``."""
    return size - 1, size - 1, (size - 1) * wire.WORD * (wire.HEADER_WORDS + capacity_words)


def route_bags(transport: Transport, bags_by_rank: list[Tensor | None], capacity_words: int) -> list[Tensor | None]:
    """Sends one sealed bag to every other rank, and returns what came from each, in p-1 exchanges of one message.

    Args:
        bags_by_rank: the bag for each rank, at most ``capacity_words`` payload words. The own place is not looked at.

    Returns:
        By rank, a buffer for ``Bags.open(..., variable=True)``; None at the own place.

    Raises:
        ConfigError: a bag is missing or too long.
    """
    size, rank = transport.size, transport.rank
    if len(bags_by_rank) != size:
        raise ConfigError(f"{len(bags_by_rank)} bags for {size} ranks: must be one place for each")
    for to, bag in enumerate(bags_by_rank):
        if to != rank:
            if bag is None:
                raise ConfigError(f"no bag for rank {to}: must be one for every rank but {rank}")
            _check_room(bag, capacity_words)
    arrived: list[Tensor | None] = [None] * size
    for shift in range(1, size):
        to, source = (rank + shift) % size, (rank - shift) % size
        bag = bags_by_rank[to]
        assert bag is not None
        buffer = torch.zeros(wire.HEADER_WORDS + capacity_words, dtype=torch.int32, device=bag.device)
        transport.exchange(bag, to, buffer, source, capacity=True)
        arrived[source] = buffer
    return arrived


def _check_room(bag: Tensor, capacity_words: int) -> None:
    most = wire.HEADER_WORDS + capacity_words
    if not wire.HEADER_WORDS <= bag.numel() <= most:
        raise ConfigError(f"a bag of {bag.numel()} words: must have {wire.HEADER_WORDS} to {most}, header included")
