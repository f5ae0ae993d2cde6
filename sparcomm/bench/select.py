"""Selectors against torch: how fast they are, how many entries they pick, and how much of the energy that is.

    sparcomm bench select [--numel 25000000] [--density 0.01] [--repeat 7]
    sparcomm bench select --part quality --recorded runs/digits-spardl/gradients

One thread, CPU time, the fastest of so many runs each. A selector picks from a vector that is only read; beside it
stands ``torch.abs(x, out=buffer)`` + ``torch.topk(buffer, k)`` of the same run. docs/bench.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparcomm.bench import distributions
from sparcomm.bench.distributions import Draw
from sparcomm.bench.options import Parser, at_least, several, share
from sparcomm.bench.select_rows import TORCH, Row, Vector
from sparcomm.config import suggestion
from sparcomm.errors import ConfigError
from sparcomm.selectors import Selector, make_selector

SELECTORS = "topk, gaussiank, gaussiank(reestimate_every=32), gaussiank(guard=False)"
PARTS = ("speed", "quality")
WIDTH = 140


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or a JSON object for each row."""
    options = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in PARTS if options.part is None else (options.part,):
            rows = list(speed(options) if part == "speed" else quality(options))
            if options.json:
                for row in rows:
                    print(json.dumps({"part": part, **row._asdict()}))
            else:
                Console(width=WIDTH).print(table(part, rows, options.repeat))
    finally:
        torch.set_num_threads(threads)


def parse(argv: Sequence[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").partition("\n\n")
    made = Parser(prog="sparcomm bench select", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--part", choices=PARTS, help="one of the two tables (both)")
    add("--numel", type=at_least(1), default=25_000_000, metavar="N", help="speed: elements, normal (25000000)")
    add("--density", type=share, default=0.01, metavar="D", help="speed: k / n (0.01)")
    add("--quality-numel", type=at_least(1), default=4_000_000, metavar="N", help="quality: elements (4000000)")
    add(
        "--densities",
        type=several(share),
        default=(1e-4, 1e-3, 1e-2, 1e-1),
        metavar="D,...",
        help="quality: k / n, several",
    )
    add("--distributions", metavar="NAME,...", help="quality: of " + ", ".join(distributions.known()))
    add("--recorded", type=Path, metavar="FOLDER", help="quality: gradients that a run has recorded, too")
    add("--selectors", default=SELECTORS, metavar="NAME,...", help=f"({SELECTORS})")
    add("--repeat", type=at_least(1), default=7, metavar="R", help="timed runs of which the fastest counts (7)")
    add("--json", action="store_true", help="one JSON object a line")
    options = made.parse_args(argv)
    options.selectors = selectors(options.selectors)
    options.distributions = chosen(options.distributions, options.recorded)
    return options


def selectors(text: str) -> list[Selector]:
    """Selectors from a list of their texts, in which commas inside parentheses do not count."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [make_selector(part.strip()) for part in parts]


def chosen(names: str | None, recorded: Path | None) -> dict[str, Draw]:
    """The distributions to be measured. Raises ConfigError for an unknown one; lists what there is."""
    known = distributions.known()
    found: dict[str, Draw] = {}
    for name in known if names is None else names.split(","):
        if name not in known:
            listed = ", ".join(map(repr, known))
            raise ConfigError(f"--distributions {name!r}{suggestion(name, known)}: must be of {listed}")
        found[name] = known[name]
    return found | (distributions.recorded(recorded) if recorded is not None else {})


def speed(options: argparse.Namespace) -> Iterator[Row]:
    """Every selector on one long normal vector."""
    normal = distributions.known()["normal"]
    yield from measured("normal", normal, options.numel, [options.density], options)


def quality(options: argparse.Namespace) -> Iterator[Row]:
    """Every selector on every distribution at every density."""
    for name, draw in options.distributions.items():
        yield from measured(name, draw, options.quality_numel, options.densities, options)


def measured(
    name: str, draw: Draw, numel: int, densities: Sequence[float], options: argparse.Namespace
) -> Iterator[Row]:
    """The row of torch and that of every selector, at every density."""
    vector = Vector(name, draw(numel, 1), draw(numel, 0))
    for density in densities:
        baseline = vector.torch_row(density, options.repeat)
        yield baseline
        for selector in options.selectors:
            yield vector.row(selector, density, options.repeat, baseline)


def table(part: str, rows: Sequence[Row], repeat: int) -> Table:
    """The rows of one part."""
    return _speed_table(rows, repeat) if part == "speed" else _quality_table(rows, repeat)


def _speed_table(rows: Sequence[Row], repeat: int) -> Table:
    title = f"speed: {rows[0].numel:,} normal float32 values, density {rows[0].density:g}, one thread, best of {repeat}"
    made = Table(title=title, title_justify="left")
    for column in ("selector", "CPU ms", "x torch", "passes", "count / k", "energy", "k largest"):
        made.add_column(column, justify="left" if column == "selector" else "right", no_wrap=True)
    for row in rows:
        passes = "" if row.passes is None else str(row.passes)
        largest = "yes" if row.identical else "no"
        ms, ratio = f"{1e3 * row.seconds:.2f}", f"{row.ratio:.1f}"
        made.add_row(row.selector, ms, ratio, passes, f"{row.count / row.k:.3f}", _energy(row), largest)
    return made


def _quality_table(rows: Sequence[Row], repeat: int) -> Table:
    """A line for each vector and density, a column for each selector."""
    title = (
        f"quality: count / k (= if they are the k largest), energy, x torch, passes; one thread, best of {repeat}\n"
        f"n = {', '.join(f'{n:,}' for n in dict.fromkeys(row.numel for row in rows))}"
    )
    made = Table(title=title, title_justify="left")
    shown = [row for row in rows if row.selector != TORCH]
    names = list(dict.fromkeys(row.selector for row in shown))
    made.add_column("distribution", no_wrap=True)
    made.add_column("density", justify="right")
    for name in names:
        made.add_column(name.replace("(", "\n("), justify="right", no_wrap=True)
    for start in range(0, len(shown), len(names)):
        line = shown[start : start + len(names)]
        following = shown[start + len(names) :][:1]
        last = not following or following[0].distribution != line[0].distribution
        made.add_row(line[0].distribution, f"{line[0].density:g}", *map(_cell, line), end_section=last)
    return made


def _cell(row: Row) -> str:
    equal = "=" if row.identical else " "
    return f"{row.count / row.k:.3f}{equal} {_energy(row):>6} {row.ratio:4.0f}x {row.passes}"


def _energy(row: Row) -> str:
    return "-" if row.energy is None else f"{row.energy:.3f}"


if __name__ == "__main__":
    main()
