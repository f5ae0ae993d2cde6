"""ORs of bitmaps: the same on all ranks, in just the bytes that are said, and never from damaged ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Clock
from sparcomm.collectives import bitmap
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.bitmap import bitmap_all_reduce, bitmap_traffic, is_flat
from sparcomm.errors import DamagedBag
from sparcomm.kernels import kernels_for
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from sparcomm.transport.torchdist import TorchTransport
from sparcomm.workspace import Workspace
from support.pool import pool
from support.sums import Damaging

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13)


def mask(m: int, rank: int) -> Tensor:
    """Sparse enough that unions differ from all their parts; the first position is nobody's, the last rank 1's."""
    made = torch.rand(m, generator=torch.Generator().manual_seed(rank)) < 0.1
    made[:1] = False
    made[m - 1 :] = rank == 1 and m > 1
    return made


def united(m: int, transport: Any, *, in_place: bool = False, flags: int = 0) -> tuple[Tensor, bool]:
    """The OR of all ranks' masks, and whether all was finite."""
    kernels = kernels_for(torch.empty(0))
    bags = Bags(kernels, 3, 7, CPU)
    bags.flags |= flags
    words = torch.empty(wire.bitmap_words(m), dtype=torch.int32)
    kernels.pack(mask(m, transport.rank), words)
    before = words.clone()
    out = words if in_place else torch.full_like(words, -5)
    bitmap_all_reduce(words, out, bags, transport, Clock(), Workspace())
    assert in_place or torch.equal(words, before)
    kept = torch.zeros_like(words)
    kernels.pack(kernels.unpack(out, m), kept)
    assert torch.equal(kept, out), "unused bits"
    return kernels.unpack(out, m), bool(bags.ok())


@pytest.fixture(params=["chosen", "two phases", "flat"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way, whatever the sizes."""
    if request.param != "chosen":
        monkeypatch.setattr(bitmap, "ROUND_BYTES", 1 << 60 if request.param == "flat" else -(1 << 60))
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_everyone_gets_the_union_for_just_these_bytes(size: int, way: str) -> None:
    for m in (0, 1, 31, 32, 33, 32 * size - 1, 32 * size, 32 * size + 1, 32 * size + 33, 5000):
        expected = functools.reduce(torch.logical_or, [mask(m, r) for r in range(size)])
        run = sim.run(size, functools.partial(united, m, in_place=m % 2 == 0))
        for found, ok in run.results:
            assert torch.equal(found, expected)
            assert ok
        for traffic in run.traffic:
            counted = (traffic.rounds, traffic.messages, traffic.bytes_sent)
            assert counted == bitmap_traffic(m, size), (m, size)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_status_reaches_everyone(size: int, way: str) -> None:
    def rank(transport: Transport) -> bool:
        return united(4000, transport, flags=wire.NONFINITE * (transport.rank == size - 1))[1]

    assert sim.run(size, rank).results == [False] * size


def test_the_way_with_less_bytes_but_for_a_round() -> None:
    for size in SIZES[1:]:
        for words in (1, 30, 300, 3000, 30_000):
            whole = (size - 1) * 4 * (wire.HEADER_WORDS + words)
            halves = 2 * (size - 1) * 4 * (wire.HEADER_WORDS - (-words // size))
            assert is_flat(words, size) == (whole <= halves + 4096)
            assert bitmap_traffic(32 * words, size)[2] == (whole if is_flat(words, size) else halves)
    assert all(is_flat(words, 2) for words in (1, 1000, 10**6)), "two ranks never need two phases"
    m = 25_000_000
    for size in SIZES[2:]:
        assert bitmap_traffic(m, size)[2] == pytest.approx(2 * (size - 1) / size * m / 8, rel=1e-3)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_damaged_bytes_in_any_round_are_an_error(size: int, way: str) -> None:
    calls = {"two phases": 2, "flat": 1, "chosen": 1}[way]
    for at in range(calls + 1):

        def rank(transport: Transport, at: int = at) -> bool:
            damaging = Damaging(transport, at if transport.rank == size - 1 else 10**9, seed=at)
            united(1000, damaging)
            return damaging.hit

        if at < calls:
            with pytest.raises(DamagedBag):
                sim.run(size, rank)
        else:
            assert not any(sim.run(size, rank).results)


def on_gloo(rank: int, size: int, lengths: list[int]) -> list[tuple[Tensor, bool]]:
    return [united(m, TorchTransport()) for m in lengths]


def test_the_same_on_gloo() -> None:
    lengths = [0, 1, 95, 96, 97, 5000, 200_000]
    assert {is_flat(wire.bitmap_words(m), 3) for m in lengths} == {True, False}
    for results in pool(3).run(on_gloo, lengths):
        for m, (found, ok) in zip(lengths, results, strict=True):
            assert torch.equal(found, functools.reduce(torch.logical_or, [mask(m, r) for r in range(3)]))
            assert ok
