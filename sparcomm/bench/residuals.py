"""What stays behind: the size of the summed residual after many steps of error feedback.

    python -m sparcomm.bench.residuals [--size 16] [--numel 65536] [--density 0.01] [--steps 200] [--seed 0]

Every step has a gradient of its own on every rank (``bench.gradient``: half of the energy common to all ranks, 10x
between 20 layers). Shown are the Euclidean norms of the sum over ranks of what is owed after the last step, and of what
was neither delivered nor is owed any more, both over that of one step's summed gradient; and the first relative to
error feedback with the exact global top-k of the same k, which selects from the sum itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparcomm.algorithms import Algorithm, registry
from sparcomm.bench.gradient import exact_sum, gradient
from sparcomm.bench.options import Parser
from sparcomm.transport import sim
from sparcomm.transport.base import Transport

Gradients = Callable[[int, int], Tensor]  # of (step, rank)


def configurations(density: float, size: int) -> dict[str, Algorithm]:
    """What is compared, by name."""
    spardl = registry()["spardl"]
    found: dict[str, Algorithm] = {}
    for layout in ("dealt", "contiguous"):
        for schedule in ("log", "direct"):
            for rule in ("global", "partial", "local"):
                made = spardl(density=density, layout=layout, schedule=schedule, residuals=rule)  # type: ignore[call-arg]
                found[f"{layout}, {schedule}, {rule}"] = made
    for teams in (d for d in (2, 4, size) if size % d == 0):
        kinds = ("b-sag",) if teams & (teams - 1) else ("r-sag", "b-sag")
        for sag in kinds:
            found[f"dealt, log, global, {teams} teams, {sag}"] = spardl(density=density, teams=teams, sag=sag)  # type: ignore[call-arg]
    found["topk (all-gather)"] = registry()["topk"](density=density)  # type: ignore[call-arg]
    return found


def behind(algorithm: Algorithm, gradients: Gradients, fed: Tensor, size: int, steps: int) -> tuple[Tensor, Tensor]:
    """(summed residual, what was lost), (n,) float64 each, after ``steps`` steps; ``fed``: the sum of all gradients."""
    n = fed.numel()

    def rank(transport: Transport) -> tuple[Tensor, Tensor]:
        state, residual = algorithm.init(n, torch.float32, torch.device("cpu"), size), None
        delivered = torch.zeros(n, dtype=torch.float64)
        for step in range(steps):
            reduced = algorithm.reduce(gradients(step, transport.rank), residual, state, step, transport)
            assert reduced.total is not None  # the state wants it
            delivered += reduced.total
            state.workspace.give(reduced.total, residual)
            residual, state = reduced.residual, reduced.state
        return delivered, torch.zeros(n) if residual is None else residual

    ranks = sim.run(size, rank, timeout=3600).results
    owed = sum((left.double() for _, left in ranks), torch.zeros(n, dtype=torch.float64))
    return owed, fed - ranks[0][0] - owed


def exact(gradients: Callable[[int], Tensor], n: int, k: int, steps: int) -> Tensor:
    """(n,) float64: what error feedback with the exact top-k of the sum leaves behind."""
    owed = torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        owed += gradients(step)
        owed[owed.abs().topk(k, sorted=False).indices] = 0
    return owed


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = Parser(prog="sparcomm bench residuals", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=16, help="ranks")
    parser.add_argument("--numel", type=int, default=65536)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.size, args.numel, args.steps) < 1 or not 0 < args.density <= 1 or args.seed < 0:
        parser.error("needs --size, --numel and --steps of at least 1, --seed of at least 0, --density in (0, 1]")
    torch.set_num_threads(1)
    n, size, steps = args.numel, args.size, args.steps

    def seed(step: int) -> int:
        return args.seed * steps + step

    algorithms = configurations(args.density, size)
    fed = torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        fed += exact_sum(n, size, seed(step))
    k = next(iter(algorithms.values())).kept(n, size)
    best = exact(lambda step: exact_sum(n, size, seed(step)), n, k, steps)
    one = torch.linalg.vector_norm(exact_sum(n, size, seed(0)).double())
    table = Table(title=f"After {steps} steps, p = {size}, n = {n:,}, density {args.density:g}; in gradients' norms")
    for name in ("", "owed", "x exact top-k", "lost"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("exact global top-k", f"{torch.linalg.vector_norm(best) / one:.2f}", "1.00", "0.00")
    for name, algorithm in algorithms.items():
        owed, lost = behind(algorithm, lambda step, rank: gradient(n, rank, seed(step)), fed, size, steps)
        size_owed, size_lost = (torch.linalg.vector_norm(x) for x in (owed, lost))
        against = size_owed / torch.linalg.vector_norm(best)
        table.add_row(name, f"{size_owed / one:.2f}", f"{against:.2f}", f"{size_lost / one:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
