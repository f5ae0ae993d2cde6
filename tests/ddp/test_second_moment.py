"""Second moments of AdamCorrection in checkpoints: bit for bit, averaged over old ranks, never taken for momenta."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import AdamCorrection, MomentumCorrection, SparDL
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, wrap

TIMEOUT = 30.0
StateDict = dict[str, Any]


def entry(saved: StateDict) -> dict[str, Any]:
    """The one rank's facts and tensors in a state_dict."""
    (value,) = saved.values()
    return {**value["about"][0], **value["owed"][0]}


def trained(rank: int, size: int, memory: Any, steps: range, saved: Any = None) -> tuple[list[list[Tensor]], StateDict]:
    """Some steps from ``saved`` on: the means of each, and the state behind them."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT, memory=memory)
    if saved is not None:
        state.load_state_dict(saved)
    means = [gradient_step(ddp, integers(SIZES, rank, step)) for step in steps]
    found = state.state_dict()
    state.close()
    return means, found


def go_on(
    rank: int, size: int, memory: Any, saved: list[StateDict], steps: range
) -> tuple[list[list[Tensor]], StateDict]:
    return trained(rank, size, memory, steps, saved[rank])


def logged(rank: int, size: int, memory: Any, saved: list[StateDict]) -> tuple[list[str], StateDict]:
    """What the log says when other ranks' state is loaded, and the state right after it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sparcomm").addHandler(handler)
    try:
        return lines, trained(rank, size, memory, range(0), saved)[1]
    finally:
        logging.getLogger("sparcomm").removeHandler(handler)


def in_a_transaction(rank: int, size: int) -> None:
    """A step that is skipped leaves second moments alone, and so do the rebuild, the loss scale and a joined rank."""
    ddp, memory = wrap(Fed()), AdamCorrection(0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT, memory=memory, scaler=scaler)
    v = [torch.zeros(n) for n in SIZES]
    for step in range(5):
        gradients = integers(SIZES, rank, step)
        if step == 3:
            gradients[2][0] = torch.inf if rank else 1.0
        ddp.zero_grad()
        scaler.scale(ddp(gradients)).backward()
        if step != 3:
            old = 0.9 * (1 - 0.9**step) / (1 - 0.9 ** (step + 1))
            v = [old * a + (1 - old) * g.square() for a, g in zip(v, gradients, strict=True)]
        found = entry(state.state_dict())["velocity"]
        for i, a in enumerate(v):
            torch.testing.assert_close(found[f"p.{i}"], a)
    with ddp.join():
        for step in range(3 * rank):
            scaler.scale(ddp(integers(SIZES, rank, step))).backward()
    same = [torch.equal(t, found[name]) for name, t in entry(state.state_dict())["velocity"].items()]
    assert all(same) if rank == 0 else not any(same)
    state.close()


def test_second_moments_are_part_of_the_step() -> None:
    pool(2).run(in_a_transaction)


def test_the_same_ranks_go_on_bit_for_bit() -> None:
    memory = AdamCorrection(0.9)
    whole = pool(2).run(trained, memory, range(8))
    saved = [sd for _, sd in pool(2).run(trained, memory, range(5))]
    for (means, last), (again, resumed) in zip(whole, pool(2).run(go_on, memory, saved, range(5, 8)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(chain(*means[5:]), chain(*again), strict=True))
        for name, second in entry(last)["velocity"].items():
            assert torch.equal(second, entry(resumed)["velocity"][name])


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3)])
def test_other_ranks_take_the_mean(old: int, new: int) -> None:
    memory = AdamCorrection(0.9)
    saved = [sd for _, sd in pool(old).run(trained, memory, range(5))]
    results = pool(new).run(logged, memory, saved)
    for rank, (_, sd) in enumerate(results):
        mine = [entry(part)["velocity"] for part in saved[rank::new]]
        found = entry(sd)["velocity"]
        assert bool(found) == bool(mine)
        for name, second in found.items():
            torch.testing.assert_close(second, sum(part[name] for part in mine) / len(mine))
    # A rank that comes without any starts from each parameter's mean square, and all go on together.
    means = [m for m, _ in pool(new).run(trained, memory, range(5, 8), saved)]
    assert all(m.isfinite().all() for step in means[0] for m in step)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (MomentumCorrection(0.5), AdamCorrection()),
        (AdamCorrection(), MomentumCorrection(0.5)),
        (AdamCorrection(), None),
    ],
    ids=["momentum to Adam", "Adam to momentum", "Adam to none"],
)
def test_another_memorys_velocities_are_dropped_and_the_log_says_so(was: Any, now: Any) -> None:
    saved = [sd for _, sd in pool(2).run(trained, was, range(4))]
    assert all(entry(sd)["velocity"] for sd in saved)
    for rank, (lines, sd) in enumerate(pool(2).run(logged, now, saved)):
        assert not entry(sd)["velocity"]
        assert any(type(was).__name__ in line for line in lines)
        for name, owed in entry(sd)["residuals"].items():
            assert torch.equal(owed, entry(saved[rank])["residuals"][name])
