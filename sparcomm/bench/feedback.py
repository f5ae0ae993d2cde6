"""Sketches under error feedback: what ranks owe, and how far deliveries lag, step by step.

    python -m sparcomm.bench.feedback [--size 4] [--numel 65536] [--density 0.05] [--ratio 0.5] [--steps 200]
        [--seed 0] [--json] [--png FILE]

Every rank's gradient is non-zero at a support of its own, the same in all steps, half of it shared by all ranks, as the
embedding rows of a language model's most frequent words are; values are those of ``bench.gradient``. The table has
``ratio`` cells for each key of the union. Shown are the norm of the summed residual in norms of one step's summed
gradient, and of the delivered sum's distance from what was fed, relative to it, after a few numbers of steps.

The published decoder (one row, a hash that never changes) is ``median, fixed seed``: a bucket that b keys share
delivers b times what it should, and error feedback then grows without bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm.algorithms import Algorithm, registry
from sparcomm.bench.gradient import gradient
from sparcomm.bench.options import Parser, at_least, check_png, positive, share
from sparcomm.errors import ConfigError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport

HUGE = 1e30  # a residual beyond this many gradients has diverged, and float32 soon ends


def configurations(ratio: float) -> dict[str, Algorithm]:
    """What is compared, by name."""
    s2: Any = registry()["s2"]
    return {
        "median, fixed seed": s2(decoder="median", ratio=ratio, fixed_seed=42),
        "median, new seeds": s2(decoder="median", ratio=ratio),
        "projection, fixed seed": s2(decoder="projection", ratio=ratio, fixed_seed=42),
        "projection, new seeds": s2(decoder="projection", ratio=ratio),
        "peel": s2(decoder="peel"),
        "compact": s2(decoder="compact"),
    }


def supports(n: int, size: int, density: float, seed: int) -> list[Tensor]:
    """(n,) bool of every rank: about density·n positions, half of them those of all ranks."""
    made = torch.Generator().manual_seed(seed)
    common = torch.rand(n, generator=made) < density / 2
    return [common | (torch.rand(n, generator=made) < density / 2) for _ in range(size)]


def follow(algorithm: Algorithm, masks: list[Tensor], steps: int, seed: int) -> list[tuple[float, float]]:
    """(owed, lag) after every step, until the residual has diverged."""
    n, size = masks[0].numel(), len(masks)

    def fed(step: int, rank: int) -> Tensor:
        return gradient(n, rank, seed * steps + step) * masks[rank]

    def rank(transport: Transport) -> list[tuple[Tensor, Tensor]]:
        state, residual, seen = algorithm.init(n, torch.float32, torch.device("cpu"), size), None, []
        for step in range(steps):
            reduced = algorithm.reduce(fed(step, transport.rank), residual, state, step, transport)
            assert reduced.total is not None  # the state wants it
            residual, state = reduced.residual, reduced.state
            seen.append((reduced.total, torch.zeros(n) if residual is None else residual.clone()))
            largest = torch.stack([seen[-1][1].abs().amax(), seen[-1][0].abs().amax()])
            transport.all_reduce(largest, "max")
            if not bool(reduced.ok) or float(largest.amax()) > HUGE:
                break
        return seen

    ranks = sim.run(size, rank, timeout=3600).results
    one = torch.linalg.vector_norm(sum((fed(0, r) for r in range(size)), torch.zeros(n)).double())
    given, delivered = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    found: list[tuple[float, float]] = []
    for step, each in enumerate(zip(*ranks, strict=True)):
        for number in range(size):
            given += fed(step, number)
        delivered += each[0][0]
        owed = torch.linalg.vector_norm(sum((left.double() for _, left in each), torch.zeros(n)))
        lag = torch.linalg.vector_norm(given - delivered) / torch.linalg.vector_norm(given)
        found.append((float(owed / one), float(lag)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    args = _parse(argv)
    torch.set_num_threads(1)
    masks = supports(args.numel, args.size, args.density, args.seed)
    if not any(bool(mask.any()) for mask in masks):
        raise ConfigError(f"at --density {args.density:g} no rank has any of {args.numel} entries: raise one of them")
    rows = {name: follow(a, masks, args.steps, args.seed) for name, a in configurations(args.ratio).items()}
    if args.png:
        draw(rows, args.png)
    if args.json:
        for name, row in rows.items():
            print(json.dumps({"decoder": name, "owed": [o for o, _ in row], "lag": [lag for _, lag in row]}))
        return
    marks = sorted({s for s in (1, 10, 30, 100, 300, 1000, args.steps) if s <= args.steps})
    title = f"p = {args.size}, n = {args.numel:,}, {args.density:.0%} each, {args.ratio:g} cells per key: owed (lag)"
    table = Table(title=title)
    for name in ("decoder", *(f"step {mark}" for mark in marks)):
        table.add_column(name, justify="left" if name == "decoder" else "right")
    for name, row in rows.items():
        cells = (f"{row[m - 1][0]:.3g} ({row[m - 1][1]:.2g})" if m <= len(row) else "diverged" for m in marks)
        table.add_row(name, *cells)
    Console(width=140).print(table)


def _parse(argv: list[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").split("\n\n", 2)
    made = Parser(prog="sparcomm bench feedback", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--size", type=at_least(1), default=4, metavar="P", help="ranks (4)")
    add("--numel", type=at_least(1), default=65536, metavar="N", help="elements of the gradient (65536)")
    add("--density", type=share, default=0.05, metavar="D", help="share of entries that are not zero on a rank (0.05)")
    add("--ratio", type=positive, default=0.5, metavar="R", help="table cells per key of the union (0.5)")
    add("--steps", type=at_least(1), default=200, metavar="S", help="(200)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of gradients and supports (0)")
    add("--json", action="store_true", help="one JSON object a line")
    add("--png", type=Path, metavar="FILE", help="draw what is owed (needs matplotlib)")
    options = made.parse_args(argv)
    if options.png is not None:
        check_png(options.png)
    return options


def draw(rows: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """What is owed, against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        axes.plot(range(1, len(row) + 1), [max(owed, 1e-9) for owed, _ in row], label=name)
    axes.set(yscale="log", ylim=(1e-3, 1e9), xlabel="step", ylabel="summed residual / norm of one step's gradient")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
