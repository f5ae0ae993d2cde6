"""What rank 0 shows while it trains: one bar on a terminal, a line now and then in a log, TensorBoard on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparcomm.errors import ConfigError

LOG_SECONDS = 10.0


class Display:
    """Takes one record a step; silent on all ranks but the first."""

    def __init__(self, bar: Progress | None, writer: Any) -> None:
        self.bar, self.writer = bar, writer
        self.task = None if bar is None else bar.add_task("train", total=None, text="")
        self.last = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        """The run has ``total`` steps, ``done`` of them before this process."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, total=total, completed=done)
            if done:
                self.bar.console.print(f"resumed after step {done}/{total}", highlight=False)

    def show(self, record: dict[str, float], total: int) -> None:
        """Shows the record of one step."""
        text = (
            f"loss {record['loss']:.4f}  {1e3 * record['seconds']:.0f} ms/step  "
            f"{human(record['bytes'])}/step  {record['ratio']:.1f}x fewer"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=int(record["step"]), text=text)
            now = time.monotonic()
            if not self.bar.console.is_terminal and (now - self.last > LOG_SECONDS or record["step"] == total):
                self.last = now
                self.bar.console.print(f"step {int(record['step'])}/{total}  {text}", highlight=False)
        if self.writer is not None:
            for name in ("loss", "seconds", "bytes", "bytes_total", "ratio", "rate"):
                self.writer.add_scalar(f"train/{name}", record[name], int(record["step"]))

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Shows the held-out scores after ``step``."""
        if self.bar is not None:
            self.bar.console.print(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(f"test/{name}", value, step)


@contextmanager
def display(rank: int, name: str, tensorboard: Path | None) -> Iterator[Display]:
    """A display for this rank.

    Args:
        rank: only rank 0 shows anything.
        name: what the bar is called.
        tensorboard: folder for event files, or None. Raises ConfigError if the package is missing.
    """
    if rank:
        yield Display(None, None)
        return
    writer = None if tensorboard is None else _writer(tensorboard)
    console = Console(file=sys.stdout, soft_wrap=True)
    columns = (TextColumn(name), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            yield Display(bar, writer)
    finally:
        if writer is not None:
            writer.close()


def human(count: float) -> str:
    """A number of bytes for people: 1234567 is '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard: true needs the package: pip install 'sparcomm[tensorboard]'") from error
    return SummaryWriter(str(folder))
