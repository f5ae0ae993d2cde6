"""What only the CUDA text of positions, bitmaps and codes can get wrong: tiles, chunks, schedules, bare pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels import cpu, cuda, reference
from sparcomm.kernels.cuda import codes, launch
from sparcomm.layout import dealt, whole
from sparcomm.sparse import Sparse
from support import emulator
from support.bitmaps import as_payloads, bitmap_for, poisoned, random_words
from support.codes import CODES, check_any_words, decode, encode
from support.kernels import GRADIENTS, IMPLEMENTATIONS, data, increasing, same

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs g++, which stands in for a GPU")
SEEDS = (0, 1, 2, 3)
EVERY = (*CODES, "rice")
# (k, m) at the edges of warps, blocks and chunks; the last has more chunks than there are blocks.
LENGTHS = [(k, 40 * k) for k in (255, 256, 257, 1023, 1024, 1025)] + [(256, 512), (2000, 8192), (50_000, 5_000_000)]


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name in ("text", "gpu")])
def text(request: pytest.FixtureRequest) -> Any:
    """The kernels, on the emulator or on a GPU."""
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=[1, 3, 1024])
def few_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many chunks at most: with few, a block goes through several tiles of one."""
    monkeypatch.setattr(codes, "CHUNKS", request.param)


@pytest.mark.usefixtures("few_chunks")
@pytest.mark.parametrize(("k", "m"), LENGTHS)
@pytest.mark.parametrize("code", EVERY)
def test_codes_of_many_tiles(text: Any, code: str, k: int, m: int) -> None:
    for index in (increasing(k, m), torch.arange(m - k, m)):
        expected = encode(cpu, code, index, m)
        assert torch.equal(encode(text, code, index, m), expected)
        found, flags = decode(text, code, expected, k, m)
        assert torch.equal(found, index)
        assert flags == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_results_do_not_depend_on_who_comes_first(text: Any, seed: int) -> None:
    k, m = 9000, 300_000
    index = increasing(k, m)
    with emulator.schedule(seed):
        for code in EVERY:
            words = encode(text, code, index, m)
            assert torch.equal(words, encode(cpu, code, index, m))
            assert torch.equal(decode(text, code, words, k, m)[0], index)
            words[words.numel() // 2] ^= 1 << 7
            assert decode(text, code, words, k, m)[1] == decode(cpu, code, words, k, m)[1]
            assert torch.equal(decode(text, code, words, k, m)[0], decode(cpu, code, words, k, m)[0])
        words = random_words(5000)
        for name in ("popcount", "prefix", "ones"):
            assert torch.equal(getattr(text, name)(words), getattr(cpu, name)(words))
        a, b = (Sparse(increasing(3000, 9000, s), data("special", 3000, torch.float32, s), 9000) for s in (1, 2))
        check_merged(text, a, b)


@pytest.mark.parametrize("at", [0, 255, 256, 300, 599])
@pytest.mark.parametrize("code", ["elias_fano", "bitmap"])
def test_damage_in_any_tile_gives_harmless_indices(code: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "CHUNKS", 2)
    k, m = 600 * 16, 600 * 32
    words = encode(cpu, code, increasing(k, m), m)
    for flip in (1 << 3, -(1 << 31)):
        damaged = words.clone()
        damaged[at] ^= flip
        check_any_words(code, damaged, k, m)
    damaged = words.clone()
    damaged[at] = ~damaged[at]
    check_any_words(code, damaged, k, m)


def test_indices_out_of_order_are_damage_wherever_they_lie() -> None:
    """Equal high parts whose low parts decrease: ones side by side in a word, and where words and chunks meet."""
    k, m = 4200, 4200 << 9
    low = wire.low_bits(k, m)
    index = (torch.arange(k) // 2 << low + 1) + (3 << low) + 5 + torch.arange(k) % 2
    words = encode(cpu, "elias_fano", index, m)
    first = (index >> low) + torch.arange(k)  # where the ones are
    assert low > 2
    assert first[2 * 7] == 31
    assert first[2 * 2047] == 32 * 256 - 1
    for pair in (0, 6, 7, 8, 500, 1023, 2047, 2099):
        damaged = words.clone()
        for one in (2 * pair, 2 * pair + 1):  # 5, 6 become 6, 5
            for bit in (one * low, one * low + 1):
                damaged[bit // 32] ^= torch.tensor(1 << bit % 32).to(torch.int32)
        assert check_any_words("elias_fano", damaged, k, m) == wire.DAMAGED


@pytest.mark.parametrize("k", [300, 700])
def test_gaps_beyond_all_positions_are_damage(k: int) -> None:
    m = (1 << 60) - 1
    for low in (40, 49, 59):
        for fill in (-1, 0x7FFFFFFF):
            words = torch.full((wire.words(wire.RICE_HEADER + k * (low + 1)),), fill, dtype=torch.int32)
            words[0] = (int(words[0]) & -64) | low
            assert check_any_words("rice", words, k, m) == wire.DAMAGED


@pytest.mark.parametrize("wrong", [[0, 0], [1, 0], [-1, 3], [3, 100], [(1 << 63) - 1, -(1 << 63)], [-5, -1]])
@pytest.mark.parametrize("code", EVERY)
def test_disorder_writes_nothing_outside(text: Any, code: str, wrong: list[int]) -> None:
    """The host waits for no encoder but Golomb-Rice's, so no other can refuse."""
    size = wire.rice_words(2, 100) if code == "rice" else CODES[code](2, 100)
    room = poisoned(size + 40)
    out = room[20 : 20 + size]
    if code == "rice":
        with pytest.raises(SparcommError, match="strictly increasing, from 0 to below m=100"):
            text.rice_encode(torch.tensor(wrong), 100, out)
        with pytest.raises(SparcommError, match="strictly increasing, from 0 to below m=2"):
            text.rice_encode(torch.tensor(wrong), 2, out[:0])
    else:
        getattr(text, f"{code}_encode")(torch.tensor(wrong), 100, out)
    assert torch.equal(room[:20], poisoned(20))
    assert torch.equal(room[20 + size :], poisoned(20))


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("size", [3, 4, 255, 1025])
def test_bitmaps_that_begin_anywhere(text: Any, size: int, offset: int) -> None:
    m = 32 * size - 3
    mask = (data("normal", m + offset, torch.float32) > 0)[offset:]
    room, expected = poisoned(size + 8), bitmap_for(m)
    text.pack(mask, room[offset : offset + size])
    cpu.pack(mask, expected)
    assert torch.equal(room[offset : offset + size], expected)
    assert torch.equal(text.unpack(room[offset : offset + size], m), mask)
    assert torch.equal(room[offset + size :], poisoned(8 - offset))
    rows = torch.cat([random_words(3, size + offset) for _ in range(2)])[:, offset:]
    for given in (rows, as_payloads(rows)):
        text.unite(given, room[offset : offset + size])
        cpu.unite(given, expected)
        assert torch.equal(room[offset : offset + size], expected)


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 127, 128, 129, 1000])
def test_support_of_long_vectors(text: Any, width: int, dtype: torch.dtype) -> None:
    n = 9001 if width < 31 else 40_003
    x = data("special", n, dtype) * (torch.arange(n) % (7 * width + 3) == 0)
    outs = [bitmap_for(-(-n // width)) for _ in range(2)]
    for kernels, out in zip((text, cpu), outs, strict=True):
        kernels.support(x, width, out)
    assert torch.equal(*outs)


def check_merged(text: Any, a: Sparse, b: Sparse) -> None:
    ours, specified = (kernels.merge_sum(a, b) for kernels in (text, reference))
    assert torch.equal(ours.index, specified.index)
    assert same(ours.value, specified.value)


@pytest.mark.parametrize("counts", [(0, 0), (0, 300), (300, 0), (1, 1025), (1024, 257), (5000, 5000)])
def test_unions_of_long_lists(text: Any, counts: tuple[int, int]) -> None:
    m = 10_000
    lists = [Sparse(increasing(k, m, s), data("normal", k, torch.float64, s), m) for s, k in enumerate(counts)]
    check_merged(text, lists[0], lists[1])
    same_index = Sparse(lists[0].index, -lists[0].value, m)
    check_merged(text, lists[0], same_index)


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_expand_takes_any_number_of_lists(text: Any, dtype: torch.dtype, blocks: int) -> None:
    layout = dealt(30_001, blocks)
    index = [increasing(0 if b % 3 == 1 else layout.length // (b + 2), layout.length, b) for b in range(blocks)]
    for working in (torch.float32, torch.float64):
        value = [data("special", i.numel(), working, b) for b, i in enumerate(index)]
        outs = [torch.full((layout.numel,), 9.0, dtype=dtype) for _ in range(2)]
        for kernels, out in zip((text, reference), outs, strict=True):
            kernels.expand(out, index, value, layout)
        assert same(*outs)


@pytest.mark.parametrize("k", [255, 257, 6000])
def test_flags_of_additions_come_from_any_block(text: Any, k: int) -> None:
    layout = whole(20_000)
    index = increasing(k, 20_000)
    for at in (0, k // 2, k - 1):
        for bad, expected in ((float("inf"), wire.NONFINITE), (None, wire.DAMAGED)):
            value, wild = torch.ones(k), index.clone()
            if bad is None:
                wild[at] = 1 << 50
            else:
                value[at] = bad
            flags = torch.zeros(4, dtype=torch.uint8)  # only one byte of a word is anybody's
            text.add(torch.zeros(20_000), wild, value, layout, 0, flags[1:2])
            assert flags.tolist() == [0, expected, 0, 0]


def test_pointers_of_the_wrong_kind_are_refused() -> None:
    layout, x, index, flags = whole(100), torch.zeros(100), torch.arange(5), torch.zeros(1, dtype=torch.uint8)
    words = torch.empty(wire.elias_fano_words(5, 100), dtype=torch.int32)
    for call in (
        lambda: cuda.gather(x, index.int(), layout, 0),
        lambda: cuda.gather(x.half(), index, layout, 0),
        lambda: cuda.gather(x[:99], index, layout, 0),
        lambda: cuda.gather(x, index, layout, 1),
        lambda: cuda.subtract(x, index, torch.ones(5, dtype=torch.float64), layout, 0),
        lambda: cuda.subtract(x, index, torch.ones(4), layout, 0),
        lambda: cuda.add(x, index, torch.ones(5), layout, 0, flags.int()),
        lambda: cuda.scatter(x.int(), index, torch.ones(5), layout, 0),
        lambda: cuda.expand(x, [index], [torch.ones(4)], layout),
        lambda: cuda.elias_fano_encode(index.int(), 100, words),
        lambda: cuda.elias_fano_encode(index, 100, words.long()),
        lambda: cuda.elias_fano_decode(words.long(), 5, 100, flags),
        lambda: cuda.bitmap_encode(index, 100, torch.empty(8, dtype=torch.int32)[::2]),
        lambda: cuda.gather(x, torch.empty(5, dtype=torch.int64, device="meta"), layout, 0),
        lambda: cuda.unite(words.view(1, -1), torch.empty_like(words, device="meta")),
    ):
        with pytest.raises(SparcommError, match="must be"):
            call()


def test_lists_need_not_be_contiguous(text: Any) -> None:
    x, index, value = data("normal", 300, torch.float32), torch.arange(200)[::2], torch.arange(200.0)[::2]
    assert torch.equal(text.gather(x, index, whole(300), 0), x[:200:2])
    total = text.merge_sum(Sparse(index, value, 300), Sparse(index[:0], value[:0], 300))
    assert torch.equal(total.value, value)
    words = torch.empty(wire.bitmap_words(300), dtype=torch.int32)
    text.bitmap_encode(index, 300, words)
    assert torch.equal(decode(text, "bitmap", words, 100, 300)[0], index)


class Nobody:
    """A launcher of a device without data: whoever looks at any gets an error."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def multiprocessors(self, device: torch.device) -> int:
        return 1

    def launch(self, text: str, kernel: str, *rest: Any) -> None:
        self.launched.append(kernel)


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    device = Nobody()
    monkeypatch.setitem(launch.launchers, "meta", device)
    layout, x, flags = dealt(1000, 3, "meta"), meta(1000), meta(1, dtype=torch.uint8)
    index, value = meta(20, dtype=torch.int64), meta(20)
    cuda.subtract(x, index, cuda.gather(x, index, layout, 1), layout, 1)
    cuda.add(x, index, value, layout, 1, flags)
    cuda.scatter(x, index, value, layout, 1)
    cuda.expand(x, [index] * 3, [value] * 3, layout)
    for code, size in CODES.items():
        words = meta(size(20, 1000), dtype=torch.int32)
        getattr(cuda, f"{code}_encode")(index, 1000, words)
        assert getattr(cuda, f"{code}_decode")(words, 20, 1000, flags).shape == (20,)
    words, rows = meta(32, dtype=torch.int32), meta(4, 32, dtype=torch.int32)
    cuda.pack(cuda.unpack(words, 1000), words)
    for width in (1, 5, 100):
        cuda.support(x, width, meta(wire.bitmap_words(-(-1000 // width)), dtype=torch.int32))
    assert cuda.popcount(words).shape == ()
    assert cuda.rank(words, cuda.prefix(words), index).shape == (20,)
    cuda.unite(rows, words)
    kernels: Sequence[str] = device.launched
    assert len(kernels) == 21, kernels
