"""Votes, values and sketches where loops are cut among blocks, warps and vectors: edges of sizes, places and orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.errors import SparcommError
from sparcomm.kernels import reference
from support.bitmaps import as_payloads, poisoned, random_words
from support.kernels import GRADIENTS, IMPLEMENTATIONS, WORKING, data, same
from support.sketches import integers, keys, table_of

COMPILED = [name for name in IMPLEMENTATIONS if name != "reference"]
SIZES = (127, 129, 255, 256, 257, 1023, 1024, 1025, 4097)
TURNS = (1 << 18) + 33  # more than all of the emulator's threads take in a turn of any loop


@contextmanager
def any_order(name: str, seed: int) -> Iterator[None]:
    """Within it the threads of the CUDA text take turns in another order."""
    if name != "text":
        yield
        return
    from support.emulator import schedule

    with schedule(seed):
        yield


def everything(kernels: Any, n: int, shift: int = 0) -> list[Tensor]:
    """All results for vectors of n elements that start ``shift`` elements behind an aligned address."""
    results: list[Tensor] = []
    for dtype in WORKING:
        x = room(n, dtype, shift).copy_(data("special", n, dtype))
        results += [*signs(kernels, x, shift), *values(kernels, x, shift)]
    for dtype in (torch.float16, torch.bfloat16):
        results += signs(kernels, room(n, dtype, shift).copy_(data("special", n, dtype)), shift)
    words = room(n, torch.int32, shift).copy_(random_words(n))
    rounded = room(n, torch.bfloat16, shift)
    kernels.round_stochastic(data("special", n, torch.float32), rounded, 5)
    return [*results, rounded, kernels.checksum(words)]


def room(n: int, dtype: torch.dtype, shift: int) -> Tensor:
    """(n,) of rubbish, so many elements behind an aligned address."""
    return torch.full((n + shift,), 99, dtype=torch.float64).to(dtype)[shift:]


def signs(kernels: Any, x: Tensor, shift: int) -> list[Tensor]:
    n, working = x.numel(), torch.float64 if x.dtype == torch.float64 else torch.float32
    flags = torch.zeros(8, dtype=torch.uint8)
    count = wire.bitmap_words(n)
    minus, apart, some = (room(count, torch.int32, shift) for _ in range(3))
    kernels.pack_signs(x, "alternate", 3, 1 << 40, minus, None, flags[shift : shift + 1])
    kernels.pack_signs(x, "negative", 3, 0, apart, some, flags[shift + 1 : shift + 2])
    spread, scale = room(n, working, shift), torch.tensor(0.7, dtype=working)
    kernels.spread_signs(minus, some, scale, spread)
    added = room(n, working, shift)
    kernels.add_signs(apart, None, scale, added)
    kernels.add_signs(minus, some, scale, added)
    return [minus, apart, some, flags, spread, added]


def values(kernels: Any, x: Tensor, shift: int) -> list[Tensor]:
    n, found, flags = x.numel(), [], torch.zeros(8, dtype=torch.uint8)
    for seed in (None, 5):
        scale, code = room(wire.scales(n), torch.uint8, shift), room(n, torch.int8, shift)
        found += [kernels.quantize(x, scale, code, seed), scale.clone(), code.clone()]
    found += [kernels.dequantize(scale, code, x.dtype, flags[shift : shift + 1])]
    code[n - 1] = -128
    found += [kernels.dequantize(scale, code, x.dtype, flags[shift + 1 : shift + 2]), flags]
    for dtype in WIRE_DTYPES.values():
        short = room(n, dtype, shift)
        found += [kernels.narrow(x, short), short, kernels.widen(short, x.dtype)]
    fixed = room(n, torch.int32, shift)
    return [*found, kernels.to_fixed(x, -9, 700, fixed), fixed, kernels.from_fixed(fixed, -9, x.dtype)]


def agree(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) == len(others) and all(map(same, ours, others))


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", COMPILED)
def test_vectors_of_any_length_anywhere(name: str, n: int, shift: int) -> None:
    assert agree(everything(IMPLEMENTATIONS[name], n, shift), everything(reference, n, shift))


@pytest.mark.parametrize("name", COMPILED)
def test_more_elements_than_threads(name: str) -> None:
    kernels = IMPLEMENTATIONS[name]
    assert agree(everything(kernels, TURNS, 1), everything(reference, TURNS, 1))
    for dtype in GRADIENTS:
        x = data("normal", 2 * TURNS, dtype)
        assert float(kernels.absolute_sum(x)) == pytest.approx(float(x.double().abs().sum()), rel=1e-13)


@pytest.mark.parametrize("count", [7, 8, 15, 16, 127, 128, 255, 256])
@pytest.mark.parametrize("name", COMPILED)
def test_as_many_voters_as_planes_can_count(name: str, count: int) -> None:
    rows = torch.cat([torch.full((count, 1), -1, dtype=torch.int32), random_words(count, 2)], 1)
    rows[count // 2 :, 1] = 0  # a tie, if they are even
    may = torch.cat([torch.full((count, 2), -1, dtype=torch.int32), random_words(count, 1, seed=1)], 1)
    answers = []
    for kernels in (IMPLEMENTATIONS[name], reference):
        out, verdict, voted = poisoned(3), poisoned(3), poisoned(3)
        kernels.vote(rows, None, "alternate", 7, 0, out, None)
        kernels.vote(rows, may, "alternate", 7, 0, verdict, voted)
        answers.append([out, verdict, voted])
    assert agree(*answers)
    assert answers[0][0][0] == -1


@pytest.mark.parametrize("name", COMPILED)
def test_more_words_and_keys_than_threads(name: str) -> None:
    def call(kernels: Any) -> list[Tensor]:
        rows, may = as_payloads(random_words(3, 9000)), random_words(3, 9000, seed=1)
        out, verdict, voted = poisoned(9000), poisoned(9000), poisoned(9000)
        kernels.vote(rows, None, "alternate", 7, 3, out, None)
        kernels.vote(rows, may, "alternate", 7, 3, verdict, voted)
        key = keys(9000)
        table, counts = table_of(kernels, key, data("spread", 9000, torch.float32), 1, 3, 5000)
        found = [kernels.estimate(table, key, 1, 7, None, how) for how in ("median", "mean")]
        found += [kernels.estimate(table, key, 1, 7, counts, "projection"), counts.clone(), table]
        exact, _ = table_of(kernels, key, integers(9000), 1, 3, 5000)
        return [out, verdict, voted, *found, *kernels.peel(exact, key, 1, 7, counts), exact, counts]

    assert agree(call(IMPLEMENTATIONS[name]), call(reference))


@pytest.mark.parametrize("rows", [4, 7, 8, 9, 12])
@pytest.mark.parametrize("kind", ["special", "equal", "zero", "normal"])
@pytest.mark.parametrize("name", COMPILED)
def test_medians_of_many_rows(name: str, kind: str, rows: int) -> None:
    key = keys(40)
    for dtype in WORKING:
        table = data(kind, rows * 2 * 9, dtype).view(rows, 18)
        answers = [k.estimate(table, key, 2, 7, None, "median") for k in (IMPLEMENTATIONS[name], reference)]
        assert same(*answers)


@pytest.mark.parametrize(
    ("k", "columns"), [(1, 1), (16, 1), (17, 1), (18, 1), (33, 2), (1000, 1), (1000, 7), (3000, 99)]
)
@pytest.mark.parametrize("name", COMPILED)
def test_sums_of_many_keys_are_in_their_order(name: str, k: int, columns: int) -> None:
    key, value = keys(k), data("spread", 2 * k, torch.float32)
    expected = table_of(reference, key, value, 2, 2, columns)
    for seed in (0, 1, 2):
        with any_order(name, seed):
            assert agree(list(table_of(IMPLEMENTATIONS[name], key, value, 2, 2, columns)), list(expected))


@pytest.mark.parametrize("name", COMPILED)
def test_rounds_of_peeling_are_counted_across_batches(name: str) -> None:
    seen: set[int] = set()
    for seed in range(12):
        key = keys(120, seed)
        answers = []
        for kernels in (IMPLEMENTATIONS[name], reference):
            table, counts = table_of(kernels, key, integers(120), 1, 3, 50, seed)
            answers.append([*kernels.peel(table, key, 1, seed, counts), table, counts])
        assert agree(*answers)
        seen.add(int(answers[0][2]))
    assert {8, 9} <= seen, seen


@pytest.mark.parametrize("name", COMPILED)
def test_no_order_of_threads_changes_a_bit(name: str) -> None:
    kernels, key = IMPLEMENTATIONS[name], keys(700)
    fixed = integers(1400)

    def call() -> list[Tensor]:
        table, counts = table_of(kernels, key, data("spread", 1400, torch.float32), 2, 3, 300)
        exact, counts_too = table_of(kernels, key, fixed, 2, 3, 300)
        left = [*kernels.peel(exact, key, 2, 7, counts_too), exact, counts_too]
        x = data("spread", 40_000, torch.float32)
        return [table, counts, *left, kernels.absolute_sum(x), *everything(kernels, 1500)]

    expected = call()
    for seed in (0, 1, 2, 3):
        with any_order(name, seed):
            assert agree(call(), expected)


def test_what_does_not_lie_side_by_side_is_refused() -> None:
    if "text" not in IMPLEMENTATIONS:
        return
    text, apart, flags = IMPLEMENTATIONS["text"], torch.ones(8)[::2], torch.zeros(1, dtype=torch.uint8)
    byte, code = torch.zeros(1, dtype=torch.uint8), torch.zeros(8, dtype=torch.int8)
    calls: list[Callable[[], Any]] = [
        lambda: text.quantize(apart, byte, code[:4], None),
        lambda: text.quantize(torch.ones(4), byte, code[::2], None),
        lambda: text.dequantize(byte, code[::2], torch.float32, flags),
        lambda: text.narrow(apart, torch.ones(4)),
        lambda: text.narrow(torch.ones(4), apart),
        lambda: text.round_stochastic(apart, torch.ones(4, dtype=torch.bfloat16), 0),
        lambda: text.checksum(torch.zeros(8, dtype=torch.int32)[::2]),
    ]
    for call in calls:
        with pytest.raises(SparcommError, match="must be contiguous"):
            call()
    half = torch.ones(4, dtype=torch.float16)
    for call in (
        lambda: text.narrow(half, torch.ones(4)),
        lambda: text.quantize(half, byte, code[:4], None),
        lambda: text.dequantize(byte, code[:4], torch.float16, flags),
        lambda: text.narrow(torch.ones(4), torch.ones(4, dtype=torch.float64)),
    ):
        with pytest.raises(SparcommError, match=r"must be (float32 or float64|one of)"):
            call()
