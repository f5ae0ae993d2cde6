"""What travels: bytes counted on the simulator against ``cost()``, in bits per kept entry.

    python -m sparcomm.bench.wire [--sizes 4 8] [--numel 2000000 25000000] [--density 0.01] [--values float32 bfloat16]

Bits per kept entry are bytes sent by the busiest rank, times 8, over kept entries times (p-1)/p: the paper's format
(32-bit index and float32 value, sent in the scatter and again in the gather) costs 128.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from rich.console import Console
from rich.table import Table

from sparcomm.algorithms import Algorithm, registry
from sparcomm.transport import sim
from sparcomm.transport.base import Traffic, Transport


def measure(algorithm: Algorithm, n: int, size: int) -> tuple[Traffic, bool]:
    """Traffic of the busiest rank in one ``reduce`` of n normal float32 values, and whether it equals ``cost()``."""

    def rank(transport: Transport) -> None:
        grad = torch.randn(n, generator=torch.Generator().manual_seed(transport.rank))
        algorithm.reduce(grad, None, algorithm.init(n, grad.dtype, grad.device, size), 0, transport)

    busiest = max(sim.run(size, rank, timeout=600).traffic, key=lambda t: t.bytes_sent)
    cost = algorithm.cost(n, torch.float32, size)
    return busiest, (busiest.rounds, busiest.messages, busiest.bytes_sent) == tuple(cost)


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="sparcomm bench wire", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--numel", type=int, nargs="+", default=[2_000_000, 25_000_000])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--values", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    if min(*args.sizes, *args.numel, 1) < 1:
        parser.error("needs --sizes and --numel of at least 1")
    torch.set_num_threads(1)
    table = Table(title=f"Traffic per rank and step at density {args.density:g}, counted")
    for name in (
        "algorithm",
        "values",
        "p",
        "n",
        "kept",
        "bytes",
        "of dense",
        "bits/entry",
        "rounds",
        "messages",
        "cost()",
    ):
        table.add_column(name, justify="left" if name in ("algorithm", "values", "cost()") else "right")
    known = registry()
    for n, size, values in itertools.product(args.numel, args.sizes, args.values):
        for name in ("spardl", "topk"):
            algorithm = known[name](density=args.density, values=values)  # type: ignore[call-arg]
            traffic, equal = measure(algorithm, n, size)
            kept = algorithm.kept(n, size)
            bits = 8 * traffic.bytes_sent / (kept * (size - 1) / size)
            dense = traffic.bytes_sent / (2 * (size - 1) / size * 4 * n)
            table.add_row(
                name, values, str(size), f"{n:,}", f"{kept:,}", f"{traffic.bytes_sent:,}", f"1/{1 / dense:.1f}",
                f"{bits:.1f}", str(traffic.rounds), str(traffic.messages), "equal" if equal else "DIFFERS",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
