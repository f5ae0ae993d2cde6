"""What travels: bytes counted on the simulator against ``cost()``, in bits per kept entry.

    python -m sparcomm.bench.wire [--sizes 4 8] [--numel 2000000 25000000] [--density 0.01]
        [--values float32 bfloat16 int8] [--indices elias-fano rice] [--teams 1]

Bits per kept entry are bytes sent by the busiest rank, times 8, over kept entries times (p-1)/p: the paper's format
(32-bit index and float32 value, sent in the scatter and again in the gather) costs 128. With Rice coded indices the
bytes depend on the data and ``cost()`` is a bound.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparcomm.algorithms import Algorithm, registry
from sparcomm.bench.options import Parser
from sparcomm.transport import sim
from sparcomm.transport.base import Traffic, Transport


def measure(algorithm: Algorithm, n: int, size: int) -> tuple[Traffic, bool]:
    """Traffic of the busiest rank in a ``reduce`` of n normal float32 values, and whether it is as ``cost()`` says."""

    def rank(transport: Transport) -> None:
        grad = torch.randn(n, generator=torch.Generator().manual_seed(transport.rank))
        algorithm.reduce(grad, None, algorithm.init(n, grad.dtype, grad.device, size), 0, transport)

    busiest = max(sim.run(size, rank, timeout=600).traffic, key=lambda t: t.bytes_sent)
    cost = algorithm.cost(n, torch.float32, size)
    counted = (busiest.rounds, busiest.messages, busiest.bytes_sent)
    if algorithm.static:
        return busiest, counted == tuple(cost)
    return busiest, all(c <= most for c, most in zip(counted, cost, strict=True))


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = Parser(prog="sparcomm bench wire", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--numel", type=int, nargs="+", default=[2_000_000, 25_000_000])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--values", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--indices", nargs="+", default=["elias-fano", "rice"])
    parser.add_argument("--teams", type=int, default=1, help="of spardl")
    args = parser.parse_args(argv)
    if min(*args.sizes, *args.numel, 1) < 1:
        parser.error("needs --sizes and --numel of at least 1")
    torch.set_num_threads(1)
    table = Table(title=f"Traffic per rank and step at density {args.density:g}, counted")
    for name in (
        "algorithm",
        "values",
        "indices",
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
        table.add_column(name, justify="left" if name in ("algorithm", "values", "indices", "cost()") else "right")
    known = registry()
    for n, size, values, indices in itertools.product(args.numel, args.sizes, args.values, args.indices):
        for name in ("spardl", "topk"):
            fields: dict[str, Any] = {"density": args.density, "values": values, "indices": indices}
            algorithm = known[name](**fields, **({"teams": args.teams} if name == "spardl" else {}))
            traffic, equal = measure(algorithm, n, size)
            kept = algorithm.kept(n, size)
            bits = 8 * traffic.bytes_sent / (kept * (size - 1) / size)
            dense = traffic.bytes_sent / (2 * (size - 1) / size * 4 * n)
            as_said = ("equal" if algorithm.static else "within") if equal else "DIFFERS"
            table.add_row(
                name, values, indices, str(size), f"{n:,}", f"{kept:,}", f"{traffic.bytes_sent:,}",
                f"1/{1 / dense:.1f}", f"{bits:.1f}", str(traffic.rounds), str(traffic.messages), as_said,
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
