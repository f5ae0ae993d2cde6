"""What a step delivers: energy captured against the exact global top-k, for dealt and contiguous blocks.

    python -m sparcomm.bench.quality [--size 8] [--density 0.01] [--seeds 3]

Short vectors keep few entries, so they are averaged over more seeds (100,000 / n times as many).

With S the exact sum over ranks and T what SparDL delivers in its first step (no residual yet), the captured energy is
|S|^2 - |S - T|^2; the table shows it relative to that of the k largest entries of S, k being what SparDL keeps.
Every rank's gradient is independent normal noise times the scale that the row names.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm.algorithms import Algorithm, registry
from sparcomm.bench.options import Parser
from sparcomm.transport import sim
from sparcomm.transport.base import Transport


def scales() -> dict[str, Tensor]:
    """Scale of every element, by the name of the case."""
    side, n = 1024, 1024 * 1024
    ramp = torch.logspace(0, 1, 20)
    hot = torch.ones(side)
    hot[::8] = 10.0
    return {
        "homogeneous": torch.ones(n),
        "10x between 20 layers": ramp.repeat_interleave(-(-n // 20))[:n],
        "1024 x 1024, 10x between columns": torch.logspace(0, 1, side).repeat(side),
        "every 8th column hot": hot.repeat(side),
        "n = 3,000": torch.ones(3000),
        "n = 3,000, 10x between 20 layers": ramp.repeat_interleave(150),
    }


def captured(algorithm: Algorithm, scale: Tensor, size: int, seed: int) -> float:
    """Energy captured by one step, relative to the exact global top-k's."""
    n = scale.numel()

    def gradient(rank: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(1000 * seed + rank)) * scale

    def rank(transport: Transport) -> Tensor:
        state = algorithm.init(n, torch.float32, torch.device("cpu"), size)
        total = algorithm.reduce(gradient(transport.rank), None, state, 0, transport).total
        assert total is not None  # the state wants it
        return total

    total = sim.run(size, rank, timeout=600).results[0].double()
    exact = sum((gradient(r).double() for r in range(size)), torch.zeros(n, dtype=torch.float64))
    best = exact.square().topk(algorithm.kept(n, size)).values.sum()
    return float((exact.square().sum() - (exact - total).square().sum()) / best)


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = Parser(prog="sparcomm bench quality", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", type=int, default=8, help="ranks")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.size < 1 or args.seeds < 1:
        parser.error("needs --size and --seeds of at least 1")
    torch.set_num_threads(1)
    table = Table(title=f"Energy captured / exact global top-k, p = {args.size}, density {args.density:g}")
    for name in ("gradient", "schedule", "dealt", "of homogeneous", "contiguous", "of homogeneous"):
        table.add_column(name, justify="left" if name in ("gradient", "schedule") else "right")
    spardl = registry()["spardl"]
    for schedule in ("log", "direct"):
        base: dict[str, float] = {}
        for case, scale in scales().items():
            row = [case, schedule]
            for layout in ("dealt", "contiguous"):
                algorithm = spardl(density=args.density, schedule=schedule, layout=layout)  # type: ignore[call-arg]
                seeds = args.seeds * max(1, 100_000 // scale.numel())  # few entries are kept of a short vector
                mean = sum(captured(algorithm, scale, args.size, s) for s in range(seeds)) / seeds
                row += [f"{mean:.3f}", f"{mean / base.setdefault(layout, mean):.2f}"]
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
