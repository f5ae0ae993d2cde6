"""What a run leaves behind: metrics.json, a plot and a table, so that any two runs can be laid side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.progress import human

METRICS = "metrics.json"
PLOT = "loss.png"


def write(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes metrics.json and the plot of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    plot(folder / PLOT, {metrics["summary"]["algorithm"]: metrics})


def read(folder: Path) -> dict[str, Any]:
    """What ``write`` wrote."""
    return json.loads((folder / METRICS).read_text(encoding="utf-8"))


def plot(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """One PNG: loss against step, and against bytes sent by a rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_bytes = figure.subplots(1, 2, sharey=True)
    for label, metrics in runs.items():
        history = metrics["history"]
        loss = smooth([record["loss"] for record in history])
        by_step.plot([record["step"] for record in history], loss, label=label)
        sent = [max(record["bytes_total"], 1) for record in history]
        by_bytes.plot(sent, loss, label=label)
    by_step.set(xlabel="step", ylabel="training loss (smoothed)", yscale="log")
    by_bytes.set(xlabel="bytes sent by a rank", xscale="log")
    by_step.legend()
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the usual bias at the start."""
    out: list[float] = []
    mean, mass = 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(mean / mass)
    return out


def table(title: str, summaries: list[dict[str, Any]]) -> Table:
    """Runs side by side, one a column."""
    found = Table(title=title, title_justify="left")
    found.add_column("")
    for summary in summaries:
        found.add_column(summary["algorithm"], justify="right")
    for label, cell in _ROWS:
        found.add_row(label, *(cell(summary) for summary in summaries))
    return found


def show(title: str, summaries: list[dict[str, Any]]) -> None:
    """Prints the table."""
    Console().print(table(title, summaries))


def _score(summary: dict[str, Any]) -> str:
    scores = summary["scores"]
    if "accuracy" in scores:
        return f"{100 * scores['accuracy']:.2f} %"
    return f"{scores['bits']:.3f} bits/char"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("test score", _score),
    ("test loss", lambda s: f"{s['scores']['loss']:.4f}"),
    ("training loss", lambda s: f"{s['train_loss']:.4f}"),
    ("steps", lambda s: str(s["steps"])),
    ("ranks", lambda s: str(s["size"])),
    ("parameters", lambda s: f"{s['parameters']:,}"),
    ("wall time", lambda s: f"{s['seconds']:.1f} s"),
    ("bytes sent by a rank", lambda s: human(s["bytes_sent"])),
    ("fewer than dense float32", lambda s: f"{s['ratio']:.1f}x"),
    ("replicas", lambda s: "identical" if s["identical"] else "DIFFERENT"),
)
