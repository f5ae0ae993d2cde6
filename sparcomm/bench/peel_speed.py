"""The kernels of sketches beside the same in torch: what a key costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparcomm.kernels import bits, kernels_for, reference

PEELED = 1.3  # cells per key, of exact tables
SEED = 5


class Speed(NamedTuple):
    """One kernel at one number of keys.

    Attributes:
        keys, what: how many, and which kernel.
        ours, torch: CPU nanoseconds per key of the fastest run.
        hashed: torch's, once it has been told buckets and signs; None for peeling.
        ratio: torch over ours.
    """

    keys: int
    what: str
    ours: float
    torch: float
    hashed: float | None
    ratio: float


class Hashes:
    """Buckets and signs of keys in plain torch: flat places in a table, and factors of ``dtype``."""

    def __init__(self, key: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        word = torch.stack([bits.noise(key, SEED + r * 0x9E3779B9) for r in range(rows)])
        first = columns * torch.arange(rows).unsqueeze(1)
        self.place = ((word * columns >> 32) + first).view(-1)
        self.sign = (1 - 2 * (word & 1)).to(dtype).view(rows, -1, 1)

    def sketch(self, value: Tensor, out: Tensor) -> None:
        """The table (rows * columns, width) of values (k, width)."""
        out.zero_().index_add_(0, self.place, (self.sign * value).view(-1, value.shape[1]))

    def found(self, table: Tensor) -> Tensor:
        """(rows, k, width) of a table (rows * columns, width)."""
        return self.sign * table[self.place].view(self.sign.shape[0], -1, table.shape[1])


def speeds(counts: Sequence[int], rows: int, width: int, repeat: int) -> Iterator[Speed]:
    """Rows of all kernels for each number of keys."""
    for k in counts:
        yield from _floats(k, rows, width, repeat)
        yield from _integers(k, rows, width, repeat)


def _floats(k: int, rows: int, width: int, repeat: int) -> Iterator[Speed]:
    """Sketch and estimates, with as many cells in a row as keys in all."""
    columns, key, dtype = k, _keys(k), torch.float32
    kernels, value = kernels_for(key), torch.randn(k * width)
    table, counts = torch.empty(rows, columns * width), torch.empty((rows, columns), dtype=torch.int32)
    flat, lanes = table.view(-1, width), value.view(-1, width)
    given = Hashes(key, rows, columns, dtype)

    def made() -> Hashes:
        return Hashes(key, rows, columns, dtype)

    yield _row(k, "sketch", repeat, lambda: kernels.sketch(key, value, width, SEED, table),
               lambda: made().sketch(lanes, flat), lambda: given.sketch(lanes, flat))  # fmt: skip
    kernels.occupancy(key, SEED, columns, counts)
    shared = counts.view(-1)

    def projected(hashes: Hashes) -> Tensor:
        return (hashes.found(flat) / shared[hashes.place].view(rows, -1, 1)).mean(0)

    yield _row(k, "estimate, mean", repeat, lambda: kernels.estimate(table, key, width, SEED, None, "mean"),
               lambda: made().found(flat).mean(0), lambda: given.found(flat).mean(0))  # fmt: skip
    yield _row(k, "estimate, median", repeat, lambda: kernels.estimate(table, key, width, SEED, None, "median"),
               lambda: made().found(flat).median(0), lambda: given.found(flat).median(0))  # fmt: skip
    yield _row(k, "estimate, projection", repeat,
               lambda: kernels.estimate(table, key, width, SEED, counts, "projection"),
               lambda: projected(made()), lambda: projected(given))  # fmt: skip


def _integers(k: int, rows: int, width: int, repeat: int) -> Iterator[Speed]:
    """Encoding and peeling."""
    columns, key = max(1, int(PEELED * k / rows)), _keys(k)
    kernels, value = kernels_for(key), torch.arange(k * width, dtype=torch.int32)
    table, counts = (torch.empty((rows, columns * w), dtype=torch.int32) for w in (width, 1))
    flat, lanes, given = table.view(-1, width), value.view(-1, width), Hashes(key, rows, columns, torch.int32)
    yield _row(k, "encode", repeat, lambda: kernels.sketch(key, value, width, SEED, table),
               lambda: Hashes(key, rows, columns, torch.int32).sketch(lanes, flat),
               lambda: given.sketch(lanes, flat))  # fmt: skip
    kernels.sketch(key, value, width, SEED, table)
    kernels.occupancy(key, SEED, columns, counts)
    yield _row(k, "peel", repeat, lambda: kernels.peel(table.clone(), key, width, SEED, counts.clone()),
               lambda: reference.peel(table.clone(), key, width, SEED, counts.clone()), None)  # fmt: skip


def _keys(k: int) -> Tensor:
    g = torch.Generator().manual_seed(k)
    return torch.randint(1, max(2, (1 << 32) // k), (k,), generator=g).cumsum(0) - 1


def _row(
    k: int, what: str, repeat: int, ours: Callable[[], object], torchs: Callable[[], object],
    hashed: Callable[[], object] | None,
) -> Speed:  # fmt: skip
    mine, other = _best(k, repeat, ours), _best(k, repeat, torchs)
    return Speed(k, what, mine, other, None if hashed is None else _best(k, repeat, hashed), other / mine)


def _best(k: int, repeat: int, run: Callable[[], object]) -> float:
    """CPU nanoseconds per key of the fastest of so many runs, after one that does not count."""
    best = float("inf")
    loops = max(1, 3_000 // k)  # the clock is too coarse for a single short run
    run()
    for _ in range(repeat):
        start = time.process_time()
        for _ in range(loops):
            run()
        best = min(best, (time.process_time() - start) / loops)
    return 1e9 * max(best, 1e-9) / k
