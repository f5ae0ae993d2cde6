"""How much of the wire time hides behind the backward pass: the hook's worker thread against the same hook inline.

    sparcomm bench overlap --ranks 2

A model of equal layers, one DDP bucket each, on one thread per rank. Three kinds of step, in turns, so that whatever
else the machine does hits all of them: compute only (``no_sync``), with the hook as ``attach`` makes it, and with the
same hook doing its work on the autograd thread, which waits meanwhile. Each has a DDP module of its own. Hidden is
(inline - overlapped) / wire: wire is the time that the inline hook spends in exchanges.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparcomm.bench import entries, sync
from sparcomm.bench.child import PATIENCE, Job
from sparcomm.bench.options import Common, Parser, add_common, at_least, check
from sparcomm.bench.rows import Row, Runner
from sparcomm.bench.sample import Progress, Sample
from sparcomm.bench.world import World, launch
from sparcomm.ddp.attach import attach
from sparcomm.ddp.state import HookState
from sparcomm.ddp.worker import Inline
from sparcomm.errors import ConfigError

KINDS = ("compute", "overlapped", "inline")
SETTLING = 3  # steps before DDP's buckets are final


@dataclass(frozen=True)
class Options(Common):
    """Those of ``sparcomm bench overlap``."""

    algorithm: str = "spardl"
    layers: int = 8
    width: int = 1024
    batch: int = 128


def measure(job: Job, progress: Progress) -> Sample:
    """The rank's part. Collective."""
    options = job.options
    assert isinstance(options, Options)
    algorithm = entries.parse(job.typed, options.density, options.values, options.schedule).algorithm
    assert algorithm is not None
    data = torch.randn(options.batch, options.width, generator=torch.Generator().manual_seed(job.rank))
    modules = {kind: _module(options) for kind in KINDS}
    patience = options.timeout + PATIENCE
    states = {kind: attach(modules[kind], algorithm, timeout=patience) for kind in ("overlapped", "inline")}
    _run_inline(states["inline"])
    seconds: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "cpu", "wire")}
    settling, wire, before = max(options.warmup, SETTLING), 0.0, dict[str, int]()
    for turn in range(settling + options.steps):
        if turn == settling:
            seconds = {kind: [] for kind in seconds}
            before = vars(states["inline"].traffic).copy()
        for kind in KINDS:
            dist.barrier()  # else a rank that was slow in one kind of step would be waited for in the next
            start, spent = time.perf_counter(), time.process_time()
            _step(modules[kind], data, synchronised=kind != "compute")
            seconds[kind].append(time.perf_counter() - start)
            if kind == "overlapped":
                seconds["cpu"].append(time.process_time() - spent)
        so_far = states["inline"].stats()["seconds"]["wire"]
        seconds["wire"].append(so_far - wire)
        wire = so_far
        progress(turn)
    stats = states["inline"].stats()
    grown = {name: round((stats[name] - before[name]) / options.steps) for name in ("bytes_sent", "rounds", "messages")}
    extra = {f"{kind}_seconds": statistics.median(seconds[kind]) for kind in ("compute", "inline", "wire")}
    extra["buckets"] = len(stats["per_unit"])
    for state in states.values():
        state.close()
    return Sample(seconds["overlapped"], seconds["cpu"], **grown, kept=stats["kept"], extra=extra)


def _run_inline(state: HookState) -> None:
    """Lets the hook work on the thread that calls it, before the first step."""
    engine: Any = state._engine  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    engine._executor.stop()  # noqa: SLF001
    engine._executor = Inline()  # noqa: SLF001


def _module(options: Options) -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = [nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)]
    body = [part for layer in layers for part in (layer, nn.Tanh())]
    megabytes = options.width * options.width * 4 / 2**20
    return DistributedDataParallel(nn.Sequential(*body), bucket_cap_mb=0.9 * megabytes)


def _step(ddp: DistributedDataParallel, data: Tensor, *, synchronised: bool) -> None:
    """Forward and backward; without synchronisation gradients pile up in place, which takes as long."""
    ddp.zero_grad(set_to_none=False)
    ddp.require_backward_grad_sync = synchronised
    ddp(data).square().mean().backward()


def hidden(row: Row) -> float:
    """The part of the wire time that did not lengthen the step."""
    assert row.seconds is not None
    wire = row.extra["wire_seconds"]
    return (row.extra["inline_seconds"] - row.seconds) / wire if wire else 1.0


def parse(argv: Sequence[str]) -> Options:
    """Options from the command line. Raises ConfigError."""
    parser = Parser(prog="sparcomm bench overlap", description=__doc__)
    add = parser.add_argument
    add("--algorithm", default="spardl", metavar="A", help="as in 'sparcomm bench' (spardl); one of ours")
    add("--layers", type=at_least(2), default=8, metavar="L", help="equal layers, a bucket each (8)")
    add("--width", type=at_least(1), default=1024, metavar="W", help="of a layer: W x W parameters (1024)")
    add("--batch", type=at_least(1), default=128, metavar="B", help="rows per rank: sets the time of computing (128)")
    add_common(parser)
    given = parser.parse_args(argv)
    options = Options(**{f.name: getattr(given, f.name) for f in fields(Options)})
    check(options, [options.algorithm])
    if entries.parse(options.algorithm, options.density, options.values, options.schedule).algorithm is None:
        raise ConfigError(f"--algorithm {options.algorithm}: only algorithms of ours run inline")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = sync.quietly(lambda: parse(arguments))
    if options.ranks is not None:
        sys.exit(launch(options.ranks, ["sparcomm", "bench", "overlap", *sync.without_ranks(arguments)]))
    sync.run(options, _work(options))


def _work(options: Options) -> Callable[[Runner, World], bool]:
    def work(runner: Runner, world: World) -> bool:
        row = runner.run("overlap", options.algorithm, options.layers * options.width**2)
        if world.rank == 0:
            print(as_json(row), flush=True) if options.json else show(row, options)
        return row.error is None

    return work


def as_json(row: Row) -> str:
    """One object on one line."""
    if row.error is not None:
        return json.dumps({"algorithm": row.algorithm, "numel": row.numel, "size": row.size, "error": row.error})
    shown = {
        "algorithm": row.algorithm, "numel": row.numel, "size": row.size, "overlapped_seconds": row.seconds,
        "cpu_seconds": row.cpu_seconds, "bytes_sent": row.bytes_sent, **row.extra, "hidden": hidden(row),
    }  # fmt: skip
    return json.dumps(shown)


def show(row: Row, options: Options) -> None:
    """Prints the table."""
    if row.error is not None:
        print(f"{row.algorithm}: {row.error}")
        return
    title = (
        f"{row.algorithm}, n = {row.numel:,} in {row.extra['buckets']} buckets, {row.size} ranks, batch {options.batch}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("compute only, ms", "overlapped, ms", "inline, ms", "wire, ms", "of it hidden"):
        table.add_column(name, justify="right")
    assert row.seconds is not None
    times = (row.extra["compute_seconds"], row.seconds, row.extra["inline_seconds"], row.extra["wire_seconds"])
    table.add_row(*(f"{1e3 * t:.1f}" for t in times), f"{100 * hidden(row):.0f} %")
    Console(width=120).print(table)
