"""Exact sketches: how often peeling succeeds at which table, in how many rounds, and how fast it is.

    sparcomm bench peel [--keys 1000,10000,100000,1000000] [--ratios 1.2,1.23,1.27,1.3,1.35,1.5,2] [--png peel.png]
    sparcomm bench peel --part speed

One thread. The first table draws keys and values, encodes and peels them with a new seed each time, and compares what
comes out with what went in. The second sets the kernels beside torch. docs/bench.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm.bench.options import Parser, at_least, check_png, positive, several
from sparcomm.bench.peel_speed import Speed, speeds
from sparcomm.errors import SparcommError
from sparcomm.kernels import kernels_for

KEYS = (1_000, 10_000, 100_000, 1_000_000)
RATIOS = (1.2, 1.23, 1.27, 1.3, 1.35, 1.5, 2.0)
PARTS = ("success", "speed")
LEAST, MOST = 5, 500  # tries of a row
WIDTH = 140


class Row(NamedTuple):
    """So many tries at one number of keys and one size of the table.

    Attributes:
        keys, ratio, rows: ratio = cells of all rows per key, before ``columns`` is rounded up.
        columns: of each of the rows.
        tries: drawn keys, values and seeds.
        success: share of tries that left nothing.
        rounds: mean over these; None if there was none. ``most_rounds`` is the largest of any try.
        left: mean share of the keys that are left, over all tries.
        encode, peel: CPU seconds, mean over all tries; peeling with the count of the buckets, which everybody makes.
        rate: keys per second of both together.
    """

    keys: int
    ratio: float
    rows: int
    columns: int
    tries: int
    success: float
    rounds: float | None
    most_rounds: int
    left: float
    encode: float
    peel: float
    rate: float


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or a JSON object for each row."""
    options = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in PARTS if options.part is None else (options.part,):
            if part == "success":
                report_success(options)
            else:
                report_speed(options)
    finally:
        torch.set_num_threads(threads)


