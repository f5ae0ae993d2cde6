"""Selection against torch: ``python -m sparcomm.bench.select [--numel N] [--density D] [--repeat R]``.

One thread, float32 normal data, CPU time, best of R runs each. The first two rows are the claim: compensate + select of
the whole vector against ``torch.abs(x, out=buffer)`` + ``torch.topk(buffer, k)``.
The others are what a training step does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm.kernels import kernels_for
from sparcomm.layout import Layout, dealt, whole

BLOCKS = 8


class Row(NamedTuple):
    """One measurement: its name, seconds, and whether the result was the right one."""

    name: str
    seconds: float
    identical: bool | None


def best(repeat: int, run: Callable[[], object]) -> float:
    """CPU seconds of the fastest of ``repeat`` runs, after one that is not counted; other processes do not count."""
    run()
    seconds: list[float] = []
    for _ in range(repeat):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def top_by_torch(x: Tensor, k: int) -> Tensor:
    """The k largest magnitudes, ties to the lowest position: torch.topk leaves ties open, a stable sort does not."""
    return x.abs().sort(descending=True, stable=True).indices[:k].sort().values


def measure(numel: int, density: float, repeat: int) -> list[Row]:
    """All rows, torch's first. Runs on one thread."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    k = max(1, round(density * numel))
    buffer = torch.empty_like(x)
    rows = [Row("torch abs + topk", best(repeat, lambda: torch.topk(torch.abs(x, out=buffer), k)), None)]
    rows += selecting(x, k, whole(numel), repeat, "one block")
    rows += selecting(x, k, dealt(numel, BLOCKS), repeat, f"{BLOCKS} dealt blocks")
    residual = torch.randn_like(x)
    rows.append(Row("torch.add", best(repeat, lambda: torch.add(x, residual, out=buffer)), None))
    for dtype in (torch.float32, torch.bfloat16):
        rows.append(compensating(x.to(dtype), residual, buffer, k, repeat))
    return rows


def selecting(x: Tensor, k: int, layout: Layout, repeat: int, name: str) -> list[Row]:
    """Copying x while looking for candidates, then selecting from all blocks; and the copy alone."""
    kernels, out, flags = kernels_for(x), torch.empty_like(x), torch.zeros(1, dtype=torch.uint8)
    per_block = min(layout.length, max(1, round(k / layout.blocks)))

    def both() -> list[Tensor]:
        work = kernels.compensate(x, None, out, layout, per_block, flags)
        return [kernels.select(work, b, per_block)[0] for b in range(layout.blocks)]

    whole_job = Row(f"compensate + select, {name}", best(repeat, both), right(x, both(), layout))
    alone = best(repeat, lambda: kernels.compensate(x, None, out, layout, per_block, flags))
    return [whole_job, Row("  of which compensate", alone, None)]


def compensating(grad: Tensor, residual: Tensor, out: Tensor, k: int, repeat: int) -> Row:
    """Gradient + residual with the search for candidates, in one pass."""
    kernels, layout, flags = kernels_for(grad), dealt(grad.numel(), BLOCKS), torch.zeros(1, dtype=torch.uint8)
    seconds = best(repeat, lambda: kernels.compensate(grad, residual, out, layout, max(1, k // BLOCKS), flags))
    dtype = str(grad.dtype).removeprefix("torch.")
    return Row(f"compensate {dtype} (sum + candidates)", seconds, torch.equal(out, grad.to(out.dtype) + residual))


def right(x: Tensor, selected: list[Tensor], layout: Layout) -> bool:
    """Whether every block's selection is what a stable sort of that block finds."""
    for block, index in enumerate(selected):
        where = layout.to_global(torch.arange(layout.length), block)
        values = torch.where(where < layout.numel, x[where.clamp(max=layout.numel - 1)], 0)
        if not torch.equal(index, top_by_torch(values, index.numel())):
            return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="sparcomm bench select", description=__doc__)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args(argv)
    if options.numel < 1 or options.repeat < 1 or not 0 < options.density <= 1:
        parser.error("needs --numel >= 1, --repeat >= 1 and --density in (0, 1]")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(options.numel, options.density, options.repeat)
    finally:
        torch.set_num_threads(threads)
    table = Table(title=f"{options.numel:,} float32, density {options.density:g}, one thread, best of {options.repeat}")
    for column in ("", "ms", "x torch topk", "identical"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        identical = {True: "yes", False: "NO", None: ""}[row.identical]
        ratio = f"{rows[0].seconds / row.seconds:.1f}" if "select" in row.name else ""
        table.add_row(row.name, f"{row.seconds * 1e3:.1f}", ratio, identical)
    Console().print(table)


if __name__ == "__main__":
    main()
