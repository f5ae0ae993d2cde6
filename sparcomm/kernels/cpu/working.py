"""A step's sums on CPUs: the full vector stays as compensation wrote it, and short sorted lists hold what may change.

A block's list has every position that reached the block's floor, and every position that something was merged into,
with the sums there. All others are below the floor and as they were, so if k of the list reach the floor, the k largest
of the block are among them. If not, the list is completed: the k + m largest of the full vector, m positions having
been merged into, together with these, have the k largest among them for certain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels.cpu import _compensate, _count, _select, _sparse
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout

SIGNED = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}
UNSIGNED = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}
STREAMED = 1 << 24  # bytes that are too many to be found in a cache when they are next looked at


def streams(out: Any, tiles: int, tile: int, vectors: int = 1) -> bool:
    """Whether ``out``, one of so many vectors in use, is to be written past the caches: tiles are full cache lines."""
    aligned = out.ctypes.data % 64 == 0 and (tiles == 1 or tile * out.itemsize % 64 == 0)
    return vectors * out.nbytes >= STREAMED and aligned


@dataclass(eq=False)
class Block:
    """A block's list (sorted local positions, sums), how many were merged; where in it the selected ones are, how many.

    ``chosen`` is None until then, and lacks what is padding.
    """

    index: Any
    value: Any
    merged: int = 0
    chosen: Any = None
    asked: int = 0


@dataclass(eq=False)
class Lists(Working):
    """What ``compensate`` returns.

    Attributes:
        x: ``out`` as an array, read by everything and written by ``settle`` only.
        slot, tile: of the layout.
        floor: (blocks,) magnitudes, as integers, that everything outside a block's list is below.
    """

    out: Tensor
    layout: Layout
    x: Any
    flags: Any
    slot: Any
    floor: Any
    blocks: list[Block] = field(default_factory=list[Block])

    def fill(self, grad: Any, residual: Any, owner: Any, k: int) -> None:
        """Compensates, and makes the lists, of sizes that suit a selection of k positions a block."""
        x, layout, tile = self.x, self.layout, self.layout.tile
        size = _compensate.samples(layout.length, layout.blocks)
        drawn = np.empty(size, x.dtype)
        place = _compensate.rank(k, layout.length, size)
        bits = drawn.view(self.floor.dtype)
        _compensate.floors(grad, residual, self.slot, tile, layout.numel, place, drawn, bits, self.floor)
        shape = (layout.blocks, _compensate.capacity(k, layout.length, size))
        index, value, found = np.empty(shape, np.int64), np.empty(shape, x.dtype), np.zeros(layout.blocks, np.int64)
        streaming = streams(x, owner.size, tile, 2 if residual is None else 3)
        _compensate.compensate(grad, residual, x, owner, tile, self.floor, index, value, found, streaming)
        looked_through = False
        for b, n in enumerate(found.tolist()):
            if n >= _compensate.OVERFLOW:
                n, self.floor[b] = 0, np.iinfo(self.floor.dtype).max
                looked_through = looked_through or self._note(x)
            self.blocks.append(Block(index[b, :n], value[b, :n]))
            self._note(value[b, :n])  # whatever is not finite reaches every floor

    def _note(self, value: Any) -> bool:
        _sparse.note_nonfinite(value.view(self.floor.dtype), self.flags)
        return True

    def merge(self, b: int, more: Any, extra: Any) -> None:
        """Adds to a block's sums."""
        block = self.open_block(b)
        self._absorb(b, more, extra)
        block.merged += more.size
        self._note(block.value)

    def _absorb(self, b: int, more: Any, extra: Any) -> None:
        block, room = self.blocks[b], self.blocks[b].index.size + more.size
        index, value = np.empty(room, np.int64), np.empty(room, self.x.dtype)
        found = _sparse.absorb(
            block.index, block.value, more, self.places(b, more), extra, self.x, index, value, self.flags
        )
        block.index, block.value = index[:found], value[:found]

    def select(self, b: int, k: int) -> tuple[Any, Any]:
        """A block's k largest: positions and sums."""
        block = self.open_block(b)
        tile, slot = self.layout.tile, self.slot
        stored = _select.stored_in(slot, b, tile, self.layout.numel)
        index, value = np.empty(k, np.int64), np.empty(k, self.x.dtype)
        block.chosen, block.asked = np.empty(min(k, stored), np.int64), k
        if not self._choose(block, int(self.floor[b]), index, value):
            self._complete(b, min(k, stored), stored)
            if not self._choose(block, 0, index, value):
                raise SparcommError("the vector was changed while its largest elements were being selected")
        # Beyond its elements a block holds only padding: zeros that come after all others.
        index[stored:], value[stored:] = np.arange(stored, max(k, stored)), 0
        return index, value

    def _choose(self, block: Block, floor: int, index: Any, value: Any) -> bool:
        bits = block.value.view(self.floor.dtype)
        return _select.choose(block.index, block.value, bits, floor, index, value, block.chosen)

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
            found = _select.top(self.x.view(self.floor.dtype), k + block.merged, row, slot, b, tile)
        self._absorb(b, found, np.full(found.size, -0.0, self.x.dtype))  # which changes no value at all

    def open_block(self, b: int) -> Block:
        """A block that has not been selected from yet."""
        if self.blocks[b].chosen is not None:
            raise SparcommError(f"block {b} has been selected from already: nothing can be merged or selected again")
        return self.blocks[b]

    def deduct(self, b: int, less: Any) -> None:
        """Takes from the sums what was sent of the selected ones."""
        block = self.blocks[b]
        if block.chosen is None or less.size != block.asked:
            raise SparcommError(f"block {b}: {less.size} values to deduct, but as many must have been selected")
        _sparse.deduct(block.value, block.chosen, less)

    def settle(self, b: int, wanted: Any) -> None:
        """Writes the sums at some positions to ``out``."""
        block = self.blocks[b]
        place = np.empty(min(block.index.size, wanted.size) + 1, np.int64)
        found = place[: _sparse.common(block.index, wanted, place)]
        where = self.places(b, block.index[found])
        _sparse.scatter(self.x, where, block.value[found])

    def places(self, b: int, index: Any) -> Any:
        """Global positions of local ones."""
        return _sparse.place(index, self.slot, b, self.layout.tile, self.layout.numel)
