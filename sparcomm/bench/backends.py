"""The torch.distributed backend on MPI against Gloo: all_reduce and broadcast of 1 KB to 100 MB, in the same processes.

    mpirun -n 4 python -m sparcomm.bench.backends

The two take turns, call by call, so that what else the machine does hits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import sparcomm.mpi_backend
from sparcomm.bench.options import Parser

# What PyTorch documents, but does not list as exported.
SIZES = {"1 KB": 1 << 10, "16 KB": 1 << 14, "256 KB": 1 << 18, "1 MB": 1 << 20, "16 MB": 1 << 24, "100 MB": 100 << 20}
BUDGET = 2e8  # bytes that all repeats of one size move
OPERATIONS: dict[str, Callable[[torch.Tensor, Any], object]] = {
    "all_reduce": lambda x, group: dist.all_reduce(x, group=group),
    "broadcast": lambda x, group: dist.broadcast(x, 0, group=group),
}


def times(call: Callable[[torch.Tensor, Any], object], x: torch.Tensor, groups: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each call, on its slowest rank, by backend."""
    repeats = max(4, min(100, int(BUDGET / x.nbytes)))
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs on every rank; rank 0 prints."""
    Parser(prog="python -m sparcomm.bench.backends", description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group(sparcomm.mpi_backend.NAME)
    groups = {sparcomm.mpi_backend.NAME: dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks; milliseconds, median (best)")
        print(f"{'':24}" + "".join(f"{name:>22}" for name in groups))
    for operation, call in OPERATIONS.items():
        for size, nbytes in SIZES.items():
            found = times(call, torch.zeros(nbytes // 4), groups)
            cells = [f"{statistics.median(t) * 1e3:.3f} ({min(t) * 1e3:.3f})" for t in found.values()]
            if dist.get_rank() == 0:
                print(f"{operation + ' ' + size:24}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
