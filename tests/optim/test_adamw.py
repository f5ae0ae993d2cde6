"""AdamW whose second moment is fed by dense means only: torch's own where all are, and what bursts do to both."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparcomm
from sparcomm import ConfigError, Refresh, SparDL
from sparcomm.optim import AdamW
from support.modes import assert_replicas, loss_of, net
from support.pool import pool
from support.training import wrap

TIMEOUT = 30.0


class Told:
    """Says of every step what it was told, in place of a hook."""

    def __init__(self) -> None:
        self.dense = True

    def was_dense(self, parameter: Tensor) -> bool:
        return self.dense


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)


def feed(module: nn.Module, step: int, skip: int | None = None) -> None:
    made = torch.Generator().manual_seed(step)
    for at, p in enumerate(module.parameters()):
        p.grad = None if at == skip else torch.randn(p.shape, generator=made).to(p.dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    params = list(module.parameters())
    return [{"params": params[:2], "weight_decay": 0.2, "lr": 0.05}, {"params": params[2:], "betas": (0.5, 0.9)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hook", [None, Told()])
def test_it_is_torchs_adamw_where_every_step_is_dense(hook: Told | None, dtype: torch.dtype) -> None:
    ours, theirs = make(dtype), make(dtype)
    pair = [
        (ours, AdamW(groups(ours), lr=0.01, eps=1e-6, hook=hook)),
        (theirs, torch.optim.AdamW(groups(theirs), lr=0.01, eps=1e-6)),
    ]
    for step in range(20):
        for module, optimizer in pair:
            feed(module, step, skip=2 if step % 3 else None)  # a parameter that is used now and then only
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def moved(make_optimizer: Callable[[Tensor, Told], torch.optim.Optimizer], period: int, steps: int = 2000) -> float:
    """How far a steady unit gradient, delivered once in ``period`` steps after a warm-up, moves a weight."""
    p, told = torch.nn.Parameter(torch.zeros(3)), Told()
    optimizer = make_optimizer(p, told)
    for _ in range(100):
        p.grad = torch.ones(3)
        optimizer.step()
    start, told.dense = p.detach().clone(), False
    for step in range(steps):
        p.grad = torch.full((3,), float(period) if step % period == period - 1 else 0.0)
        optimizer.step()
    return float((start - p.detach()).mean()) / (steps * 1e-3)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_burst_moves_a_weight_by_its_full_size(beta2: float) -> None:
    ours = moved(lambda p, told: AdamW([p], lr=1e-3, betas=(0.9, beta2), weight_decay=0.0, hook=told), 100)
    assert ours == pytest.approx(1.0, abs=0.1)
    theirs = moved(lambda p, _: torch.optim.AdamW([p], lr=1e-3, betas=(0.9, beta2), weight_decay=0.0), 100)
    assert theirs < 0.2


def test_an_entry_that_was_idle_in_dense_steps_does_not_leap() -> None:
    p, told = torch.nn.Parameter(torch.zeros(2)), Told()
    optimizer = AdamW([p], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, hook=told, floor=0.01)
    p.grad = torch.tensor([2.0, 0.0])
    optimizer.step()
    before, told.dense = p.detach().clone(), False
    p.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    # Mean second moment 2, its hundredth 0.02: what divides is sqrt(0.02).
    assert before[1] - p.detach()[1] == pytest.approx(1 / math.sqrt(0.02), rel=1e-4)


def test_without_any_dense_step_it_says_what_is_missing() -> None:
    module, told = make(), Told()
    told.dense = False
    optimizer = AdamW(module.parameters(), hook=told)
    feed(module, 0)
    with pytest.raises(ConfigError, match=r"no dense step.*Refresh"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"), ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"), ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1.0}, "eps=-1.0"), ({"weight_decay": math.inf}, "weight_decay=inf"), ({"floor": -1.0}, "floor=-1.0"),
    ],
)  # fmt: skip
def test_values_outside_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdamW(make().parameters(), **settings)


def test_a_sparse_layout_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(ConfigError, match="sparse layout"):
        AdamW([p]).step()


def test_closure_and_deep_copy() -> None:
    module = make()
    optimizer = AdamW(module.parameters(), hook=Told())

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        feed(module, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    assert copy.deepcopy(optimizer).param_groups[0]["betas"] == (0.9, 0.999)


def test_state_goes_on_where_it_was_saved() -> None:
    told = Told()
    module = make()
    optimizer = AdamW(module.parameters(), lr=0.01, hook=told)

    def steps(module: nn.Module, optimizer: AdamW, numbers: range) -> None:
        for step in numbers:
            told.dense = step % 4 == 0
            feed(module, step)
            optimizer.step()

    steps(module, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make()
    again.load_state_dict(saved["model"])
    resumed = AdamW(again.parameters(), lr=0.5, hook=told)
    resumed.load_state_dict(saved["optimizer"])
    steps(module, optimizer, range(6, 12))
    steps(again, resumed, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("schedule", "dense"),
    [
        (Refresh(3, every=0), [0, 1, 2]),
        (Refresh(0, every=4), [3, 7, 11, 15, 19, 23, 27]),
        (Refresh(2, every=5), [0, 1, 6, 11, 16, 21, 26]),
        (Refresh(1, every=2, growth=2.0), [0, 2, 6, 14]),
        (Refresh(0, every=1), list(range(30))),
    ],
    ids=repr,
)
def test_refresh_is_dense_in_these_steps(schedule: Refresh, dense: list[int]) -> None:
    assert [step for step in range(30) if schedule.at(step, 0.01) is None] == dense
    assert {schedule.at(step, 0.01) for step in range(30)} <= {None, 0.01}


@pytest.mark.parametrize("settings", [{"warmup": -1}, {"warmup": 1, "every": -1}, {"warmup": 1, "growth": 0.5},
                                      {"warmup": True}, {"warmup": 1, "growth": math.inf}])  # fmt: skip
def test_refresh_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Refresh(**settings)


def in_ddp(rank: int, size: int) -> tuple[float, float]:
    torch.manual_seed(0)
    ddp = wrap(net())
    optimizer = AdamW(ddp.parameters(), lr=3e-3)
    options: dict[str, Any] = {"warmup": Refresh(20, every=10), "optimizer": optimizer, "timeout": TIMEOUT}
    optimizer.hook = state = sparcomm.attach(ddp, SparDL(density=0.02), **options)
    before = float(loss_of(ddp.module).detach())
    seen: list[bool] = []
    for step in range(80):
        optimizer.zero_grad()
        loss_of(ddp, rank=rank, step=step).backward()
        seen.append(state.was_dense(next(ddp.parameters())))
        optimizer.step()
    assert seen == [step < 20 or step % 10 == 9 for step in range(80)]
    assert_replicas(ddp.parameters())
    state.close()
    return before, float(loss_of(ddp.module).detach())


def test_with_the_hook_the_second_moment_learns_in_dense_steps() -> None:
    for before, after in pool(2).run(in_ddp):
        assert after < 0.5 * before
