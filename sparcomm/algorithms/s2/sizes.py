"""How a vector is cut into keys, and what the messages about them hold: functions of sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sparcomm import wire
from sparcomm.collectives.dense import dense_traffic, log2_ceil

PEEL_ROWS = 3
SPARE_CELLS = 32  # of a table to be peeled: what a few keys need beyond any ratio

Traffic = tuple[int, int, int]  # rounds, messages, bytes sent by a rank


def plus(a: Traffic, b: Traffic) -> Traffic:
    """One after the other."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def peel_ratio(keys: int) -> float:
    """Cells per key with which peeling nearly always gets through; below 1.222 it fails however many keys there are."""
    if keys > 10_000:
        return 1.3
    return 1.35 if keys > 1000 else 1.5


def peel_columns(keys: int, ratio: float | None) -> int:
    """Columns of each of the three rows for ``keys`` keys; ``ratio`` None: what they need."""
    cells = peel_ratio(keys) * keys + SPARE_CELLS if ratio is None else ratio * keys
    return max(1, -int(-cells // PEEL_ROWS))


@dataclass(frozen=True)
class Keys:
    """``numel`` elements in keys of ``width`` consecutive ones; the last may be shorter.

    Attributes:
        count: how many keys there are. words: of a bitmap of them.
    """

    numel: int
    width: int

    @cached_property
    def count(self) -> int:
        """Keys in all."""
        return -(-self.numel // self.width)

    @cached_property
    def words(self) -> int:
        """Words of their bitmap."""
        return wire.bitmap_words(self.count)

    def elements(self, keys: int) -> int:
        """Elements of that many keys, at most."""
        return min(self.numel, keys * self.width)


@dataclass(frozen=True)
class Trip:
    """One round trip: a table is summed and a bitmap ORed, chunk by chunk in the same messages.

    A payload is a chunk of the table, a chunk of the bitmap, and where asked for one word more, of which the largest
    counts. Rank i owns chunk i of both.

    Attributes:
        lanes: numbers in the table; 0 = there is none.
        itemsize: bytes of each.
        bits: words of the bitmap.
        peak: whether there is the word more.
        size: ranks.
    """

    lanes: int
    itemsize: int
    bits: int
    peak: bool
    size: int

    @cached_property
    def chunk(self) -> int:
        """Numbers of the table in a payload."""
        return -(-self.lanes // self.size)

    @cached_property
    def bitmap(self) -> slice:
        """Where a payload has its part of the bitmap."""
        start = self.chunk * self.itemsize // wire.WORD
        return slice(start, start + -(-self.bits // self.size))

    @cached_property
    def words(self) -> int:
        """Words of a payload; an even number where the table's numbers have 8 bytes, so that they lie aligned."""
        found = self.bitmap.stop + self.peak
        return found + found % 2 if self.lanes and self.itemsize > wire.WORD else found

    @property
    def traffic(self) -> Traffic:
        """What a rank sends."""
        if self.size == 1:
            return 0, 0, 0
        rounds = log2_ceil(self.size)
        bag = wire.WORD * (wire.HEADER_WORDS + self.words)
        return 1 + rounds, self.size - 1 + rounds, 2 * (self.size - 1) * bag


def compact_traffic(keys: Keys, union: int, itemsize: int, size: int, *, peak: bool = False) -> Traffic:
    """The union first, then its elements densely."""
    return plus(Trip(0, itemsize, keys.words, peak, size).traffic, dense_traffic(keys.elements(union), itemsize, size))
