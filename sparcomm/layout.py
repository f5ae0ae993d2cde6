"""How a flat vector is cut into blocks: dealt tiles (default) or contiguous pieces (the paper's).

A block is a vector of ``length`` positions. In the dealt layout the vector is cut into tiles, tiles are
taken in rounds of ``blocks`` tiles, and each round deals one tile to every block in an order permuted by
a hash of the round. Every block so becomes a fair sample of the whole vector: a fixed quota per block
then captures nearly what a global top-k would, whatever the gradient's scale in different layers, and a
periodic gradient (one hot column in eight) cannot fall in step with the deal, as it can with plain
round-robin. The contiguous layout is the special case of one round whose tile is a whole block.

Within a block, local order is global order, and positions at or beyond ``numel`` (padding, worth zero)
are its last ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TILE = 1024


@dataclass(frozen=True, eq=False)
class Layout:
    """A cut of ``numel`` elements into ``blocks`` blocks of ``rounds * tile`` positions each.

    Local position ``l`` of block ``b`` is global position
    ``((l // tile) * blocks + slot[l // tile, b]) * tile + l % tile``.

    Attributes:
        slot: (rounds, blocks) int64; ``slot[r, b]`` is the tile within round r that block b owns.
        owner: (rounds, blocks) int64, its inverse: ``owner[r, s]`` is the block that owns tile s of round r.
    """

    numel: int
    blocks: int
    tile: int
    rounds: int
    slot: Tensor
    owner: Tensor

    @property
    def length(self) -> int:
        """Positions in every block, padding included."""
        return self.rounds * self.tile

    def to_global(self, index: Tensor, block: int) -> Tensor:
        """Global positions (int64) of local positions ``index`` of ``block``; padding maps to ``>= numel``."""
        turn = torch.div(index, self.tile, rounding_mode="floor")
        return (turn * self.blocks + self.slot[:, block][turn]) * self.tile + index % self.tile


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (wrapping); a bijection, so distinct inputs never tie."""

    def shift(v: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (v >> by) & ((1 << (64 - by)) - 1)

    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ shift(x, 31)


def dealt_shape(numel: int, blocks: int) -> tuple[int, int]:
    """(tile, rounds), dealt: tile = largest power of two up to min(1024, numel / (16 blocks)), at least 1."""
    bound = min(MAX_TILE, numel // (16 * blocks))
    tile = 1 << (bound.bit_length() - 1) if bound else 1
    return tile, -(-numel // (tile * blocks))


def contiguous_shape(numel: int, blocks: int) -> tuple[int, int]:
    """(tile, rounds) of the contiguous layout: one round of tiles of ceil(numel / blocks)."""
    return max(1, -(-numel // blocks)), 1 if numel else 0


def dealt(numel: int, blocks: int, device: torch.device | str = "cpu") -> Layout:
    """Tiles dealt in rounds of ``blocks`` tiles, each round in an order of its own."""
    tile, rounds = dealt_shape(numel, blocks)
    keys = _mix(torch.arange(1, rounds * blocks + 1, device="cpu")).view(rounds, blocks)
    slot = keys.argsort(dim=1)
    return Layout(numel, blocks, tile, rounds, slot.to(device), slot.argsort(dim=1).to(device))


def contiguous(numel: int, blocks: int, device: torch.device | str = "cpu") -> Layout:
    """Block b is positions [b·length, (b+1)·length), the last block padded; length = ceil(numel / blocks)."""
    tile, rounds = contiguous_shape(numel, blocks)
    slot = torch.arange(blocks, device=device).view(1, blocks).expand(rounds, blocks).contiguous()
    return Layout(numel, blocks, tile, rounds, slot, slot)


def whole(numel: int, device: torch.device | str = "cpu") -> Layout:
    """One block: the vector itself."""
    return contiguous(numel, 1, device)


LAYOUTS = {"dealt": dealt, "contiguous": contiguous}
SHAPES = {"dealt": dealt_shape, "contiguous": contiguous_shape}
