"""Both cuts are partitions, and the dealt one is a fair sample of any vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparcomm.layout import LAYOUTS, SHAPES, dealt


@given(st.sampled_from(list(LAYOUTS)), st.integers(0, 5000), st.integers(1, 17))
def test_blocks_partition_the_vector_in_order(kind: str, numel: int, blocks: int) -> None:
    cut = LAYOUTS[kind](numel, blocks)
    assert (cut.tile, cut.rounds) == SHAPES[kind](numel, blocks)
    seen = torch.zeros(numel, dtype=torch.int64)
    for b in range(blocks):
        where = cut.to_global(torch.arange(cut.length), b)
        assert (where.diff() > 0).all(), "local order is global order"
        inside = where < numel
        assert (inside.int().diff() <= 0).all(), "padding comes last"
        seen[where[inside]] += 1
    assert (seen == 1).all()
    assert torch.equal(cut.slot.sort(dim=1).values, torch.arange(blocks).expand(cut.rounds, blocks))
    assert torch.equal(torch.gather(cut.owner, 1, cut.slot), torch.arange(blocks).expand(cut.rounds, blocks))


@pytest.mark.parametrize(("numel", "blocks", "tile"), [(25_000_000, 8, 1024), (3000, 8, 16), (100, 8, 1), (0, 4, 1)])
def test_tile_is_a_power_of_two_that_leaves_sixteen_rounds(numel: int, blocks: int, tile: int) -> None:
    cut = dealt(numel, blocks)
    assert cut.tile == tile
    assert numel < 16 * blocks or cut.rounds >= 16


def test_periodic_positions_are_spread_over_all_blocks() -> None:
    n, blocks = 1024 * 1024, 8
    cut = dealt(n, blocks)
    tile_number = torch.arange(0, n, cut.tile * blocks)  # every 8th tile: plain round-robin gives all to one block
    owners = cut.owner.view(-1)[tile_number // cut.tile]
    assert (owners.bincount(minlength=blocks) > len(tile_number) / blocks / 3).all()


def test_positions_beyond_two_to_the_31() -> None:
    cut = dealt(2**33, 4)
    last = torch.tensor([cut.length - 1])
    assert max(int(cut.to_global(last, b)) for b in range(4)) == 2**33 - 1


def test_the_deal_never_changes() -> None:
    """Ranks of different versions must agree, and checkpoints outlive a version: these are part of the format."""
    assert dealt(4096, 4).slot[:4].tolist() == [[0, 3, 2, 1], [3, 0, 2, 1], [3, 1, 0, 2], [3, 0, 1, 2]]
