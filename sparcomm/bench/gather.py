"""Which collectives are worth writing ourselves? Gloo's own against ours over p2p, on 4 processes of this machine.

    python -m sparcomm.bench.gather

The transport takes the faster ones: Bruck over p2p for all_gather, Gloo's own all_to_all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from sparcomm.bench.options import Parser
from sparcomm.transport.torchdist import TorchTransport
from sparcomm.transport.torchdist.local import native_all_gather, native_all_to_all, run_local

RANKS = 4
SIZES = {"16 KiB": (1 << 14, 200), "1 MiB": (1 << 20, 40), "16 MiB": (1 << 24, 9)}  # bytes, repeats


def milliseconds(transport: TorchTransport, call: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median and best time of a collective: each time that of its slowest rank, from a common start."""
    call()
    times = torch.empty(repeats, dtype=torch.float64)
    for i in range(repeats):
        transport.all_reduce(torch.zeros(1))
        start = time.perf_counter()
        call()
        times[i] = time.perf_counter() - start
    transport.all_reduce(times, "max")
    return statistics.median(times.tolist()) * 1e3, min(times.tolist()) * 1e3


def exchanges(transport: TorchTransport, out: torch.Tensor, x: torch.Tensor) -> None:
    """An all_to_all of p-1 exchanges, every rank starting with another peer."""
    p, r = transport.size, transport.rank
    out[r].copy_(x[r])
    for shift in range(1, p):
        to, source = (r + shift) % p, (r - shift) % p
        transport.exchange(x[to], to, out[source], source)


def measure(transport: TorchTransport) -> None:
    """One rank's part; rank 0 prints."""
    t, p = transport, transport.size
    if t.rank == 0:
        print(f"{p} ranks, Gloo on loopback; milliseconds, median (best); bytes per rank")
        print(f"{'':28}" + "".join(f"{name:>20}" for name in SIZES))
    rows: dict[str, list[str]] = {}
    for size, repeats in SIZES.values():
        x, out = torch.ones(size, dtype=torch.uint8), torch.empty((p, size), dtype=torch.uint8)
        parts, got = x.view(p, -1), torch.empty_like(x).view(p, -1)
        calls: dict[str, Callable[[], None]] = {
            "all_gather, Gloo": lambda out=out, x=x: native_all_gather(out, x),
            "all_gather, Bruck": lambda out=out, x=x: t.all_gather(out, x),
            "all_to_all, Gloo": lambda got=got, parts=parts: native_all_to_all(got, parts),
            "all_to_all, ours": lambda got=got, parts=parts: t.all_to_all(got, parts),
            "all_to_all, p-1 exchanges": lambda got=got, parts=parts: exchanges(t, got, parts),
        }
        for name, call in calls.items():
            median, best = milliseconds(t, call, repeats)
            rows.setdefault(name, []).append(f"{median:.2f} ({best:.2f})")
    if t.rank == 0:
        for name, cells in rows.items():
            print(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))


def main(argv: Sequence[str] | None = None) -> None:
    """Starts the ranks, which print the table."""
    Parser(prog="sparcomm bench gather", description=__doc__).parse_args(argv)
    run_local(RANKS, measure)


if __name__ == "__main__":
    main()
