"""Every kernel on the GPU, or on the CPU: bytes, time, and share of the speed at which the device copies.

    sparcomm bench kernels [--device cuda] [--numel 25e6,250e6] [--density 0.01] [--ranks 8] [--png kernels.png]
    python3 -m sparcomm.bench.kernels ...

The second form needs PyTorch alone, and Numba on a CPU. On CUDA times are those of events on the stream, on a CPU
those of one thread. docs/bench.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from sparcomm.bench import kernels_step
from sparcomm.bench.kernels_cases import KINDS, SELECTION, Case, Data, names
from sparcomm.bench.kernels_timer import copy_rate, device_name, free_bytes, timed, waits
from sparcomm.bench.options import Parser, at_least, check_png, several, share
from sparcomm.density import quota
from sparcomm.errors import ConfigError, SparcommError
from sparcomm.kernels import Kernels, kernels_for, reference

STEP = "step"
SIZES = {"cuda": (25_000_000, 250_000_000), "cpu": (25_000_000,)}
SPARE = 0.9  # of the free memory that a case may fill
PATIENCE = 10.0  # seconds that a run of the reference may take
PART = 64  # the reference is tried on so small a share of the vector first
REFERENCE_ROOM = 100  # bytes for each element that the reference goes through: torch's temporaries are int64
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all rows of a size share."""

    n: int
    density: float
    ranks: int
    repeat: int
    device: torch.device
    copy: float

    def data(self, n: int | None = None) -> Data:
        """What cases are made of."""
        return Data(self.n if n is None else n, self.density, self.ranks, self.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each size, or a JSON object for each row."""
    options = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    every: list[Row] = []
    try:
        for n in options.numel:
            setting, rows = begin(n, options), list[Row]()
            for row in measured(setting, options.kernels):
                rows.append(row)
                if options.json:
                    print(json.dumps(row), flush=True)
            every += rows
            if not options.json:
                print("\n".join(table(setting, rows)), flush=True)
    finally:
        torch.set_num_threads(threads)
    if options.png is not None:
        draw(every, options.png)


def parse(argv: Sequence[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").partition("\n\n")
    made = Parser(prog="sparcomm bench kernels", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one (auto)")
    add("--numel", type=several(_size), metavar="N,...", help="elements (25e6,250e6; on a CPU 25e6)")
    add("--density", type=share, default=0.01, metavar="D", help="k / n (0.01)")
    add("--ranks", type=at_least(1), default=8, metavar="P", help="rows of bitmaps, ranks of a step (8)")
    add("--kernels", type=several(_name), metavar="NAME,...", help=f"of {', '.join(names())}, {STEP} (all)")
    add("--repeat", type=at_least(1), default=20, metavar="R", help="timed runs of which the median counts (20)")
    add("--png", type=Path, metavar="FILE", help="draw the shares of the copy speed (needs matplotlib)")
    add("--json", action="store_true", help="one JSON object a line")
    options = made.parse_args(argv)
    if options.png is not None:
        check_png(options.png)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.numel = options.numel or SIZES[options.device]
    options.kernels = options.kernels or (*names(), STEP)
    return options


def begin(n: int, options: argparse.Namespace) -> Setting:
    """Measures how fast the device copies so many float32."""
    device = torch.device(options.device)
    if 8 * n > SPARE * free_bytes(device):
        raise SparcommError(
            f"--numel {n}: {8 * n / 1e9:.1f} GB of memory for a copy alone, more than {device} has free"
        )
    return Setting(n, options.density, options.ranks, options.repeat, device, copy_rate(n, options.repeat, device))


def measured(setting: Setting, wanted: Sequence[str]) -> Iterator[Row]:
    """Rows in the order of KINDS, the step's last."""
    selection: float | None = None
    for name in (name for name in KINDS if name in wanted):
        row = _kernel(setting, name, selection)
        if name == SELECTION:
            selection = row["seconds"]
        yield row
    if STEP in wanted:
        yield from _step(setting)


def _kernel(setting: Setting, name: str, selection: float | None) -> Row:
    row = _row(setting, name)
    if (lack := _lack(setting, KINDS[name].room)) is not None:
        return row | {"note": lack}
    try:
        return _timed(setting, name, row, selection)
    except torch.OutOfMemoryError:
        return row | {"note": "left out: out of memory"}


def _timed(setting: Setting, name: str, row: Row, selection: float | None) -> Row:
    data, device = setting.data(), setting.device
    kernels = kernels_for(data.flags())
    case = KINDS[name].make(data, kernels)

    def run() -> None:
        case.run(kernels)

    found = timed(run, setting.repeat, device)
    rate = case.moved / found.seconds
    row |= {
        "items": case.items, "formula": case.formula, "bytes": case.moved,
        "seconds": found.seconds, "host_seconds": found.host, "waits": waits(run, device),
        "bytes_per_second": rate, "of_copy": rate / setting.copy,
    }  # fmt: skip
    if case.coded and selection is not None:
        row["of_selection"] = found.seconds / selection
    if case.by_torch is not None:
        row["torch_ratio"] = timed(case.by_torch, _few(setting), device).seconds / found.seconds
    if kernels is cast(Kernels, reference):
        row["note"] = "the reference itself runs here: there are no kernels for this device"
    else:
        row |= _against_reference(setting, name, case, found.seconds)
    if device.type != "cpu":  # they are asked of GPUs
        row["goals"] = {goal.text: goal.met(row[goal.what]) for goal in case.goals}
    return row


def _against_reference(setting: Setting, name: str, case: Case, seconds: float) -> Row:
    """How many times longer the reference takes, or why that is not known. A small share is run first to see."""
    kernels = cast(Kernels, reference)
    size = max(1, setting.n // PART)
    small = KINDS[name].make(setting.data(size), kernels)
    part = timed(lambda: small.run(kernels), 1, setting.device, warm=1).seconds
    if part * setting.n / size > PATIENCE:
        return {"note": f"reference left out: it would take {part * setting.n / size:.0f} s"}
    if case.items * REFERENCE_ROOM > SPARE * free_bytes(setting.device):
        return {"note": "reference left out: too little memory"}
    try:
        found = timed(lambda: case.run(kernels), _few(setting), setting.device, warm=1).seconds
    except torch.OutOfMemoryError:
        return {"note": "reference left out: out of memory"}
    return {"reference_ratio": found / seconds}


def _step(setting: Setting) -> Iterator[Row]:
    """The step, and its phases."""
    if (lack := _lack(setting, kernels_step.room(setting.ranks))) is not None:
        yield _row(setting, STEP) | {"note": lack}
        return
    try:
        found = kernels_step.phases(setting.n, setting.density, setting.ranks, _few(setting), setting.device)
    except torch.OutOfMemoryError:
        yield _row(setting, STEP) | {"note": "left out: out of memory"}
        return
    for name, seconds in found._asdict().items():
        yield _row(setting, STEP if name == "step" else f"{STEP}: {name}") | {"seconds": seconds}


def _row(setting: Setting, name: str) -> Row:
    known = {"kernel": name, "numel": setting.n, "kept": quota(setting.density, setting.n), "ranks": setting.ranks}
    measured = (
        "items", "formula", "bytes", "seconds", "host_seconds", "waits", "bytes_per_second", "of_copy", "torch_ratio",
        "reference_ratio", "of_selection", "note",
    )  # fmt: skip
    device = {"device": setting.device.type, "copy_bytes_per_second": setting.copy}
    return known | device | dict.fromkeys(measured) | {"goals": {}}


def _lack(setting: Setting, room: int) -> str | None:
    """Why a case of so many bytes for each element is left out; None if it is not."""
    needed, free = room * setting.n, free_bytes(setting.device)
    if needed <= SPARE * free:
        return None
    return f"left out: needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"


def _few(setting: Setting) -> int:
    """Runs of what is slow, or only compared with."""
    return max(1, setting.repeat // 4)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("kernel", lambda r: r["kernel"]),
    ("items", lambda r: _number(r["items"], "{:,}")),
    ("bytes", lambda r: r["formula"] or ""),
    ("MB", lambda r: _number(r["bytes"], "{:,.1f}", 1e-6)),
    ("ms", lambda r: _number(r["seconds"], "{:.3f}", 1e3)),
    ("host ms", lambda r: _number(r["host_seconds"], "{:.3f}", 1e3) if r["device"] != "cpu" else ""),
    ("waits", lambda r: {None: "", True: "yes", False: "no"}[r["waits"]]),
    ("GB/s", lambda r: _number(r["bytes_per_second"], "{:.1f}", 1e-9)),
    ("of copy", lambda r: _number(r["of_copy"], "{:.0f} %", 100)),
    ("x torch", lambda r: _number(r["torch_ratio"], "{:.1f}")),
    ("x reference", lambda r: _number(r["reference_ratio"], "{:.1f}")),
    ("of topk", lambda r: _number(r["of_selection"], "{:.1f} %", 100)),
    ("goal", lambda r: ", ".join(f"{text}: {_verdict(met)}" for text, met in r["goals"].items())),
)
LEFT = ("kernel", "bytes", "goal")


def table(setting: Setting, rows: Sequence[Row]) -> list[str]:
    """Lines of plain text: whoever runs this on a borrowed GPU need not install anything that draws tables."""
    shown = [(name, [cell(row) for row in rows]) for name, cell in COLUMNS]
    shown = [(name, cells) for name, cells in shown if any(cells)]
    widths = [max(map(len, (name, *cells))) for name, cells in shown]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(shown, cells, widths, strict=True)
        return "  ".join(c.ljust(w) if name in LEFT else c.rjust(w) for (name, _), c, w in pairs).rstrip()

    k = quota(setting.density, setting.n)
    title = (
        f"{device_name(setting.device)}: n = {setting.n:,} float32, k = {k:,}, p = {setting.ranks}, "
        f"copy {setting.copy / 1e9:,.1f} GB/s read and written, median of {setting.repeat}"
    )
    lines = [title, line([name for name, _ in shown]), line(["-" * w for w in widths])]
    lines += [line([cells[i] for _, cells in shown]) for i in range(len(rows))]
    return [*lines, *(f"{row['kernel']}: {row['note']}" for row in rows if row["note"]), ""]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes each kernel's share of the copy speed to ``path``, one bar for each size."""
    from matplotlib.figure import Figure

    timed_rows = [row for row in rows if row["of_copy"] is not None]
    known, sizes = ([*dict.fromkeys(row[key] for row in timed_rows)] for key in ("kernel", "numel"))
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(known)), layout="constrained")
    axes: Any = figure.subplots()
    high = 0.8 / max(1, len(sizes))
    for number, n in enumerate(sizes):
        bars = [row for row in timed_rows if row["numel"] == n]
        places = [known.index(row["kernel"]) + (number - (len(sizes) - 1) / 2) * high for row in bars]
        drawn = axes.barh(places, [100 * row["of_copy"] for row in bars], high, label=f"n = {n:,}")
        axes.bar_label(drawn, [f"{1e3 * row['seconds']:.3f} ms" for row in bars], padding=3, fontsize=7)
    axes.set_yticks(range(len(known)), known)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(100, color="#888888", linewidth=1)
    axes.set(xlabel="of the speed at which the device copies n elements, %")
    axes.legend()
    figure.savefig(path, dpi=150)


def _number(value: float | None, form: str, factor: float | None = None) -> str:
    if value is None:
        return ""
    return form.format(value if factor is None else factor * value)


def _verdict(met: bool | None) -> str:
    return {None: "not measured", True: "met", False: "missed"}[met]


def _size(text: str) -> int:
    """A whole number of at least 1, also as 25e6."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 2**40 or number != int(number):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, such as 25e6, got {text!r}")
    return int(number)


def _name(text: str) -> str:
    if text not in (*KINDS, STEP):
        raise argparse.ArgumentTypeError(f"must be of {', '.join((*KINDS, STEP))}, got {text!r}")
    return text


if __name__ == "__main__":
    try:
        main()
    except SparcommError as error:
        sys.exit(f"error: {error}")
