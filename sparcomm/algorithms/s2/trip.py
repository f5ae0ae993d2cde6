"""The round trip: tables are summed and bitmaps ORed in the same messages, one chunk of both a rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.s2.sizes import Trip
from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import deal, payloads
from sparcomm.transport.base import Transport


class Brought(NamedTuple):
    """The sum of the tables (lanes,), the OR of the bitmaps (bits,), and the largest of the words more."""

    table: Tensor | None
    words: Tensor
    peak: int


def round_trip(
    trip: Trip, table: Tensor | None, words: Tensor, peak: int, bags: Bags, transport: Transport, clock: Clock
) -> Brought:
    """all_to_all, sum and OR in rank order, all_gather: the same bits on every rank. Collective.

    Args:
        table: (trip.lanes,), only read; None if there are no lanes. Of floats, the non-finite bit is set if a sum is
            inf or NaN.
        words: (trip.bits,) int32, only read.
        peak: what is sent if the trip has room for it; else comes back as it is.
    """
    if transport.size == 1:
        if table is not None and table.is_floating_point():
            bags.note_nonfinite(table)
        return Brought(table, words, peak)
    size = transport.size
    rows, arrived = (bags.empty(trip.words, rows=size) for _ in range(2))
    with clock.span("code"):
        _fill(trip, rows, table, words, peak)
        for row in rows:
            bags.seal(row)
    with clock.span("wire"):
        transport.all_to_all(arrived, rows)
    with clock.span("code"):
        for rank in range(size):
            bags.open(arrived[rank], rank)
        own = rows[0]  # free again, as all the others
        if table is not None:
            came, total = _lanes(trip, arrived, table.dtype), _lanes(trip, rows, table.dtype)[0]
            total.copy_(came[0])
            for part in came[1:]:
                total.add_(part)
            if table.is_floating_point():
                bags.note_nonfinite(total)
        bags.kernels.unite(_bitmap(trip, arrived), _bitmap(trip, rows)[0])
        if trip.peak:
            _peaks(trip, own).copy_(_peaks(trip, arrived).amax(0))
        bags.seal(own)
    with clock.span("wire"):
        transport.all_gather(arrived, own)
    with clock.span("code"):
        for rank in range(size):
            bags.open(arrived[rank], rank)
        bags.refuse_damage()
        united = _bitmap(trip, arrived).reshape(-1)[: trip.bits].contiguous()
        summed = None if table is None else _lanes(trip, arrived, table.dtype).reshape(-1)[: trip.lanes].contiguous()
        return Brought(summed, united, int(_peaks(trip, arrived).max()) if trip.peak else peak)


def _fill(trip: Trip, rows: Tensor, table: Tensor | None, words: Tensor, peak: int) -> None:
    if table is not None:
        deal(table, _lanes(trip, rows, table.dtype))
    deal(words, _bitmap(trip, rows))
    rows[:, wire.HEADER_WORDS + trip.bitmap.stop :] = peak  # and the padding


def _lanes(trip: Trip, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return payloads(rows, dtype)[:, : trip.chunk]


def _bitmap(trip: Trip, rows: Tensor) -> Tensor:
    return rows[:, wire.HEADER_WORDS :][:, trip.bitmap]


def _peaks(trip: Trip, rows: Tensor) -> Tensor:
    """The word more of one bag or of several."""
    return rows[..., wire.HEADER_WORDS + trip.bitmap.stop :]
