"""The torch.distributed backend on MPI against Gloo: latency and bandwidth from 1 KB to 100 MB, in the same processes.

    mpirun -n 4 sparcomm bench backends

The two take turns, call by call, so that what else the machine does hits both. A call ends when its slowest rank has
ended it; a message's time is half of a round trip between ranks 0 and 1, while the others wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sparcomm.bench.options import Parser
from sparcomm.errors import ConfigError

SIZES = {"1 KB": 1 << 10, "16 KB": 1 << 14, "256 KB": 1 << 18, "1 MB": 1 << 20, "16 MB": 1 << 24, "100 MB": 100 << 20}
BUDGET = 5e8  # bytes that all repeats of one size move
FEWEST, MOST = 7, 100  # repeats

Call = Callable[[torch.Tensor, Any], object]


def all_reduce(x: torch.Tensor, group: Any) -> None:
    """In place."""
    dist.all_reduce(x, group=group)


def broadcast(x: torch.Tensor, group: Any) -> None:
    """From rank 0."""
    dist.broadcast(x, 0, group=group)


def round_trip(x: torch.Tensor, group: Any) -> None:
    """From rank 0 to rank 1 and back."""
    if (rank := dist.get_rank()) == 0:
        dist.send(x, 1, group)
        dist.recv(x, 1, group)
    elif rank == 1:
        dist.recv(x, 0, group)
        dist.send(x, 0, group)


# Name: what is timed, and how many of what the row shows it is.
OPERATIONS: dict[str, tuple[Call, int]] = {
    "message": (round_trip, 2),
    "all_reduce": (all_reduce, 1),
    "broadcast": (broadcast, 1),
}


def times(call: Call, x: torch.Tensor, groups: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each call, on its slowest rank, by backend."""
    repeats = max(FEWEST, min(MOST, int(BUDGET / x.nbytes)))
    found: dict[str, list[float]] = {name: [] for name in groups}
    for i in range(repeats + 1):
        for name, group in groups.items():
            dist.barrier()
            start = time.perf_counter()
            call(x, group)
            if i:  # the first one warms up
                found[name].append(time.perf_counter() - start)
    for name, mine in found.items():
        slowest = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found[name] = slowest.tolist()
    return found


def row(name: str, nbytes: int, found: Sequence[Sequence[float]]) -> str:
    """One operation and size, as Markdown."""
    middles = [statistics.median(seconds) for seconds in found]
    cells = [f"{middle * 1e3:.3f} ({min(seconds) * 1e3:.3f})" for middle, seconds in zip(middles, found, strict=True)]
    speeds = [f"{nbytes / middle / 1e9:.2f}" for middle in middles]
    return f"| {' | '.join([name, *cells, f'{middles[1] / middles[0]:.1f}', *speeds])} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs on every rank; rank 0 prints."""
    Parser(prog="sparcomm bench backends", description=__doc__).parse_args(argv)
    from sparcomm import mpi_backend  # starts MPI
    from sparcomm.mpi_backend.environment import launched

    if not launched():
        raise ConfigError("sparcomm bench backends: must be started by an MPI launcher: mpirun -n 4 sparcomm bench ...")
    torch.set_num_threads(1)
    dist.init_process_group(mpi_backend.NAME)
    if (size := dist.get_world_size()) < 2:
        raise ConfigError(f"sparcomm bench backends: needs at least 2 ranks, got {size}")
    groups = {mpi_backend.NAME: dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    if dist.get_rank() == 0:
        heads = [f"{size} ranks", *(f"{name}, ms: median (best)" for name in groups), "times as fast"]
        print(f"| {' | '.join([*heads, *(f'{name}, GB/s' for name in groups)])} |")
        print(f"|---|{'---:|' * (2 * len(groups) + 1)}")
    for operation, (call, parts) in OPERATIONS.items():
        for title, nbytes in SIZES.items():
            found = times(call, torch.zeros(nbytes // 4), groups)
            each = [[seconds / parts for seconds in found[name]] for name in groups]
            if dist.get_rank() == 0:
                print(row(f"{operation}, {title}", nbytes, each), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
