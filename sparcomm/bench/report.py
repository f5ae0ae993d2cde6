"""Rows as a table, as JSON and as a picture, and from which link speed on an algorithm stops to pay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparcomm.algorithms.dense import Dense
from sparcomm.bench.rows import Row

COUNTED = ("bytes_sent", "rounds", "messages", "kept", "energy")
KEYS = ("algorithm", "over", "numel", "size", "seconds", "cpu_seconds", *COUNTED)
BASELINES = ("dense", "torch:dense")
WIDTH = 150


def as_json(row: Row) -> str:
    """One object on one line; a row that failed has an ``error``, and null for what was not measured."""
    shown = {key: getattr(row, key) for key in KEYS} | row.extra
    return json.dumps(shown if row.error is None else shown | {"error": row.error})


def baseline(rows: Sequence[Row], over: str = "gloo") -> Row | None:
    """The dense row that others over the same way are compared with."""
    for name in BASELINES:
        for row in rows:
            if row.algorithm == name and row.over == over and row.error is None:
                return row
    return None


def pays_below(row: Row) -> float:
    """Link speed in bit/s below which a row beats a dense all-reduce; 0 = at none.

    The row computes and sends in turn: c + 8 b / B seconds for CPU seconds c, bytes b and B bit/s. The dense one is
    taken to cost 8 b_d / B seconds and no CPU time, which is the best that can be. Rounds' latencies are left out,
    since these algorithms have no more of them than the dense ring. Hence B < 8 (b_d - b) / c.
    """
    assert row.bytes_sent is not None
    assert row.cpu_seconds is not None
    saved = Dense(native=True).cost(row.numel, torch.float32, row.size).bytes_sent - row.bytes_sent
    return max(0.0, 8 * saved / max(row.cpu_seconds, 1e-9))


def table(title: str, rows: Sequence[Row], *, trained: bool = False) -> Table:
    """What rank 0 prints. With ``trained`` rows are training steps: compression is not all of their CPU time."""
    made = Table(title=title, title_justify="left")
    columns = ["algorithm", "ms", "CPU ms", "MB sent", "cost()", "rounds", "speed-up", "kept", "energy", "pays below"]
    linked = any(row.link_bytes is not None for row in rows)
    if linked:
        columns.insert(4, "MB on link")
    if len({row.over for row in rows}) > 1:
        columns.insert(1, "over")
    if trained:
        columns = [name for name in columns if name not in ("cost()", "energy", "pays below")]
    for name in columns:
        made.add_column(name, justify="left" if name in ("algorithm", "over", "cost()") else "right", overflow="fold")
    for row in rows:
        if row.error is not None:
            failed = {"algorithm": escape(row.algorithm), "over": row.over, "ms": "[red]failed[/red]"}
            made.add_row(*(failed.get(name, "") for name in columns))
            continue
        cells = _cells(row, baseline(rows, row.over))
        made.add_row(*(escape(cells[name]) for name in columns))
    return made


def show(title: str, rows: Sequence[Row], *, trained: bool = False) -> None:
    """Prints the table, and below it why rows failed."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table(title, rows, trained=trained))
    for row, name in zip(rows, names(rows), strict=True):
        if row.error is not None:
            console.print(f"{name}: {row.error}", markup=False, highlight=False)


def names(rows: Sequence[Row]) -> list[str]:
    """Of the rows; with what they went over, where that differs."""
    several = len({row.over for row in rows}) > 1
    return [f"{row.algorithm} over {row.over}" if several else row.algorithm for row in rows]


def draw(title: str, rows: Sequence[Row], path: Path) -> None:
    """Writes the times as a bar chart to ``path``."""
    from matplotlib.figure import Figure

    good = [row for row in rows if row.seconds is not None]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(good)), layout="constrained")
    axes: Any = figure.subplots()
    bars = axes.barh(names(good), [1e3 * (r.seconds or 0) for r in good], color="#4477aa")
    axes.bar_label(bars, [_cells(row, baseline(rows, row.over))["label"] for row in good], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="median time per step, ms", title=title)
    figure.savefig(path, dpi=150)


def _cells(row: Row, dense: Row | None) -> dict[str, str]:
    assert row.seconds is not None
    assert row.cpu_seconds is not None
    assert row.bytes_sent is not None
    faster = "" if dense is None or dense.seconds is None else f"{dense.seconds / row.seconds:.2f}x"
    limit = pays_below(row) if row.algorithm not in BASELINES else None
    return {
        "algorithm": row.algorithm,
        "over": row.over,
        "ms": f"{1e3 * row.seconds:.2f}",
        "CPU ms": f"{1e3 * row.cpu_seconds:.2f}",
        "MB sent": f"{row.bytes_sent / 1e6:.3f}",
        "MB on link": "" if row.link_bytes is None else f"{row.link_bytes / 1e6:.3f}",
        "cost()": {None: "-", True: "within" if row.bound else "equal", False: "DIFFERS"}[row.exact_cost],
        "rounds": str(row.rounds),
        "speed-up": faster,
        "kept": "" if row.kept is None else f"{row.kept:,}",
        "energy": "" if row.energy is None else f"{row.energy:.3f}",
        "pays below": "" if limit is None else _speed(limit),
        "label": f"{1e3 * row.seconds:.1f} ms" + (f"  {faster}" if faster else ""),
    }


def _speed(limit: float) -> str:
    if limit == 0:
        return "never"
    return f"{limit / 1e9:.2f} Gbit/s" if limit >= 1e8 else f"{limit / 1e6:.1f} Mbit/s"