def parse(argv: Sequence[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").partition("\n\n")
    made = Parser(prog="sparcomm bench peel", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--part", choices=PARTS, help="one of the two tables (both)")
    add("--keys", type=several(at_least(1)), default=KEYS, metavar="K,...", help="keys (1000 to 1000000)")
    add(
        "--ratios", type=several(positive), default=RATIOS, metavar="R,...", help="cells of all rows per key (1.2 to 2)"
    )
    add("--rows", type=at_least(1), default=3, metavar="N", help="rows of the table, or hashes (3)")
    add("--width", type=at_least(1), default=1, metavar="W", help="values of a key (1)")
    add("--work", type=at_least(1), default=2_000_000, metavar="K",
        help=f"keys in all tries of a row (2000000), in {LEAST} to {MOST} tries")  # fmt: skip
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the first try (0)")
    add("--repeat", type=at_least(1), default=5, metavar="R", help="speed: timed runs of which the fastest counts (5)")
    add("--png", type=Path, metavar="FILE", help="draw the success rates (needs matplotlib)")
    add("--json", action="store_true", help="one JSON object a line")
    options = made.parse_args(argv)
    if options.png is not None:
        check_png(options.png)
    return options


def report_success(options: argparse.Namespace) -> None:
    """The first table, and the picture."""
    rows: list[Row] = []
    for row in success(options):
        rows.append(row)
        if options.json:
            print(json.dumps({"part": "success", **row._asdict()}), flush=True)
    if not options.json:
        Console(width=WIDTH).print(table(rows))
    if options.png is not None:
        draw(rows, options.png)


def report_speed(options: argparse.Namespace) -> None:
    """The second table."""
    rows = list(speeds(options.keys, options.rows, options.width, options.repeat))
    if options.json:
        for row in rows:
            print(json.dumps({"part": "speed", **row._asdict()}))
    else:
        Console(width=WIDTH).print(speed_table(rows, options))


def success(options: argparse.Namespace) -> Iterator[Row]:
    """A row for every number of keys and every ratio."""
    measured(1, 1.0, options.rows, options.width, 1, 0)  # compiled, or read from the cache, before anything is timed
    for keys in options.keys:
        for ratio in options.ratios:
            tries = min(max(options.work // keys, LEAST), MOST)
            yield measured(keys, ratio, options.rows, options.width, tries, options.seed)


def measured(keys: int, ratio: float, rows: int, width: int, tries: int, seed: int) -> Row:
    """Peels so many times."""
    columns = max(1, -int(-ratio * keys // rows))
    times, rounds, left = [0.0, 0.0], [], []
    for number in range(seed, seed + tries):
        key, value = drawn(keys, width, number)
        lost, needed = once(key, value, width, number, rows, columns, times)
        left.append(lost)
        rounds.append(needed)
    complete = [r for r, lost in zip(rounds, left, strict=True) if not lost]
    encode, peel = (t / tries for t in times)
    return Row(
        keys=keys,
        ratio=ratio,
        rows=rows,
        columns=columns,
        tries=tries,
        success=len(complete) / tries,
        rounds=sum(complete) / len(complete) if complete else None,
        most_rounds=max(rounds),
        left=sum(left) / (tries * keys),
        encode=encode,
        peel=peel,
        rate=keys / (encode + peel) if encode + peel else float("inf"),
    )


def drawn(keys: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with gaps at random, and values of all 32 bits."""
    g = torch.Generator().manual_seed(seed)
    gaps = torch.randint(1, max(2, (1 << 32) // keys), (keys,), generator=g)
    value = torch.randint(-(1 << 31), 1 << 31, (keys * width,), generator=g)
    return gaps.cumsum(0) - 1, value.to(torch.int32)


def once(
    key: Tensor, value: Tensor, width: int, seed: int, rows: int, columns: int, times: list[float]
) -> tuple[int, int]:
    """Keys that were left, and rounds; adds to the seconds of encoding and of peeling."""
    kernels = kernels_for(key)
    out, counts = (torch.empty((rows, columns * w), dtype=torch.int32) for w in (width, 1))
    start = time.process_time()
    kernels.sketch(key, value, width, seed, out)
    encoded = time.process_time()
    kernels.occupancy(key, seed, columns, counts)
    found, done, rounds = kernels.peel(out, key, width, seed, counts)
    times[0] += encoded - start
    times[1] += time.process_time() - encoded
    expected = torch.where(done.unsqueeze(1), value.view(-1, width), 0).view(-1)
    if not torch.equal(found, expected):
        raise SparcommError(f"peeling {key.numel()} keys with seed {seed} gave another value than went in")
    return key.numel() - int(done.sum()), int(rounds)


def table(rows: Sequence[Row]) -> Table:
    """The first table."""
    made = Table(title=f"peeling, {rows[0].rows} rows, one thread", title_justify="left")
    names = "keys", "cells/key", "tries", "success", "rounds", "most", "left", "encode ms", "peel ms", "M keys/s"
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1].keys != row.keys
        made.add_row(
            f"{row.keys:,}",
            f"{row.ratio:g}",
            str(row.tries),
            f"{row.success:.3f}",
            "-" if row.rounds is None else f"{row.rounds:.1f}",
            str(row.most_rounds),
            f"{row.left:.2e}" if row.left else "0",
            f"{1e3 * row.encode:.3f}",
            f"{1e3 * row.peel:.3f}",
            f"{1e-6 * row.rate:.2f}",
            end_section=last,
        )
    return made


def speed_table(rows: Sequence[Speed], options: argparse.Namespace) -> Table:
    """The second table."""
    title = f"CPU ns per key, {options.rows} rows, width {options.width}, one thread, best of {options.repeat}"
    made = Table(title=title, title_justify="left")
    for name in ("keys", "what", "ours", "torch", "torch, hashed before", "x torch"):
        made.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    for row in rows:
        hashed = "" if row.hashed is None else f"{row.hashed:.1f}"
        made.add_row(f"{row.keys:,}", row.what, f"{row.ours:.1f}", f"{row.torch:.1f}", hashed, f"{row.ratio:.1f}")
    return made


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes success rate against ratio to ``path``, one line for each number of keys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for keys in dict.fromkeys(row.keys for row in rows):
        shown = sorted((row.ratio, row.success) for row in rows if row.keys == keys)
        axes.plot(*zip(*shown, strict=True), marker="o", label=f"{keys:,} keys")
    axes.set(xlabel="cells per key, all rows together", ylabel="share of tries that leave nothing", ylim=(-0.03, 1.03))
    axes.set_title(f"peeling, {rows[0].rows} rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
