#!/usr/bin/env python3
"""What late deliveries do to an optimizer: how far they move weights, as a share of what prompt ones do.

    python launch/bursts.py

Every weight gets the same gradients twice: in every step, and added up once in 10 or 100 steps, as error feedback
delivers them. They are 1 (steady), or 0.1 with noise of deviation 1 (noisy). 1 means that the late deliveries move
weights as far; docs/tuning.md says what follows from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparcomm
from sparcomm.optim import AdamW
from sparcomm.workspace import Workspace

WEIGHTS, STEPS, WARM, RATE = 500, 4000, 500, 1e-3
PERIODS = (10, 100)
BETAS2 = (0.95, 0.999)

Make = Callable[[nn.Parameter], torch.optim.Optimizer]


class Warm:
    """In place of a hook: the first ``WARM`` steps were dense."""

    step = 0

    def was_dense(self, parameter: Tensor) -> bool:
        """Whether this step was one of them."""
        return self.step < WARM


def gradients(noise: float) -> Tensor:
    """(WARM + STEPS, WEIGHTS): 1, or 0.1 with noise of this deviation."""
    made = torch.Generator().manual_seed(0)
    shape = (WARM + STEPS, WEIGHTS)
    return torch.ones(shape) if not noise else 0.1 + noise * torch.randn(shape, generator=made)


def late(feed: Tensor, period: int) -> Tensor:
    """The same after the first ``WARM`` steps, added up and delivered in every ``period``-th step."""
    out = feed.clone()
    out[WARM:] = 0
    out[WARM + period - 1 :: period] = feed[WARM:].reshape(-1, period, WEIGHTS).sum(1)
    return out


def moved(make: Make, feed: Tensor, told: Warm) -> float:
    """How far the weights have gone on average after the first ``WARM`` steps."""
    p = nn.Parameter(torch.zeros(WEIGHTS))
    optimizer = make(p)
    start = p.detach().clone()
    for step, g in enumerate(feed):
        told.step, p.grad = step, g
        if step == WARM:
            start = p.detach().clone()
        optimizer.step()
    return float((start - p.detach()).mean())


def divided(feed: Tensor, beta2: float) -> Tensor:
    """What AdamCorrection makes of the gradients before any of them can be late."""
    memory, second, out = sparcomm.AdamCorrection(beta2), None, torch.empty_like(feed)
    for step, g in enumerate(feed):
        out[step], second = memory.feed(g, second, Workspace(), step, (slice(0, WEIGHTS),))
    return out


def rows(feed: Tensor) -> Iterator[tuple[str, list[float]]]:
    """(name, share by period) of every optimizer."""
    told = Warm()

    def shares(make: Make, feed: Tensor) -> list[float]:
        dense = moved(make, feed, told)
        return [moved(make, late(feed, period), told) / dense for period in PERIODS]

    def adam(**kwargs: object) -> Make:
        return lambda p: torch.optim.AdamW([p], lr=RATE, weight_decay=0.0, **kwargs)  # pyright: ignore[reportArgumentType]

    for beta2 in BETAS2:
        yield f"AdamW, beta2 {beta2}", shares(adam(betas=(0.9, beta2)), feed)
    for beta2 in BETAS2:
        yield f"AdamW, beta1 0, beta2 {beta2}", shares(adam(betas=(0.0, beta2)), feed)
    yield "AdamW, beta2 0.999, amsgrad", shares(adam(betas=(0.9, 0.999), amsgrad=True), feed)
    yield "RMSprop, alpha 0.99", shares(lambda p: torch.optim.RMSprop([p], lr=RATE), feed)
    yield "Adagrad", shares(lambda p: torch.optim.Adagrad([p], lr=RATE), feed)
    for beta2 in BETAS2:
        betas = (0.9, beta2)
        held = shares(lambda p, betas=betas: AdamW([p], lr=RATE, betas=betas, weight_decay=0.0, hook=told), feed)
        yield f"sparcomm.optim.AdamW, beta2 {beta2}", held
    for beta2 in BETAS2:
        sgd = shares(lambda p: torch.optim.SGD([p], lr=RATE), divided(feed, beta2))
        yield f"AdamCorrection(beta2={beta2}), SGD", sgd


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args(argv)
    steady, noisy = list(rows(gradients(0))), list(rows(gradients(1.0)))
    table = Table(title="moved by late deliveries, as a share of prompt ones", title_justify="left")
    table.add_column("", no_wrap=True)
    for kind in ("steady", "noisy"):
        for period in PERIODS:
            table.add_column(f"{kind}, once in {period}", justify="right")
    for (name, first), (_, second) in zip(steady, noisy, strict=True):
        table.add_row(name, *(f"{share:.2f}" for share in (*first, *second)))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
