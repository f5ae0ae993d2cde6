"""Sketches: tables by their definition, laws, what estimates are worth, and peeling that is exact or says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm.errors import SparcommError
from sparcomm.kernels import cpu, reference
from support.kernels import IMPLEMENTATIONS, WORKING, data, same
from support.sketches import hashed, integers, keys, table_of

SEED = 7
WAYS = ("median", "mean", "projection")
COMPILED = [kernels for kernels in IMPLEMENTATIONS.values() if kernels is not reference]
EDGES = torch.tensor([0, 1, 2, (1 << 16) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1])


def by_hand(key: Tensor, value: Tensor, width: int, rows: int, columns: int, seed: int) -> Tensor:
    """The table by its definition: every sum from left to right, in the dtype of the values."""
    out = torch.zeros(rows, columns, width, dtype=value.dtype)
    lanes = value.view(-1, width)
    for r in range(rows):
        for i, k in enumerate(key.tolist()):
            bucket, sign = hashed(k, r, seed, columns)
            out[r, bucket] += sign * lanes[i]
    return out.view(rows, -1)


def signed(table: Tensor, key: int, width: int, columns: int, seed: int) -> Tensor:
    """(rows, width): what the cells of a key say of it."""
    found = []
    for r in range(table.shape[0]):
        bucket, sign = hashed(key, r, seed, columns)
        found.append(sign * table[r].view(columns, width)[bucket])
    return torch.stack(found)


@pytest.mark.parametrize("width", [1, 2, 3, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_tables_counts_and_estimates_are_as_defined(kernels: Any, rows: int, width: int) -> None:
    for key, columns, seed in (
        (EDGES, 5, 0),
        (EDGES[:1], 1, (1 << 32) - 1),
        (keys(40), 13, 0x61C88647),
        (key0(), 4, 1),
    ):
        value = data("normal", key.numel() * width, torch.float32)
        table, counts = table_of(kernels, key, value, width, rows, columns, seed)
        assert same(table, by_hand(key, value, width, rows, columns, seed))
        buckets = [[hashed(k, r, seed, columns)[0] for k in key.tolist()] for r in range(rows)]
        assert counts.tolist() == [[row.count(c) for c in range(columns)] for row in buckets]
        median, mean, projection = (
            kernels.estimate(table, key, width, seed, counts if how == "projection" else None, how).view(-1, width)
            for how in WAYS
        )
        for i, k in enumerate(key.tolist()):
            found = signed(table, k, width, columns, seed)
            shared = torch.tensor([[counts[r, buckets[r][i]]] for r in range(rows)])
            ordered = found.sort(dim=0).values
            middle = (ordered[(rows - 1) // 2] + ordered[rows // 2]) / 2
            torch.testing.assert_close(median[i], middle, rtol=0, atol=0)
            torch.testing.assert_close(mean[i], found.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(projection[i], (found / shared).mean(0), rtol=1e-5, atol=1e-6)


def key0() -> Tensor:
    """No key."""
    return torch.empty(0, dtype=torch.int64)


@given(
    k=st.sampled_from([0, 1, 2, 31, 255, 256, 257, 600]),
    width=st.sampled_from([1, 2, 3, 16]),
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 7, 50, 333]),
    seed=st.integers(0, (1 << 32) - 1),
    kind=st.sampled_from(["normal", "spread", "tiny", "special"]),
    dtype=st.sampled_from(WORKING),
)
@settings(max_examples=60, deadline=None)
def test_the_same_bits_from_all(
    k: int, width: int, rows: int, columns: int, seed: int, kind: str, dtype: torch.dtype
) -> None:
    key, value = keys(k, seed), data(kind, k * width, dtype, seed & 0xFF)
    ours, counts = table_of(reference, key, value, width, rows, columns, seed)
    for kernels in COMPILED:
        made, others = table_of(kernels, key, value, width, rows, columns, seed)
        assert same(made, ours)
        assert torch.equal(others, counts)
    counts[torch.arange(counts.numel()).view_as(counts) % 5 == 0] -= 1  # some of them 0 or less
    for how in WAYS:
        shared = counts if how == "projection" else None
        answers = [kernels.estimate(ours, key, width, seed, shared, how) for kernels in IMPLEMENTATIONS.values()]
        assert all(same(answer, answers[0]) for answer in answers)
        assert answers[0].shape == (k * width,)


@given(
    k=st.sampled_from([0, 1, 2, 31, 257, 600]),
    width=st.sampled_from([1, 2, 3, 16]),
    rows=st.integers(1, 5),
    ratio=st.sampled_from([0.01, 0.5, 1.2, 1.5, 3.0]),
    seed=st.integers(0, (1 << 32) - 1),
    rubbish=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_peeling_gives_the_same_bits_from_all(
    k: int, width: int, rows: int, ratio: float, seed: int, rubbish: bool
) -> None:
    key, columns = keys(k, seed), max(1, int(k * ratio / rows))
    every = IMPLEMENTATIONS.values()
    tables = [table_of(kernels, key, integers(k * width), width, rows, columns, seed) for kernels in every]
    assert all(same(table, tables[0][0]) for table, _ in tables)
    if rubbish:  # a table that was damaged on its way
        for table, _ in tables:
            table.copy_(integers(table.numel(), 1).view_as(table))
    results = [kernels.peel(*peeled(pair, key, width, seed)) for kernels, pair in zip(every, tables, strict=True)]
    for result, pair in zip(results[1:], tables[1:], strict=True):
        assert all(map(same, (*result, *pair), (*results[0], *tables[0])))


def peeled(pair: tuple[Tensor, Tensor], key: Tensor, width: int, seed: int) -> tuple[Any, ...]:
    """The arguments of ``peel``."""
    return pair[0], key, width, seed, pair[1]


def test_sketches_are_linear(kernels: Any) -> None:
    both = keys(500)
    for dtype, whole in ((torch.int32, integers(1500)), (torch.float32, integers(1500, bits=12).float())):
        total = torch.zeros(3, 3 * 200, dtype=dtype)
        for share in (torch.arange(0, 500, 2), torch.arange(1, 500, 2), torch.arange(0, 250)):
            value = whole.view(-1, 3)[share].reshape(-1)
            total += table_of(kernels, both[share], value, 3, 3, 200)[0]
        times = 1 + (torch.arange(1500) < 750).to(dtype)
        assert torch.equal(total, table_of(kernels, both, whole * times, 3, 3, 200)[0])


def test_the_seed_and_the_row_decide(kernels: Any) -> None:
    key, value = keys(300), integers(300)
    first = table_of(kernels, key, value, 1, 3, 100)[0]
    assert torch.equal(first, table_of(kernels, key, value, 1, 3, 100)[0])
    assert torch.equal(first[:2], table_of(kernels, key, value, 1, 2, 100)[0])
    for other in (first[1], first[2], table_of(kernels, key, value, 1, 1, 100, SEED + 1)[0][0]):
        assert not torch.equal(first[0], other)


def test_large_tables_are_made_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparcomm.kernels.cpu import _parts

    key, value = keys(5000), data("normal", 5000, torch.float32)
    alone = table_of(cpu, key, value, 1, 3, 3000)
    estimates = [cpu.estimate(alone[0], key, 1, SEED, alone[1] if how == "projection" else None, how) for how in WAYS]
    monkeypatch.setattr(_parts, "LARGE", 1000)
    monkeypatch.setattr(_parts, "LEAST", 700)
    monkeypatch.setattr("sparcomm.threads.allowed", lambda: 3)
    together = table_of(cpu, key, value, 1, 3, 3000)
    assert same(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    for how, expected in zip(WAYS, estimates, strict=True):
        shared = alone[1] if how == "projection" else None
        assert same(cpu.estimate(alone[0], key, 1, SEED, shared, how), expected)


def test_buckets_are_uniform_and_signs_balanced() -> None:
    for key in (torch.arange(100_000), torch.arange(0, 100_000 * 64, 64), keys(100_000)):  # strided supports, too
        columns = 1000
        counts = torch.empty(3, columns, dtype=torch.int32)
        cpu.occupancy(key, SEED, columns, counts)
        chi = (counts.double() - 100).square().sum(1) / 100
        assert bool(((chi - columns).abs() < 6 * (2 * columns) ** 0.5).all()), chi
        table, _ = table_of(cpu, key, torch.ones(100_000), 1, 3, columns)
        signs = table.sum(1)
        assert bool((signs.abs() < 5 * 100_000**0.5).all()), signs
        mean_square = table.double().square().mean(1)  # signs within a bucket are independent of each other
        assert bool((mean_square / 100 - 1).abs().max() < 6 * (2 / columns) ** 0.5), mean_square
    together = table_of(cpu, torch.arange(100_000), torch.ones(100_000), 1, 3, 1000)[0].double()
    correlation = (together @ together.T) / (100 * 1000)
    assert float((correlation - correlation.diag().diag()).abs().max()) < 5 / 1000**0.5  # and of other rows


@pytest.mark.parametrize(
    ("ratio", "mean", "projection", "median"),
    [
        (0.25, 4.1, 0.75, 5.47),
        (0.5, 2.05, 0.56, 2.49),
        (1, 0.99, 0.36, 1.18),
        (2, 0.5, 0.21, 0.5),
        (4, 0.24, 0.12, 0.183),
    ],
)
def test_what_estimates_are_worth(ratio: float, mean: float, projection: float, median: float) -> None:
    """Squared errors of one row, and of three rows in the same room, relative to the values' own squares.

    Those of the median depend on how values are distributed; here as simulated with ideal hashes for normal ones.
    """
    k = 20_000
    key, value = keys(k), data("normal", k, torch.float64)

    def error(estimate: Tensor) -> float:
        return float((estimate - value).square().sum() / value.square().sum())

    table, counts = table_of(cpu, key, value, 1, 1, int(ratio * k))
    raw = cpu.estimate(table, key, 1, SEED, None, "mean")
    divided = cpu.estimate(table, key, 1, SEED, counts, "projection")
    assert error(raw) == pytest.approx(mean, rel=0.1)
    assert error(divided) == pytest.approx(projection, rel=0.1)
    alone = (divided - value).abs() < 1e-12
    assert float(alone.double().mean()) == pytest.approx(math.exp(-1 / ratio), rel=0.1)
    assert same(cpu.estimate(table, key, 1, SEED, None, "median"), raw)
    three, _ = table_of(cpu, key, value, 1, 3, int(ratio * k / 3))
    assert error(cpu.estimate(three, key, 1, SEED, None, "median")) == pytest.approx(median, rel=0.15)
    assert error(cpu.estimate(three, key, 1, SEED, None, "mean")) == pytest.approx(mean, rel=0.15)


def test_one_row_projects_orthogonally(kernels: Any) -> None:
    key, value = keys(2000), data("normal", 2000, torch.float64)
    table, counts = table_of(kernels, key, value, 1, 1, 900)
    once = kernels.estimate(table, key, 1, SEED, counts, "projection")
    again = kernels.estimate(table_of(kernels, key, once, 1, 1, 900)[0], key, 1, SEED, counts, "projection")
    torch.testing.assert_close(again, once)
    assert abs(float(once @ (value - once))) < 1e-9 * float(value @ value)


@pytest.mark.parametrize("width", [1, 3])
def test_peeling_is_exact_whatever_overflows(kernels: Any, width: int) -> None:
    seeds = range(40 if kernels is cpu else 8)
    complete = 0
    for seed in seeds:
        key, value = keys(1000, seed), integers(1000 * width, seed)
        table, counts = table_of(kernels, key, value, width, 3, 500, seed)
        found, done, rounds = kernels.peel(table, key, width, seed, counts)
        complete += bool(done.all())
        assert 4 <= int(rounds) <= 25
        check_leftovers(kernels, key, value, width, seed, found, done, table, counts)
    assert complete >= 0.9 * len(seeds)


def check_leftovers(
    kernels: Any,
    key: Tensor,
    value: Tensor,
    width: int,
    seed: int,
    found: Tensor,
    done: Tensor,
    table: Tensor,
    counts: Tensor,
) -> None:
    """What was peeled is right, what was not is 0, and the table has just that left."""
    known, expected = found.view(-1, width), value.view(-1, width)
    assert torch.equal(known[done], expected[done])
    assert not known[~done].any()
    left = expected[~done].reshape(-1)
    rest, rest_counts = table_of(kernels, key[~done], left, width, table.shape[0], counts.shape[1], seed)
    assert torch.equal(table, rest)
    assert torch.equal(counts, rest_counts)
    assert not bool((counts == 1).any())


def test_ranks_tables_add_up_and_peel_to_sums(kernels: Any) -> None:
    key, size = keys(900), 5
    g = torch.Generator().manual_seed(1)
    expected, total = torch.zeros(1800, dtype=torch.int32), torch.zeros(3, 2 * 600, dtype=torch.int32)
    for rank in range(size):
        own = torch.rand(900, generator=g) < 0.4
        value = integers(1800, rank) * own.repeat_interleave(2)
        expected += value
        total += table_of(kernels, key[own], value.view(-1, 2)[own].reshape(-1), 2, 3, 600)[0]
    counts = table_of(kernels, key, expected, 2, 3, 600)[1]
    found, done, _ = kernels.peel(total, key, 2, SEED, counts)
    assert bool(done.all())
    assert torch.equal(found, expected)
    assert not total.any()


def core(key: Tensor, rows: int, columns: int) -> list[bool]:
    """Which keys are outside the 2-core: taken away one at a time, in any order."""
    cells = [[(r, hashed(k, r, SEED, columns)[0]) for r in range(rows)] for k in key.tolist()]
    done, progress = [False] * len(cells), True
    while progress:
        progress = False
        for i in reversed(range(len(cells))):
            others = {cell for j, own in enumerate(cells) for cell in own if j != i and not done[j]}
            if not done[i] and any(cell not in others for cell in cells[i]):
                done[i] = progress = True
    return done


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (1, 3), (12, 3), (14, 3), (20, 2), (9, 5), (60, 1)])
def test_what_is_left_is_the_two_core(kernels: Any, columns: int, rows: int) -> None:
    key, value = keys(40, columns), integers(40)
    table, counts = table_of(kernels, key, value, 1, rows, columns)
    found, done, rounds = kernels.peel(table, key, 1, SEED, counts)
    assert done.tolist() == core(key, rows, columns)
    assert int(rounds) <= 40
    check_leftovers(kernels, key, value, 1, SEED, found, done, table, counts)


def test_no_key_and_one_key(kernels: Any) -> None:
    for k in (0, 1):
        value = integers(3 * k)
        table, counts = table_of(kernels, keys(k), value, 3, 3, 1)
        found, done, rounds = kernels.peel(table, keys(k), 3, SEED, counts)
        assert torch.equal(found, value)
        assert done.tolist() == [True] * k
        assert rounds.dtype == torch.int64
        assert int(rounds) == k
        assert not table.any()
        assert not counts.any()


@given(
    k=st.integers(0, 60),
    columns=st.integers(1, 40),
    rows=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
    span=st.sampled_from([1, 2, 1 << 31]),
)
@settings(max_examples=60, deadline=None)
def test_false_counts_do_no_harm(k: int, columns: int, rows: int, seed: int, span: int) -> None:
    key = keys(k, seed)
    g = torch.Generator().manual_seed(seed)
    for kernels in IMPLEMENTATIONS.values():
        around = torch.full((3, rows * columns), 99, dtype=torch.int32)  # that nothing around is touched
        table, counts = around[1].view(rows, columns), integers(rows * columns, seed).view(rows, columns)
        table.copy_(integers(rows * columns, seed + 1).view(rows, columns))
        counts %= torch.randint(1, span + 1, counts.shape, generator=g).clamp(max=(1 << 31) - 1).to(torch.int32)
        found, done, rounds = kernels.peel(table, key, 1, seed, counts)
        assert not found[~done].any()
        assert int(rounds) <= k
        assert bool((around[::2] == 99).all())


@pytest.mark.parametrize("dtype", WORKING)
def test_fixed_point_by_hand(kernels: Any, dtype: torch.dtype) -> None:
    value = torch.tensor([0.0, -0.0, 1.5, 2.5, -2.5, 0.5, -1.5, 7.0, 8.0, -7.5, -9.0], dtype=dtype)
    out = torch.full((11,), 99, dtype=torch.int32)
    assert bool(kernels.to_fixed(value, 0, 7, out))
    assert out.tolist() == [0, 0, 2, 2, -2, 0, -2, 7, 7, -7, -7]
    assert not bool(kernels.to_fixed(value, 0, 9, out))
    assert kernels.to_fixed(value, 2, 7, out).shape == ()
    assert out.tolist() == [0, 0, 0, 1, -1, 0, 0, 2, 2, -2, -2]
    assert torch.equal(kernels.from_fixed(out, 2, dtype), 4 * out.to(dtype))
    for odd, expected in ((math.nan, 0), (math.inf, 5), (-math.inf, -5), (1e30, 5)):
        assert bool(kernels.to_fixed(torch.tensor([1.0, odd], dtype=dtype), 0, 5, out[:2]))
        assert out[:2].tolist() == [1, expected]
    assert kernels.to_fixed(value[:0], 0, 5, out[:0]).item() is False
    assert kernels.from_fixed(out[:0], 0, dtype).dtype == dtype


@given(
    values=st.lists(st.floats(width=32, allow_nan=True), max_size=30),
    exponent=st.one_of(st.integers(-1022, 1022), st.integers(-40, 20)),
    limit=st.one_of(st.integers(1, (1 << 31) - 1), st.just((1 << 31) - 1)),
    dtype=st.sampled_from(WORKING),
)
@settings(max_examples=150, deadline=None)
def test_fixed_point_of_anything(values: list[float], exponent: int, limit: int, dtype: torch.dtype) -> None:
    value = torch.tensor(values, dtype=dtype)
    every = IMPLEMENTATIONS.values()
    outs = [torch.empty(len(values), dtype=torch.int32) for _ in every]
    beyond = [kernels.to_fixed(value, exponent, limit, out) for kernels, out in zip(every, outs, strict=True)]
    assert all(same(out, outs[0]) for out in outs)
    assert all(same(answer, beyond[0]) for answer in beyond)
    assert bool((outs[0].to(torch.int64).abs() <= limit).all())
    back = [kernels.from_fixed(outs[0], exponent, dtype) for kernels in every]
    assert all(same(answer, back[0]) for answer in back)
    if not bool(beyond[0]):
        assert bool(((back[0].double() - value.double()).abs() <= math.ldexp(0.5, exponent)).all())


def test_keys_that_do_not_fit_are_refused(kernels: Any) -> None:
    key, value, table = torch.arange(4), torch.ones(8), torch.empty(3, 10)
    counts = torch.ones(3, 5, dtype=torch.int32)
    for wrong in (key.to(torch.int32), key.view(2, 2), torch.arange(8)[::2]):
        with pytest.raises(SparcommError, match="must be int64, flat, contiguous"):
            kernels.sketch(wrong, value, 2, SEED, table)
    with pytest.raises(SparcommError, match="of width 0"):
        kernels.sketch(key, value, 0, SEED, table)
    for numbers in ([0, 1, 1, 2], [3, 2, 4, 5], [-1, 0, 1, 2], [0, 1, 2, 1 << 32], [0, 1, 2, (1 << 63) - 1]):
        disordered = torch.tensor(numbers)
        for call in (
            lambda key=disordered: kernels.sketch(key, value, 2, SEED, table),
            lambda key=disordered: kernels.occupancy(key, SEED, 5, counts),
            lambda key=disordered: kernels.estimate(table, key, 2, SEED, None, "mean"),
            lambda key=disordered: kernels.peel(counts.clone(), key, 1, SEED, counts),
        ):
            with pytest.raises(SparcommError, match="strictly increasing, from 0 to below"):
                call()


def test_tables_that_do_not_fit_are_refused(kernels: Any) -> None:
    key, value, table = torch.arange(4), torch.ones(8), torch.empty(3, 10)
    counts = torch.ones(3, 5, dtype=torch.int32)
    for bad in (table.half(), table.view(-1), table.t(), table[:, :9], table[:0], table[:, :0], torch.empty(3, 11)):
        with pytest.raises(SparcommError, match="table is"):
            kernels.sketch(key, value, 2, SEED, bad)
        with pytest.raises(SparcommError, match="table is"):
            kernels.estimate(bad, key, 2, SEED, None, "mean")
    with pytest.raises(SparcommError, match=r"table is torch\.int32"):
        kernels.estimate(torch.ones(3, 10, dtype=torch.int32), key, 2, SEED, None, "mean")
    with pytest.raises(SparcommError, match=r"table is torch\.float32"):
        kernels.peel(table, key, 2, SEED, counts)
    for bad in (value[:7], value.double(), torch.ones(16)[::2], value.view(4, 2)):
        with pytest.raises(SparcommError, match=r"must be torch\.float32\[8\]"):
            kernels.sketch(key, bad, 2, SEED, table)
    for bad in (counts[:2], counts[:, :4], counts.long(), counts.t().contiguous().t(), counts.view(-1)):
        for call in (
            lambda bad=bad: kernels.estimate(table, key, 2, SEED, bad, "projection"),
            lambda bad=bad: kernels.peel(torch.ones(3, 10, dtype=torch.int32), key, 2, SEED, bad),
        ):
            with pytest.raises(SparcommError, match=r"must be torch\.int32\[3, 5\]"):
                call()
    for bad, columns in ((counts, 4), (counts, 6), (counts.long(), 5), (counts[:0], 5), (counts[:, :0], 0)):
        with pytest.raises(SparcommError, match="counts are"):
            kernels.occupancy(key, SEED, columns, bad)
    for how, shared in (("median", counts), ("mean", counts), ("projection", None), ("mode", None)):
        with pytest.raises(SparcommError, match=f"how='{how}'"):
            kernels.estimate(table, key, 2, SEED, shared, how)


def test_fixed_point_that_does_not_fit_is_refused(kernels: Any) -> None:
    value, fixed = torch.ones(8), torch.ones(8, dtype=torch.int32)
    for exponent, limit in ((1023, 1), (-1023, 1), (0, 0), (0, 1 << 31)):
        with pytest.raises(SparcommError, match="must be"):
            kernels.to_fixed(value, exponent, limit, fixed)
    for bad_value, bad_fixed in ((value.half(), fixed), (value, fixed.long()), (value[1:], fixed), (value, fixed[1:])):
        with pytest.raises(SparcommError, match="must be"):
            kernels.to_fixed(bad_value, 0, 1, bad_fixed)
    for bad_fixed, dtype in ((fixed, torch.float16), (fixed.long(), torch.float32), (fixed.view(2, 4), torch.float32)):
        with pytest.raises(SparcommError, match="must be int32, flat"):
            kernels.from_fixed(bad_fixed, 0, dtype)
