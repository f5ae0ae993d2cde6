"""Slices go out and come back whole, at every size around the edges of tiles and rounds."""

from __future__ import annotations

import pytest
import torch

from sparcomm.collectives.slices import Slices, slice_length

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 5, 63, 64, 65, 127, 1000, 4096, 32769, 100_003])
def test_slices_are_the_blocks_of_the_dealt_layout(numel: int, count: int) -> None:
    slices, x = Slices(numel, count, CPU), torch.arange(1.0, numel + 1)
    assert slices.length == slice_length(numel, count)
    back, doubled = torch.full((numel,), -1.0), x.clone()
    for b in range(count):
        part = slices.take(x, b, torch.full((slices.length,), -2.0))
        where = slices.cut.to_global(torch.arange(slices.length), b)
        stored = where < numel
        assert torch.equal(part[stored], x[where[stored]])
        assert not part[~stored].any(), "padding is worth zero"
        slices.put(part, b, back)
        slices.add(part, b, doubled)
    assert torch.equal(back, x)
    assert torch.equal(doubled, 2 * x)


def test_putting_touches_one_slice_only() -> None:
    slices = Slices(1000, 3, CPU)
    x = torch.zeros(1000)
    slices.put(torch.ones(slices.length), 1, x)
    where = slices.cut.to_global(torch.arange(slices.length), 1)
    assert torch.equal(x.nonzero().flatten(), where[where < 1000].sort().values)
