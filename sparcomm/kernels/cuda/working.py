"""A step's sums on devices: the full vector stays as compensation wrote it, a short sorted list holds what has changed.

Nothing here waits for the device but ``count_above``. Lists have the length of all that was ever put into them, since
how many positions came twice only the device knows: of entries with one index the last one counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.errors import SparcommError
from sparcomm.kernels.checks_sums import (
    check_block,
    check_floor,
    check_k,
    check_length,
    check_pair,
    check_sample,
    check_working,
    key_of,
)
from sparcomm.kernels.cuda.launch import CROWD, multiprocessors, run
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout, whole

TILE = 2048  # positions that a block of threads takes at once, as in csrc/select.cu
SPAN = 4  # tiles that it counts before it asks what comes before them, likewise
PIECE = 1024  # likewise in csrc/compensate.cu
PLAN = 8  # words that say how far a selection is; the places are those of csrc/select.cu
SHARE, CLAIM = 2, 5
ROOM = 1 << 16  # entries that are collected at the least, if a block has so many
NOWHERE = -1


@dataclass(eq=False)
class Block:
    """What is known of a block.

    Attributes:
        index, value: its list, empty at first.
        starts: where each tile begins in the list; None = not found yet.
        chosen: positions that were selected; None before, and once something was merged after that.
        selected, deducted: whether that has been done.
        counted: the last threshold's key that magnitudes were counted for, and how many are above it.
    """

    index: Tensor
    value: Tensor
    starts: Tensor | None = None
    chosen: Tensor | None = None
    selected: bool = False
    deducted: bool = False
    counted: tuple[int, int] | None = None


@dataclass(eq=False)
class Sums(Working):
    """What ``compensate`` and ``survey`` return.

    Attributes:
        hist: (blocks, wire.BINS) int64, how many magnitudes are in each bin but 0; None = not counted.
        writable: whether ``settle`` may write to ``out``.
    """

    out: Tensor
    layout: Layout
    flags: Tensor
    hist: Tensor | None
    writable: bool
    blocks: list[Block] = field(default_factory=list[Block])

    def __post_init__(self) -> None:
        index = torch.empty(0, dtype=torch.int64, device=self.out.device)
        self.blocks = [Block(index, self.out.new_empty(0)) for _ in range(self.layout.blocks)]

    @property
    def tiles(self) -> int:
        """How many tiles a block has."""
        return -(-self.layout.length // TILE)

    @property
    def spans(self) -> int:
        """How many spans of tiles a block has."""
        return -(-self.tiles // SPAN)

    def place(self, b: int) -> tuple[Tensor, int, int, int, int, int]:
        """What tells a kernel where the positions of a block lie."""
        layout = self.layout
        return layout.slot, b, layout.blocks, layout.tile, layout.rounds, layout.numel

    def sums(self, b: int) -> tuple[Tensor | int, ...]:
        """What tells a kernel what the sums of a block are."""
        block = self.blocks[b]
        m = block.index.numel()
        if m and block.starts is None:
            block.starts = block.index.new_empty(self.tiles + 1)
            self.run("sums", "tile_starts", self.tiles + 1, block.index, m, self.tiles, block.starts)
        starts = block.index if block.starts is None else block.starts
        return self.out, block.index, block.value, starts, m, *self.place(b)

    def run(
        self, text: str, kernel: str, items: int, *arguments: Tensor | float | None, grid: int | None = None
    ) -> None:
        """A kernel of a text."""
        run(text, kernel, items, self.out, *arguments, grid=grid, WORK=self.out.dtype)

    def passes(self, kernel: str, b: int, *arguments: Tensor | float | None) -> None:
        """A kernel that goes through the tiles of a block."""
        grid = min(self.tiles, CROWD * multiprocessors(self.out))
        self.run("select", kernel, self.tiles, *self.sums(b), *arguments, grid=max(grid, 1))

    def plan(self, words: int) -> tuple[Tensor, Tensor]:
        """The words that say how far a selection is, and so many more: zeros, for one of them."""
        zeros = torch.zeros(PLAN + words, dtype=torch.int64, device=self.out.device)
        return zeros[:PLAN], zeros[PLAN:]

    def open(self, b: int) -> Block:
        """A block that has not been selected from yet."""
        if self.blocks[b].selected:
            raise SparcommError(f"block {b} has been selected from already: nothing can be merged or selected again")
        return self.blocks[b]

    def absorb(self, b: int, more: Tensor, extra: Tensor, mode: int) -> None:
        """Puts entries into a block's list, as csrc/sums.cu says."""
        block, m, new = self.blocks[b], self.blocks[b].index.numel(), more.numel()
        if not new:
            return
        index, value = block.index.new_empty(m + new), block.value.new_empty(m + new)
        hist = None if self.hist is None else self.hist[b]
        self.run(
            "sums", "absorb", m + new, self.out, block.index, block.value, m, more, extra, new, *self.place(b), mode,
            self.flags, hist, index, value,
        )  # fmt: skip
        block.index, block.value, block.starts, block.counted = index, value, None, None


