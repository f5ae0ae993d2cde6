"""A step's sums on CPUs: the full vector stays as compensation wrote it, and short sorted lists hold what may change.

A block's list has every position that reached the block's floor, and every position that something was merged into,
with the sums there. All others are below the floor and as they were, so if k of the list reach the floor, the k largest
of the block are among them. If not, the list is completed: the k + m largest of the full vector, m positions having
been merged into, together with these, have the k largest among them for certain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels.cpu import _compensate, _count, _parts, _select, _sparse
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout

SIGNED = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}
UNSIGNED = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}
CHANGED = "the vector was changed while its largest elements were being selected"
STREAMED = 1 << 24  # bytes that are too many to be found in a cache when they are next looked at


def streams(out: Any, tiles: int, tile: int, vectors: int = 1) -> bool:
    """Whether ``out``, one of so many vectors in use, is to be written past the caches: tiles are full cache lines."""
    large = vectors * out.nbytes >= STREAMED
    return large and out.ctypes.data % 64 == 0 and (tiles == 1 or tile * out.itemsize % 64 == 0)


@dataclass(eq=False)
class Block:
    """A block's list (sorted local positions, sums), and how far the block has come.

    Attributes:
        merged: how many positions something was merged into.
        selected, deducted: whether that has been done; ``asked``: of how many positions.
        chosen: where in the list the selected ones are, without padding; None before, and once they may have moved.
    """

    index: Any
    value: Any
    merged: int = 0
    selected: bool = False
    deducted: bool = False
    asked: int = 0
    chosen: Any = None


@dataclass(eq=False)
class Lists(Working):
    """What ``compensate`` and ``survey`` return.

    Attributes:
        x, bits: ``out`` as an array, also of integers; read by everything and written by ``settle`` only,
        writable: if that may be.
        slot, tile: of the layout.
        floor: (blocks,) magnitudes, as integers, that everything outside a block's list is below.
    """

    out: Tensor
    layout: Layout
    x: Any
    flags: Any
    slot: Any
    floor: Any
    writable: bool
    bits: Any
    blocks: list[Block] = field(default_factory=list[Block])

    def fill(self, grad: Any, residual: Any, owner: Any, k: int) -> None:
        """Compensates, unless this is a survey, and makes lists of sizes that suit a selection of k of each block."""
        x, layout, tile, floor = self.x, self.layout, self.layout.tile, self.floor
        size, place, most = _compensate.plan(k, layout.length, layout.blocks)
        drawn = np.empty(size, x.dtype)
        _compensate.floors(grad, residual, self.slot, tile, layout.numel, place, drawn, drawn.view(floor.dtype), floor)
        streaming = self.writable and streams(x, owner.size, tile, 2 if residual is None else 3)

        def part(first: int, last: int, room: int) -> tuple[bool, list[int], Any, Any]:
            index, value = np.empty((layout.blocks, room), np.int64), np.empty((layout.blocks, room), x.dtype)
            found = np.zeros(layout.blocks, np.int64)
            lists = owner, tile, floor, index, value, found, first, last
            if self.writable:
                bad = _compensate.compensate(grad, residual, x, *lists, streaming)
            else:
                bad = _compensate.survey(x, self.bits, *lists)
            lengths = found.tolist()
            if room < most and max(lengths) >= _compensate.OVERFLOW:
                return part(first, last, most)  # what is large lies here
            return bad, lengths, index, value

        parts = _parts.cut(layout.numel, tile)
        room = min(most, 2 * most // len(parts) + _compensate.LEAST)  # for twice what a part has on average
        done = _parts.run([functools.partial(part, *p, room) for p in parts])
        bad, found, index, value = zip(*done, strict=True)
        if any(bad):
            self.flags[0] |= wire.NONFINITE
        for b in range(layout.blocks):
            lengths = [n[b] for n in found]
            if max(lengths) >= _compensate.OVERFLOW:
                lengths, floor[b] = [0] * len(lengths), np.iinfo(floor.dtype).max
            self.blocks.append(Block(_join(index, b, lengths), _join(value, b, lengths)))

    def merge(self, b: int, more: Any, extra: Any) -> None:
        """Adds to a block's sums."""
        block = self.blocks[b]
        if block.selected and not block.deducted:
            raise SparcommError(f"block {b} has been selected from, but nothing deducted: nothing can be merged yet")
        block.chosen = None
        self._absorb(b, more, extra)
        block.merged += more.size

    def _absorb(self, b: int, more: Any, extra: Any) -> None:
        block, room = self.blocks[b], self.blocks[b].index.size + more.size
        index, value = np.empty(room, np.int64), np.empty(room, self.x.dtype)
        found = _sparse.absorb(
            block.index, block.value, more, extra, self.x, self.slot, b, self.layout.tile, block.deducted,
            index, value, self.flags,
        )  # fmt: skip
        block.index, block.value = index[:found], value[:found]

    def _list(self, b: int, positions: Any) -> None:
        """Makes sure that positions are in a block's list."""
        self._absorb(b, positions, np.full(positions.size, -0.0, self.x.dtype))  # which changes no value at all

    def _keys(self, block: Block) -> Any:
        return block.value.view(self.floor.dtype)

    def _stored(self, b: int) -> int:
        return _select.stored_in(self.slot, b, self.layout.tile, self.layout.numel)

    def _open(self, b: int) -> Block:
        """A block that has not been selected from yet."""
        if self.blocks[b].selected:
            raise SparcommError(f"block {b} has been selected from already: nothing can be merged or selected again")
        return self.blocks[b]

    def select(self, b: int, k: int) -> tuple[Any, Any]:
        """A block's k largest: positions and sums."""
        block, stored = self._open(b), self._stored(b)
        index, value, chosen = self._results(k, stored)
        if not _select.choose(block.index, block.value, self._keys(block), int(self.floor[b]), index, value, chosen):
            self._complete(b, chosen.size, stored)
            if not _select.choose(block.index, block.value, self._keys(block), 0, index, value, chosen):
                raise SparcommError(CHANGED)
        block.selected, block.chosen, block.asked = True, chosen, k
        return index, value

    def _results(self, k: int, stored: int) -> tuple[Any, Any, Any]:
        """Room for k positions and their sums, with padding, as far as there is any, in place; and for places."""
        index, value = np.empty(k, np.int64), np.empty(k, self.x.dtype)
        if k > stored:  # beyond its elements a block holds only padding: zeros that come after all others
            index[stored:], value[stored:] = np.arange(stored, k), 0
        return index, value, np.empty(min(k, stored), np.int64)

    def _complete(self, b: int, k: int, stored: int) -> None:
        """Makes a list sure to hold the k largest."""
        block, slot, tile = self.blocks[b], self.slot, self.layout.tile
        if self.floor[b] <= 1:  # whatever is not listed is zero
            found = np.arange(min(k + block.index.size, stored))
        elif k + block.merged >= stored:
            found = np.arange(stored)
        else:
            row = np.empty(wire.BINS, np.int64)
            _count.histogram(self.x.view(UNSIGNED[self.x.dtype]), slot, b, tile, row)
            found = _select.top(self.bits, k + block.merged, row, slot, b, tile)
        self._list(b, found)

    def count_above(self, b: int, threshold: float) -> int:
        """How many of a block's magnitudes exceed a threshold."""
        block, least = self._open(b), self._least(threshold)
        if self.floor[b] <= least:
            return _select.reach(self._keys(block), least)
        slot, tile = self.slot, self.layout.tile
        count = _select.reach_in(self.bits, self.bits.dtype.type(least), slot, b, tile)
        return count + _sparse.change(block.index, self.bits, slot, b, tile, self._keys(block), least)

    def above(self, b: int, threshold: float, k: int) -> tuple[Any, Any]:
        """The first k of a block above a threshold, else the first others, as zeros."""
        block, least, stored = self._open(b), self._least(threshold), self._stored(b)
        if self.floor[b] > least:
            # Of those that reached it at first, as many as were merged into may do so no more.
            room = np.empty(min(k + block.merged, stored) + 64, np.int64)
            found = _select.first(self.bits, self.bits.dtype.type(least), self.slot, b, self.layout.tile, room)
            self._list(b, room[:found])
        index, value, chosen = self._results(k, stored)
        end = _select.fill_to(block.index, self._keys(block), least, chosen.size, stored)
        if end:
            self._list(b, np.arange(end))
        found = _select.take(block.index, block.value, self._keys(block), least, end, index, value, chosen)
        if found != chosen.size:
            raise SparcommError(CHANGED)
        block.selected, block.chosen, block.asked = True, chosen, k
        return index, value

    def _least(self, threshold: float) -> int:
        """The smallest magnitude above a threshold."""
        if not 0 <= threshold < math.inf:
            raise SparcommError(f"threshold={threshold} must be a finite number, 0 or more")
        real = self.x.dtype.type
        with np.errstate(all="ignore"):  # it may lie beyond all of that dtype's
            near = real(threshold)
            if float(near) > threshold:
                near = np.nextafter(near, real(0))
        return int(abs(near).view(self.floor.dtype)) + 1

    def deduct(self, b: int, less: Any) -> None:
        """Takes from the sums what was sent of the selected ones."""
        block = self.blocks[b]
        if block.chosen is None or less.size != block.asked:
            raise SparcommError(f"block {b}: {less.size} values to deduct, but as many must have been selected")
        _sparse.deduct(block.value, block.chosen, less)
        block.deducted = True

    def settle(self, b: int, wanted: Any) -> None:
        """Writes the sums at some positions to ``out``."""
        if not self.writable:
            raise SparcommError("the sums of a survey cannot be settled: its vector is only read")
        block = self.blocks[b]
        _sparse.settle(block.index, block.value, wanted, self.x, self.slot, b, self.layout.tile)


def _join(lists: Sequence[Any], b: int, lengths: list[int]) -> Any:
    """The beginnings, so long, of a row of each part's lists, one after the other."""
    rows = [rows[b, :n] for rows, n in zip(lists, lengths, strict=True)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
