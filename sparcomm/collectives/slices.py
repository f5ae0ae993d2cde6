"""A vector dealt to the ranks of a node: whole slices copied in and out by tiles, in one pass and without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import layout


def slice_length(numel: int, count: int) -> int:
    """Positions of each of ``count`` slices of ``numel`` elements, padding included."""
    tile, rounds = layout.dealt_shape(numel, count)
    return numel if count == 1 else tile * rounds


class Slices:
    """``numel`` elements as ``count`` slices of equal length: the blocks of the dealt layout (one slice: the vector).

    Attributes:
        cut: the layout whose blocks they are.
        length: positions of a slice; those at or beyond ``numel`` are padding, and its last ones.
    """

    def __init__(self, numel: int, count: int, device: torch.device) -> None:
        self.cut = layout.whole(numel, device) if count == 1 else layout.dealt(numel, count, device)
        self.length = self.cut.length
        # What fills whole rounds can be copied tile by tile; the last round may end anywhere.
        self._full = numel // (count * self.cut.tile)
        turns = torch.arange(self._full, device=device).unsqueeze(1) * count
        self._tiles = (turns + self.cut.slot[: self._full]).t().contiguous()  # (count, full rounds): numbers of tiles
        self._last_round: list[int] = self.cut.slot[-1].tolist() if self.cut.rounds else []

    def take(self, x: Tensor, block: int, out: Tensor) -> Tensor:
        """Writes slice ``block`` of ``x`` (numel,) into ``out`` (length,), zeros for padding; returns ``out``."""
        whole, tail = self._halves(x)
        torch.index_select(whole, 0, self._tiles[block], out=out[: self._end].view(-1, self.cut.tile))
        here = self._last(tail, block)
        out[self._end :] = 0
        out[self._end : self._end + here.numel()] = here
        return out

    def put(self, part: Tensor, block: int, x: Tensor) -> None:
        """Writes ``part`` (length,) over slice ``block`` of ``x`` (numel,)."""
        whole, tail = self._halves(x)
        whole.index_copy_(0, self._tiles[block], part[: self._end].view(-1, self.cut.tile))
        here = self._last(tail, block)
        here.copy_(part[self._end : self._end + here.numel()])

    def add(self, part: Tensor, block: int, x: Tensor) -> None:
        """Adds ``part`` (length,) to slice ``block`` of ``x`` (numel,)."""
        whole, tail = self._halves(x)
        whole.index_add_(0, self._tiles[block], part[: self._end].view(-1, self.cut.tile))
        here = self._last(tail, block)
        here.add_(part[self._end : self._end + here.numel()])

    @property
    def _end(self) -> int:
        """Positions of a slice in whole rounds."""
        return self._full * self.cut.tile

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The whole rounds as (tiles, tile), and what is left."""
        end = self._end * self.cut.blocks
        return x[:end].view(-1, self.cut.tile), x[end:]

    def _last(self, tail: Tensor, block: int) -> Tensor:
        """The part of the unfinished round that belongs to ``block``."""
        if self._full == self.cut.rounds:
            return tail
        start = self._last_round[block] * self.cut.tile
        return tail[start : start + self.cut.tile]