def compensate(
    grad: Tensor,
    residual: Tensor | None,
    out: Tensor,
    layout: Layout,
    k: int,
    flags: Tensor,
    floor: Tensor | None = None,
) -> Working:
    """Writes grad + residual, and counts magnitudes by their first bits."""
    check_length(layout, grad, residual, out)
    check_working(out, layout)
    check_floor(floor, out, layout)
    return _begin(grad, residual, out, layout, k, flags, writable=True)


def survey(x: Tensor, layout: Layout, k: int, flags: Tensor, floor: Tensor | None = None) -> Working:
    """Counts magnitudes by their first bits."""
    check_working(x, layout)
    check_floor(floor, x, layout)
    return _begin(x, None, x, layout, k, flags, writable=False)


def _begin(
    grad: Tensor, residual: Tensor | None, out: Tensor, layout: Layout, k: int, flags: Tensor, *, writable: bool
) -> Sums:
    blocks = layout.blocks
    hist = torch.zeros((blocks, wire.BINS), dtype=torch.int64, device=out.device) if k > 0 else None
    grid = blocks * max(1, min(-(-layout.length // PIECE), CROWD * multiprocessors(out) // blocks))
    run(
        "compensate", "compensate", layout.numel, out, grad, residual, out if writable else None, flags, hist,
        layout.slot, layout.numel, blocks, layout.tile, layout.rounds, grid=grid, GRAD=grad.dtype, WORK=out.dtype,
    )  # fmt: skip
    return Sums(out, layout, flags, hist, writable)


def select(work: Working, block: int, k: int) -> tuple[Tensor, Tensor]:
    """Positions and sums of the k largest magnitudes."""
    sums = _sums(work, block)
    mine, length = sums.open(block), sums.layout.length
    check_k("select", k, length)
    index, value = torch.zeros(k, dtype=torch.int64, device=sums.out.device), sums.out.new_zeros(k)
    if k:
        _largest(sums, block, k, index, value)
    mine.selected, mine.chosen = True, index
    return index, value


def _largest(sums: Sums, b: int, k: int, index: Tensor, value: Tensor) -> None:
    """Finds the k-th largest digit by digit, then writes what is above it."""
    device, length = sums.out.device, sums.layout.length
    digits = _digits(sums.out.dtype)
    plan, zeros = sums.plan(len(digits) * wire.BINS + 3 * sums.spans)
    counts, status = zeros.split([len(digits) * wire.BINS, 3 * sums.spans])
    counts, status = counts.view(-1, wire.BINS), status.view(3, -1)
    room = min(length, max(4 * k, ROOM))
    listed = torch.empty(room, dtype=torch.int64, device=device), sums.out.new_empty(room)
    sums.run("select", "prepare", 1, plan, k, length, 0, length, grid=1)
    first = counts[0]
    if sums.hist is None:
        sums.passes("histogram", b, first)
    else:
        first = sums.hist[b]
    bits, shift = digits[0]
    sums.run("select", "boundary", 1, first, plan, bits, shift, room, grid=1)
    sums.passes("collect", b, plan, status[0], *listed)
    for row, (bits, shift) in enumerate(digits[1:], 1):
        sums.passes("refine", b, plan, listed[1], counts[row], bits, shift)
        sums.run("select", "boundary", 1, counts[row], plan, bits, shift, 0, grid=1)
    sums.passes("emit", b, plan, *listed, NOWHERE, 0, CLAIM + 1, status[1:], sums.spans, k, index, value)


def _digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    """(bits, shift) of the digits of a magnitude, the highest first."""
    left, found = torch.finfo(dtype).bits - 1, list[tuple[int, int]]()
    while left:
        bits = min(11, left)
        left -= bits
        found.append((bits, left))
    return found


def count_above(work: Working, block: int, threshold: float) -> int:
    """How many magnitudes exceed the threshold. Waits for the device."""
    sums = _sums(work, block)
    mine, key = sums.open(block), key_of(threshold, sums.out.dtype)
    if mine.counted is None or mine.counted[0] != key:
        plan, _ = sums.plan(0)
        sums.passes("count_above", block, key, plan)
        mine.counted = key, int(plan[SHARE])
    return mine.counted[1]


def above(work: Working, block: int, threshold: float, k: int) -> tuple[Tensor, Tensor]:
    """The first k above the threshold, then the first others, in order."""
    sums = _sums(work, block)
    mine, key = sums.open(block), key_of(threshold, sums.out.dtype)
    check_k("above", k, sums.layout.length)
    device = sums.out.device
    index, value = torch.zeros(k, dtype=torch.int64, device=device), sums.out.new_zeros(k)
    if k:
        plan, status = sums.plan(2 * sums.spans)
        known = mine.counted is not None and mine.counted[0] == key
        sums.run("select", "prepare", 1, plan, 0, mine.counted[1] if known and mine.counted else 0, NOWHERE, k, grid=1)
        if not known:
            sums.passes("count_above", block, key, plan)
        sums.run("select", "fill_up", 1, plan, k, grid=1)
        sums.passes("emit", block, plan, None, None, key, 1, CLAIM, status, sums.spans, k, index, value)
    mine.selected, mine.chosen = True, index
    return index, value


def merge(work: Working, block: int, index: Tensor, value: Tensor) -> None:
    """Adds to the sums."""
    check_pair(index, value)
    sums = _sums(work, block)
    mine = sums.blocks[block]
    if mine.selected and not mine.deducted:
        raise SparcommError(f"block {block} has been selected from, but nothing deducted: nothing can be merged yet")
    mine.chosen = None
    sums.absorb(block, index, value, 1 if mine.deducted else 0)


def deduct(work: Working, block: int, value: Tensor) -> None:
    """Takes what was sent from the sums."""
    sums = _sums(work, block)
    mine = sums.blocks[block]
    if mine.chosen is None or value.shape != mine.chosen.shape:
        raise SparcommError(f"block {block}: {value.numel()} values to deduct, but as many must have been selected")
    sums.absorb(block, mine.chosen, value, 2)
    mine.deducted = True


def settle(work: Working, block: int, index: Tensor) -> None:
    """Writes sums to out."""
    sums = _sums(work, block)
    if not sums.writable:
        raise SparcommError("the sums of a survey cannot be settled: its vector is only read")
    mine = sums.blocks[block]
    if mine.index.numel():
        listed = mine.index, mine.value, mine.index.numel()
        sums.run("sums", "settle", index.numel(), sums.out, *listed, index, index.numel(), *sums.place(block))


def top(index: Tensor, value: Tensor, k: int) -> Tensor:
    """Places of the k largest magnitudes."""
    check_pair(index, value)
    check_k("top", k, value.numel())
    places = torch.zeros(k, dtype=torch.int64, device=value.device)
    if k:
        flags = torch.zeros(4, dtype=torch.uint8, device=value.device)  # a word: see raise_flag in csrc/common.cuh
        _largest(_begin(value, None, value, whole(value.numel(), value.device), 0, flags, writable=False), 0, k,
                 places, value.new_empty(k))  # fmt: skip
    return places


def sample(grad: Tensor, residual: Tensor | None, count: int) -> Tensor:
    """One element of each share."""
    check_sample(grad, residual, count)
    n, working = grad.numel(), working_dtype(grad.dtype)
    out = torch.empty(min(count, n), dtype=working, device=grad.device)
    run("compensate", "sample", out.numel(), grad, grad, residual, n, count, out, GRAD=grad.dtype, WORK=working)
    return out


def _sums(work: Working, block: int) -> Sums:
    check_block(work.layout, block)
    if not isinstance(work, Sums):
        raise SparcommError(f"{type(work).__name__} was not made by this implementation's compensate")
    return work
