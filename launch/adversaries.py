#!/usr/bin/env python3
"""How many ranks may work against the others before training fails: a majority vote of signs against a mean.

    python launch/adversaries.py --png adversaries.png

Trains logistic regression on scikit-learn's digits over simulated ranks, f of which send -c times their gradient
instead of it: "inverted" with c = 1, "scaled" with c one and a half times (p-f)/f, from where on the mean points the
wrong way. A mean of gradients follows the latter from f = 1 on, and slows down under the former. In a vote a rank has
one vote whatever c, so the honest majority is heard (Bernstein et al., arXiv 1810.05291, section 4): what is lost are
the coordinates that the honest ranks themselves do not agree on. Adversaries corrupt their gradients and nothing else;
one that lied about the verdict of its chunk would not be outvoted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs import data
from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.transport import sim
from sparcomm.transport.base import Transport

KINDS = ("scaled", "inverted")
CLASSES = 10
EXCESS = 1.5  # how far beyond (p-f)/f "scaled" adversaries go
RATES = {"mean": 0.5, "vote": 0.005}


@dataclass(frozen=True)
class Plan:
    """What is trained: ``batch`` samples a rank and step, ``rates`` linearly down to zero."""

    ranks: int = 7
    steps: int = 300
    batch: int = 16
    seed: int = 0


def rules() -> dict[str, Algorithm]:
    """What is compared, by name."""
    return {"mean": Dense(), "vote": MajorityVote()}


def factor(kind: str, adversaries: int, ranks: int) -> float:
    """c: what an adversary's gradient is multiplied by, and the sign turned."""
    return 1.0 if kind == "inverted" or not adversaries else EXCESS * (ranks - adversaries) / adversaries


def train(rule: str, kind: str, adversaries: int, plan: Plan) -> float:
    """Accuracy on held-out digits after training with ``adversaries`` of the plan's ranks. The last ranks are these."""
    digits = data.digits()
    train, test = _flat(digits.train), _flat(digits.test)
    algorithm, c = rules()[rule], factor(kind, adversaries, plan.ranks)

    def rank(transport: Transport) -> Tensor:
        weights = torch.zeros(train.x.shape[1] * CLASSES)
        state = algorithm.init(len(weights), weights.dtype, weights.device, transport.size)
        batches = _batches(len(train), transport, plan)
        for step in range(plan.steps):
            grad = gradient(weights, *train.take(next(batches)))
            if transport.rank >= transport.size - adversaries:
                grad *= -c
            reduced = algorithm.reduce(grad, None, state, step, transport)
            state, total = reduced.state, reduced.total
            assert total is not None
            weights -= RATES[rule] * (1 - step / plan.steps) * total / transport.size
        return weights

    every = sim.run(plan.ranks, rank).results
    assert all(torch.equal(weights, every[0]) for weights in every), "replicas differ"
    return float((scores(every[0], test.x).argmax(1) == test.y).float().mean())


def scores(weights: Tensor, x: Tensor) -> Tensor:
    """(b, CLASSES) logits of ``x`` (b, features)."""
    return x @ weights.view(-1, CLASSES)


def gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy, flat."""
    error = scores(weights, x).softmax(1)
    error[torch.arange(len(y)), y] -= 1
    return (x.T @ error).flatten() / len(y)


def _flat(samples: Any) -> data.Table:
    """Images as rows, with a constant in front."""
    x = samples.x.flatten(1)
    return data.Table(torch.cat([torch.ones(len(x), 1), x], 1), samples.y)


def _batches(length: int, transport: Transport, plan: Plan) -> Any:
    """This rank's indices, without end."""
    sampler = data.Sampler(length, plan.batch * transport.size, transport.rank, transport.size, plan.seed)
    epoch = 0
    while True:
        yield from sampler.indices(epoch)
        epoch += 1


def sweep(plan: Plan) -> dict[tuple[str, str], list[float]]:
    """Accuracies by (rule, kind), for f from 0 to just below p/2."""
    most = (plan.ranks - 1) // 2
    return {(rule, kind): [train(rule, kind, f, plan) for f in range(most + 1)] for kind in KINDS for rule in rules()}


def draw(path: Path, found: dict[tuple[str, str], list[float]], plan: Plan) -> None:
    """One PNG: accuracy against f."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        for rule in rules():
            axes.plot(found[rule, kind], marker="o", label=rule)
        axes.set(title=kind, xlabel=f"adversaries of {plan.ranks} ranks", ylim=(0, 1))
        axes.set_xticks(range(len(found["vote", kind])))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, held out")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=Plan.ranks, metavar="P")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--batch", type=int, default=Plan.batch, help="samples of a rank in a step")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw accuracy against the number of adversaries")
    args = parser.parse_args(argv)
    if args.ranks < 3 or args.steps < 1 or args.batch < 1 or args.seed < 0:
        parser.error("needs --ranks of at least 3, --steps and --batch of at least 1, --seed of at least 0")
    samples = len(data.digits().train)
    if args.ranks * args.batch > samples:
        parser.error(f"--ranks {args.ranks} times --batch {args.batch}: there are {samples} samples to train with")
    if args.png is not None and args.png.suffix.lower() != ".png":
        parser.error(f"--png {args.png}: must end in .png")
    plan = Plan(args.ranks, args.steps, args.batch, args.seed)
    found = sweep(plan)
    table = Table(title=f"accuracy with f of {plan.ranks} ranks against the others", title_justify="left")
    table.add_column("", no_wrap=True)
    for f in range(len(found["vote", KINDS[0]])):
        table.add_column(f"f = {f}", justify="right")
    for (rule, kind), shares in found.items():
        table.add_row(f"{rule}, {kind}", *(f"{100 * share:.1f} %" for share in shares))
    Console(width=120).print(table)
    if args.png is not None:
        draw(args.png, found, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
