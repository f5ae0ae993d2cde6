"""Loss scaling: residuals are kept without the scale, and an overflow anywhere skips the step everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import Dense, SparDL
from sparcomm.algorithms import Algorithm
from support.modes import assert_replicas, debts, flat, loss_of, net, owed, sgd
from support.pool import pool
from support.training import SIZES, Fed, Halves, integers, wrap

TIMEOUT = 30.0


def grad_scaler(scale: float = 1024.0, every: int = 2000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=every)


def fed_step(ddp: torch.nn.Module, scaler: torch.amp.GradScaler | None, gradients: list[Tensor]) -> list[Tensor]:
    """The means that ``.grad`` holds after one step, scale and all."""
    ddp.zero_grad()
    loss = ddp(gradients)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return [p.grad.detach().clone() for p in ddp.parameters()]


def over_scales(rank: int, size: int, algorithm: Algorithm, dtypes: list[torch.dtype]) -> None:
    """Scales are powers of 2, so whatever carries the right one has the same bits as without any."""
    plain, scaled = wrap(Fed(dtypes=dtypes)), wrap(Fed(dtypes=dtypes))
    scaler = grad_scaler()
    states = [
        sparcomm.attach(plain, algorithm, timeout=TIMEOUT),
        sparcomm.attach(scaled, algorithm, timeout=TIMEOUT, scaler=scaler),
    ]
    for step, scale in enumerate((1024.0, 1024.0, 1.0, 2.0**12, 2.0**-6, 2.0**-6)):
        scaler.update(scale) if step else None
        gradients = integers(SIZES, rank, step)
        means = fed_step(plain, None, gradients)
        for a, b in zip(means, fed_step(scaled, scaler, gradients), strict=True):
            assert torch.equal(a * scale, b), (step, scale)
        left = [debts(state, SIZES) for state in states]
        assert all(torch.equal(a, b) for a, b in zip(*left, strict=True)), (step, scale)
    assert any(d.any() for d in left[0]) == (getattr(algorithm, "density", 0) < 1)
    assert_replicas(p.grad for p in scaled.parameters())
    for state in states:
        state.close()


MIXED = [torch.float32, torch.bfloat16, torch.float64, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtypes", [[torch.float32] * len(SIZES), MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.05), SparDL(density=1.0)], ids=lambda a: a.name)
def test_what_is_owed_does_not_depend_on_the_scale(algorithm: Algorithm, dtypes: list[torch.dtype]) -> None:
    pool(2).run(over_scales, algorithm, dtypes)


def overflow(rank: int, size: int, where: tuple[int, int], value: float, step_of: int) -> None:
    """One entry of one rank's gradient in one bucket is not finite."""
    ddp = wrap(Fed())
    scaler = grad_scaler(64.0, every=2)
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT, scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    scales = []
    for step in range(6):
        gradients = integers(SIZES, rank, step)
        if step == step_of and rank == where[0]:
            gradients[where[1]][-1] = value
        residuals, seen = debts(state, SIZES), owed(state, "per_element").get("seen", {})
        weights = flat(ddp)
        fed_step(ddp, scaler, gradients)
        scaler.step(optimizer)
        found = sum(float(v) for v in scaler._found_inf_per_device(optimizer).values())
        scaler.update()
        scales.append(scaler.get_scale())
        if step == step_of:
            assert found > 0
            assert torch.equal(weights, flat(ddp))
            assert all(torch.equal(a, b) for a, b in zip(residuals, debts(state, SIZES), strict=True))
            after = owed(state, "per_element")["seen"]
            assert not any(t.any() for t in after.values()) or seen.keys() == after.keys()
            assert all(torch.equal(t, after[name]) for name, t in seen.items())
        else:
            assert found == 0
            assert not torch.equal(weights, flat(ddp))
    assert scales[step_of] == (scales[step_of - 1] if step_of else 64.0) / 2
    assert scales[-1] > scales[step_of], "it must grow again"
    assert state.stats()["skipped"] == 1
    assert_replicas(ddp.parameters())
    assert_replicas([torch.tensor(scales)])
    state.close()


@pytest.mark.parametrize(
    ("where", "value"), [((0, 0), torch.inf), ((2, 3), -torch.inf), ((1, len(SIZES) - 1), torch.nan)], ids=str
)
@pytest.mark.parametrize("step_of", [0, 1, 3])
def test_an_overflow_anywhere_skips_the_step_everywhere(where: tuple[int, int], value: float, step_of: int) -> None:
    pool(3).run(overflow, where, value, step_of)


def trained(ddp: torch.nn.Module, rank: int, steps: int, scaler: torch.amp.GradScaler, cast: Any) -> int:
    """Steps skipped. At step 4, rank 1's loss is not finite."""
    optimizer, skipped = sgd(ddp), 0
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
            loss = loss_of(ddp, rank=rank, step=step)
        if step == 4 and rank == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    return skipped


def with_scaler(rank: int, size: int) -> None:
    """Scaled training in float16 autocast: at density 1 as plain DDP's, at 1 % nearly as good."""
    for density, steps in ((1.0, 9), (0.01, 80)):
        plain, ours = wrap(net(), bucket_cap_mb=0.01), wrap(net(), bucket_cap_mb=0.01)
        scalers = [grad_scaler(2.0**13, every=5) for _ in range(2)]
        state = sparcomm.attach(ours, SparDL(density=density), timeout=TIMEOUT, scaler=scalers[1])
        start = float(loss_of(plain.module).detach())
        skipped = [trained(d, rank, steps, s, torch.float16) for d, s in zip((plain, ours), scalers, strict=True)]
        assert skipped[1] == state.stats()["skipped"] >= 1
        assert_replicas(ours.parameters())
        assert_replicas([torch.tensor(scalers[1].get_scale())])
        if density == 1:
            assert skipped[0] == skipped[1]
            assert scalers[0].get_scale() == scalers[1].get_scale()
            assert torch.allclose(flat(plain), flat(ours), atol=1e-3)  # float16 activations
        else:
            dense, sparse = (float(loss_of(d.module).detach()) for d in (plain, ours))
            assert start - sparse > 0.9 * (start - dense)
        state.close()


@pytest.mark.slow
def test_training_in_half_precision_with_a_growing_scale() -> None:
    pool(2).run(with_scaler)


def disabled(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT, scaler=scaler)
    for step in range(2):
        means = fed_step(ddp, scaler, integers(SIZES, rank, step))
        assert torch.equal(means[0], sum(integers(SIZES, r, step)[0] for r in range(size)) / size)
    state.close()
    with pytest.raises(sparcomm.ConfigError, match=r"scaler=float: must be a torch\.amp\.GradScaler"):
        sparcomm.attach(wrap(Fed()), Dense(), timeout=TIMEOUT, scaler=1024.0)


def test_a_disabled_scaler_is_none() -> None:
    pool(2).run(disabled)
