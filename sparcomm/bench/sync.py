"""``sparcomm bench``: what synchronising a gradient costs on this network, beside what PyTorch ships."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from sparcomm.bench import models, report
from sparcomm.bench.child import PATIENCE
from sparcomm.bench.options import Common, Options, parse
from sparcomm.bench.rows import Row, Runner
from sparcomm.bench.world import World, join, launch, leave
from sparcomm.errors import ConfigError
from sparcomm.launch.environment import detect

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench as the launcher's environment says, or as ``--ranks`` does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = quietly(lambda: parse(arguments))
    if options.ranks is not None:
        sys.exit(launch(options.ranks, ["sparcomm", "bench", *without_ranks(arguments)]))
    run(options, lambda runner, world: measure(runner, world, options))


def measure(runner: Runner, world: World, options: Options) -> bool:
    """All rows; rank 0 prints. Returns whether any of them succeeded."""
    rows: list[Row] = []
    kind = "training" if options.model else "reduce"
    numel = models.numel(options.model) if options.model else options.numel
    for typed, over in itertools.product(options.algorithms, options.over):
        row = runner.run(kind, typed, numel, over)
        rows.append(row)
        if world.rank == 0 and options.json:
            print(report.as_json(row), flush=True)
    if world.rank == 0:
        over = " and ".join({"gloo": "Gloo", "mpi": "MPI"}[way] for way in options.over)
        link = f"{world.size} ranks over {over}, threads per rank: {options.threads}, median of {options.steps} steps"
        what = f"{options.model}, batch {options.batch or 'default'}" if options.model else f"n = {options.numel:,}"
        title = f"{what}, density {options.density:g}; {link}"
        if not options.json:
            report.show(title, rows, trained=options.model is not None)
        if options.png is not None:
            report.draw(title, rows, options.png)
    return any(row.error is None for row in rows)


def run(options: Common, work: Callable[[Runner, World], bool]) -> None:
    """Joins the other ranks, does ``work``, and leaves together with them; ends with code 1 if it returns False."""
    world = join(options)
    good = work(Runner(world, options), world)
    leave(world, options.timeout + PATIENCE)
    if not good:
        sys.exit(1)


def quietly(prepare: Callable[[], T]) -> T:
    """Calls ``prepare``; what is typed wrong is said by rank 0 only, since all ranks were given the same."""
    try:
        return prepare()
    except ConfigError:
        if os.environ.get("RANK", "") not in ("", "0") or detect(os.environ).rank:
            sys.exit(2)
        raise


def without_ranks(arguments: list[str]) -> list[str]:
    """The command line of one rank: without ``--ranks P`` or ``--ranks=P``."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--ranks" and not argument.startswith("--ranks="):
            kept.append(argument)
        skip = argument == "--ranks"
    return kept
