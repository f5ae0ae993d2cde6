"""Signs packed and votes counted, against torch: how fast the kernels of the sign algorithms are.

    sparcomm bench votes [--numel 25000000] [--ranks 3,8,16] [--repeat 7]

One thread, CPU time, the fastest of so many runs each; torch's is that of the same bits made with torch's operations in
the same process, and they are compared. docs/bench.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm import wire
from sparcomm.bench.options import Parser, at_least, several
from sparcomm.bench.select_rows import best
from sparcomm.kernels import kernels_for

GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, side by side in the highest byte
MOST = 127  # voters, so that torch can count them in bytes
WIDTH = 110


class Row(NamedTuple):
    """One kernel on one length.

    Attributes:
        kernel: "pack" or "vote".
        ranks: voters; None where there are none.
        zeros: whether zeros are bitmaps of their own, so that a zero has no vote.
        numel: elements, and so verdicts.
        seconds: CPU time of the fastest run; ``ratio``: torch's over it.
        gradient_bytes_per_second: float32 gradient that is read and packed; None for votes.
        votes_per_second: votes counted, ``ranks`` for each element; None for packing.
        identical: whether torch comes to the same bits.
    """

    kernel: str
    ranks: int | None
    zeros: bool
    numel: int
    seconds: float
    ratio: float
    gradient_bytes_per_second: float | None
    votes_per_second: float | None
    identical: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, or a JSON object for each row."""
    options = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = list(measured(options.numel, options.ranks, options.repeat))
    finally:
        torch.set_num_threads(threads)
    if options.json:
        for row in rows:
            print(json.dumps(row._asdict()))
    else:
        Console(width=WIDTH).print(table(rows, options.repeat))


def parse(argv: Sequence[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").partition("\n\n")
    made = Parser(prog="sparcomm bench votes", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--numel", type=at_least(1), default=25_000_000, metavar="N",
        help="elements, rounded up to whole words of 32 (25000000)")  # fmt: skip
    add("--ranks", type=_voters, default=(3, 8, 16), metavar="P,...", help=f"voters, up to {MOST} (3,8,16)")
    add("--repeat", type=at_least(1), default=7, metavar="R", help="timed runs of which the fastest counts (7)")
    add("--json", action="store_true", help="one JSON object a line")
    return made.parse_args(argv)


def measured(numel: int, ranks: Sequence[int], repeat: int) -> Iterator[Row]:
    """Packing without and with zeros apart, then votes of so many ranks, likewise."""
    words = wire.bitmap_words(numel)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(32 * words, generator=random)
    x[torch.rand(x.numel(), generator=random) < 0.1] = 0
    for zeros in (False, True):
        yield _packing(x, zeros, repeat)
    for count in ranks:
        rows, present = (
            torch.randint(-(1 << 31), (1 << 31) - 1, (count, words), dtype=torch.int32, generator=random)
            for _ in range(2)
        )
        for zeros in (False, True):
            yield _voting(rows, present if zeros else None, repeat)


def _packing(x: Tensor, zeros: bool, repeat: int) -> Row:
    kernels = kernels_for(x)
    out, present = (torch.empty(wire.bitmap_words(x.numel()), dtype=torch.int32) for _ in range(2))
    flags = torch.zeros(1, dtype=torch.uint8)

    def run() -> None:
        kernels.pack_signs(x, "positive", 0, 0, out, present if zeros else None, flags)

    def by_torch() -> list[Tensor]:
        return [torch_pack(x < 0), *([torch_pack(x != 0)] if zeros else [])]

    seconds, ratio, identical = _compare(run, by_torch, [out, present], repeat)
    rate = x.numel() * x.element_size() / seconds
    return Row("pack", None, zeros, x.numel(), seconds, ratio, rate, None, identical)


def _voting(rows: Tensor, present: Tensor | None, repeat: int) -> Row:
    kernels, (count, size) = kernels_for(rows), rows.shape
    out, voted = (torch.empty(size, dtype=torch.int32) for _ in range(2))

    def run() -> None:
        kernels.vote(rows, present, "positive", 0, 0, out, None if present is None else voted)

    def by_torch() -> list[Tensor]:
        return torch_vote(rows, present)

    seconds, ratio, identical = _compare(run, by_torch, [out, voted], repeat)
    n = 32 * size
    return Row("vote", count, present is not None, n, seconds, ratio, None, count * n / seconds, identical)


def _compare(
    run: Callable[[], None], by_torch: Callable[[], list[Tensor]], results: list[Tensor], repeat: int
) -> tuple[float, float, bool]:
    """CPU seconds of the kernel, torch's over these, and whether torch's results are the first of ``results``."""
    seconds = max(best(repeat, run), 1e-9)
    found: list[Tensor] = []

    def keep() -> None:
        found[:] = by_torch()

    ratio = best(repeat, keep) / seconds
    return seconds, ratio, all(torch.equal(a, b) for a, b in zip(found, results, strict=False))


def torch_pack(mask: Tensor) -> Tensor:
    """A mask of whole words as a bitmap, by torch: one multiplication gathers eight elements."""
    return ((mask.view(torch.int64) * GATHER) >> 56).to(torch.uint8).view(torch.int32)


def torch_vote(rows: Tensor, present: Tensor | None) -> list[Tensor]:
    """The verdict of ``rows``, ties positive, by torch: unpack, sum, sign, pack; and with ``present`` who voted."""
    place = torch.arange(8, dtype=torch.uint8)

    def bits(row: Tensor) -> Tensor:
        return (row.view(torch.uint8).view(-1, 1) >> place & 1).view(torch.int8)

    total = torch.zeros(4 * rows.shape[1], 8, dtype=torch.int8)
    if present is None:
        for row in rows:
            total += bits(row)
        return [torch_pack((total > len(rows) // 2).view(-1))]
    voted = torch.zeros_like(present[0])
    for row, may in zip(rows, present, strict=True):
        total += bits(row & may)
        total -= bits(may & ~row)
        voted |= may
    return [torch_pack((total > 0).view(-1)), voted]


def table(rows: Sequence[Row], repeat: int) -> Table:
    """What is printed."""
    made = Table(title=f"{rows[0].numel:,} elements, one thread, best of {repeat}", title_justify="left")
    for column in (
        "kernel",
        "zeros",
        "p",
        "CPU ms",
        "GB/s of gradient",
        "G votes/s",
        "G verdicts/s",
        "x torch",
        "same",
    ):
        made.add_column(column, justify="left" if column in ("kernel", "zeros") else "right", no_wrap=True)
    for row in rows:
        read, votes = row.gradient_bytes_per_second, row.votes_per_second
        made.add_row(
            row.kernel,
            "apart" if row.zeros else "",
            "" if row.ranks is None else str(row.ranks),
            f"{1e3 * row.seconds:.2f}",
            "" if read is None else f"{read / 1e9:.1f}",
            "" if votes is None else f"{votes / 1e9:.1f}",
            "" if votes is None else f"{row.numel / row.seconds / 1e9:.1f}",
            f"{row.ratio:.1f}",
            "yes" if row.identical else "NO",
        )
    return made


def _voters(text: str) -> tuple[int, ...]:
    counts = several(at_least(1))(text)
    if max(counts) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST} each, got {text!r}")
    return counts


if __name__ == "__main__":
    main()
