"""Steps and parameters that travel dense: warm-up, skipped parameters, switching off, and the flush."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparcomm
from sparcomm import ConfigError, DensityWarmup, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm, Reduced, State
from sparcomm.ddp.auto_off import STEPS, Trial
from sparcomm.ddp.log import RankLogger
from sparcomm.transport.base import Transport
from support.modes import assert_replicas, debts, flat, loss_of, net, over_ranks, simply
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, wrap

TIMEOUT = 30.0


def dense_mean(size: int, step: int, i: int) -> Tensor:
    return sum(integers(SIZES, r, step)[i] for r in range(size)) / size


def every_third(step: int) -> float | None:
    """Dense now and then; denser at first."""
    return None if step % 3 == 2 else 0.5 if step < 3 else 0.05


SCHEDULES: dict[str, tuple[Any, Callable[[int], float | None]]] = {
    "three dense": (3, lambda step: None if step < 3 else 0.05),
    "exponential": (DensityWarmup(6, start=0.4, stages=2), lambda step: (0.4, 0.141421, 0.05)[min(step // 3, 2)]),
    "callable": (every_third, every_third),
}


def warmed_up(rank: int, size: int, name: str, algorithm: Algorithm) -> None:
    warmup, density = SCHEDULES[name]
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, warmup=warmup)
    fed, means = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(2))
    for step in range(9):
        before = debts(state, SIZES)
        gradients = integers(SIZES, rank, step)
        delivered = gradient_step(ddp, gradients)
        for i, mean in enumerate(delivered):
            fed[i] += gradients[i]
            means[i] += mean
        entries = sum(int((m != 0).sum()) for m in delivered)
        want = density(step)
        if want is None:
            assert all(torch.equal(m, dense_mean(size, step, i)) for i, m in enumerate(delivered))
            assert all(torch.equal(a, b) for a, b in zip(before, debts(state, SIZES), strict=True))
            assert state.was_dense(ddp.module.p[0])
        elif want < 0.3:  # above it, dense bytes may be fewer
            assert entries <= size * want * sum(SIZES) + 4 * size * len(SIZES)
            assert entries > 0.3 * want * sum(SIZES)
            assert not state.was_dense(ddp.module.p[3])
    everything, owed = over_ranks(fed), over_ranks(debts(state, SIZES))
    for i in range(len(SIZES)):
        assert torch.equal(everything[i], size * means[i] + owed[i]), i
    assert_replicas(means)
    state.close()


@pytest.mark.parametrize("algorithm", [SparDL(density=0.05), TopKAllGather(density=0.05)], ids=lambda a: a.name)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_densities_keeps_the_sum(name: str, algorithm: Algorithm) -> None:
    pool(2).run(warmed_up, name, algorithm)


def rank_one_differs(step: int) -> float | None:
    return 0.1 if torch.distributed.get_rank() == 0 or step < 2 else 0.2


def fails_on_rank_one(step: int) -> float | None:
    if torch.distributed.get_rank() == 1 and step == 2:
        raise KeyError("no such step")
    return 0.1


def percent(step: int) -> float | None:
    return 10.0 if step == 2 else 0.1


def odd_callable(rank: int, size: int, rule: Callable[[int], float | None]) -> tuple[str, str]:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=5.0, warmup=rule)
    for step in range(2):
        gradient_step(ddp, integers(SIZES, rank, step))
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError") as caught:
        gradient_step(ddp, integers(SIZES, rank, 2))
    with pytest.raises((sparcomm.SparcommError, KeyError)) as original:
        state.raise_if_failed()
    state.close()
    return str(caught.value), type(original.value).__name__


@pytest.mark.parametrize(
    ("rule", "text", "kinds"),
    [
        (rank_one_differs, r"differs between ranks: \[0\.1, 0\.2\]", ["ConfigMismatch", "ConfigMismatch"]),
        (fails_on_rank_one, "no such step|failed on rank 1", ["ConfigMismatch", "KeyError"]),
        (percent, r"warmup\(2\) gave 10\.0: must be a density", ["ConfigError", "ConfigError"]),
    ],
    ids=["differs", "raises", "no density"],
)
def test_a_callable_that_goes_wrong_is_one_clear_error_on_all_ranks(
    rule: Callable[[int], float | None], text: str, kinds: list[str]
) -> None:
    results = pool(2).run(odd_callable, rule)
    assert all(re.search(text, t) for t, _ in results)
    # A rank may hear of the other's error before its own is on record.
    assert all(kind in (want, "RemoteError") for (_, kind), want in zip(results, kinds, strict=True))


@pytest.mark.parametrize("warmup", [-1, 1.5, True, "10"])
def test_a_warmup_is_a_number_of_steps_or_a_rule(warmup: object) -> None:
    with pytest.raises(ConfigError, match="warmup="):
        sparcomm.HookState(SparDL(density=0.1), warmup=warmup)  # type: ignore[arg-type]


class Named(nn.Module):
    """Layers whose parameters have telling names, with gradients to order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 20), nn.Linear(20, 30)
        self.norm = nn.LayerNorm(20)
        self.embed = nn.Embedding(40, 10)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * gradients[name]).sum() for name, p in self.named_parameters()]).sum()


NAMES = [name for name, _ in Named().named_parameters()]
RULES: dict[str, tuple[Any, set[str]]] = {
    "biases": ("biases", {"first.bias", "second.bias", "norm.bias"}),
    "norms": ("norms", {"norm.weight", "norm.bias"}),
    "pattern": ("*.weight", {"first.weight", "second.weight", "norm.weight", "embed.weight"}),
    "size": (400, set(NAMES) - {"first.weight", "second.weight", "embed.weight"}),
    "callable": (lambda name, p: p.dim() == 2 and name.startswith("e"), {"embed.weight"}),
    "several": (("norms", "first.*", 25), {"norm.weight", "norm.bias", "first.weight", "first.bias"}),
    "all": ("*", set(NAMES)),
}


def skipping(rank: int, size: int, name: str) -> None:
    rule, want = RULES[name]
    if name == "several":
        want = want | {"first.bias"}
    ddp = wrap(Named())
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT, skip=rule)
    shapes = {n: p.shape for n, p in ddp.module.named_parameters()}
    fed, means = ({n: torch.zeros(s) for n, s in shapes.items()} for _ in range(2))
    for step in range(4):
        made = [
            dict(zip(shapes, integers([s.numel() for s in shapes.values()], r, step), strict=True)) for r in range(size)
        ]
        made = [{n: t.view(shapes[n]) for n, t in m.items()} for m in made]
        ddp.zero_grad()
        ddp(made[rank]).backward()
        for n, p in ddp.module.named_parameters():
            exact = sum(m[n] for m in made) / size
            assert torch.equal(p.grad, exact) or n not in want, (n, step)
            fed[n] += made[rank][n]
            means[n] += p.grad
            if step or n in want:
                assert state.was_dense(p) == (n in want), (n, step)
    residuals = {n: s["residual_norm"] for n, s in state.stats()["per_parameter"].items()}
    assert {n for n, r in residuals.items() if r == 0} == want
    (entry,) = state.state_dict().values()
    left = entry["owed"][0]["residuals"]
    names = list(shapes)
    everything = over_ranks([fed[n] for n in names])
    owed = over_ranks([left.get(n, torch.zeros(shapes[n].numel())).view(shapes[n]) for n in names])
    for n, a, b in zip(names, everything, owed, strict=True):
        assert torch.equal(a, size * means[n].double() + b), n
    state.close()


@pytest.mark.parametrize("name", RULES)
def test_skipped_parameters_get_exactly_the_dense_mean(name: str) -> None:
    pool(2).run(skipping, name)


def badly_skipping(rank: int, size: int) -> None:
    for rule, text in (("*.wieght", "names no parameter"), (-1, "must be"), (True, "must be"), (0.5, "must be")):
        with pytest.raises(ConfigError, match=text):
            sparcomm.attach(wrap(Named()), Halves(), timeout=TIMEOUT, skip=rule)


def test_a_rule_that_names_nothing_is_an_error() -> None:
    pool(1).run(badly_skipping)


def flushed(rank: int, size: int, algorithm: Algorithm, kwargs: dict[str, Any], scale: float | None) -> None:
    ddp = wrap(Fed(), **kwargs)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, scaler=scaler)
    fed, means = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(2))
    for step in range(7):
        gradients = integers(SIZES, rank, step)
        ddp.zero_grad()
        loss = ddp(gradients)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step in (1, 4, 6):
            state.flush()
            assert all(not d.any() for d in debts(state, SIZES))
        if step == 4:
            state.flush()  # nothing is owed: nothing happens
        for i, p in enumerate(ddp.parameters()):
            fed[i] += gradients[i]
            means[i] += p.grad.double() / (scale or 1)
    everything = over_ranks(fed)
    assert all(torch.equal(a, size * b) for a, b in zip(everything, means, strict=True))
    assert_replicas(means)
    assert state.stats()["residual_norm"] == 0
    state.close()


@pytest.mark.parametrize(
    ("kwargs", "scale"),
    [({}, None), ({"gradient_as_bucket_view": True}, None), ({}, 64.0)],
    ids=["copied", "bucket view", "scaled"],
)
@pytest.mark.parametrize("algorithm", [Halves(), SparDL(density=0.05)], ids=lambda a: a.name)
def test_after_a_flush_nothing_is_owed_and_all_was_delivered(
    algorithm: Algorithm, kwargs: dict[str, Any], scale: float | None
) -> None:
    pool(2).run(flushed, algorithm, kwargs, scale)


def flushed_alone(rank: int, size: int) -> str:
    ddp = wrap(Fed())
    torch.distributed.barrier()
    state = sparcomm.attach(ddp, Halves(), timeout=3.0)
    for step in range(2):  # while DDP rebuilds its buckets, it would itself wait for the rank that has left
        gradient_step(ddp, integers(SIZES, rank, step))

    def go_on() -> None:
        if rank == 0:
            state.flush()
        gradient_step(ddp, integers(SIZES, rank, 2))

    with pytest.raises((sparcomm.SparcommError, RuntimeError)) as caught:
        go_on()
    state.close()
    return str(caught.value)


def test_a_flush_on_one_rank_only_is_an_error_on_all() -> None:
    texts = pool(2).run(flushed_alone)
    # Whoever gives up first names the other.
    assert "rank 1" in texts[0]
    assert "rank 0" in texts[1] or "ranks [0]" in texts[1]


@dataclass(frozen=True)
class Slow(TopKAllGather):
    """Takes its time, so that compression does not pay."""

    name: ClassVar[str] = "slow"

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass
        return super()._reduce(grad, residual, state, step, transport)


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def switched_off(rank: int, size: int) -> tuple[list[str], list[Any]]:
    """(what was said about it, verdicts). Gradients are integers that bfloat16 holds, so that all sums are exact."""
    listener = Listener()
    logging.getLogger("sparcomm").addHandler(listener)
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Slow(density=0.05), timeout=TIMEOUT, auto_off=True)
    fed, means = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(2))
    verdicts: list[Any] = []
    settled = 0
    for step in range(2 * STEPS + 12):
        gradients = integers(SIZES, rank, step)
        delivered = gradient_step(ddp, gradients)
        for i, mean in enumerate(delivered):
            fed[i] += gradients[i]
            means[i] += mean
        (entry,) = state.state_dict().values()
        verdicts.append(entry["about"][0]["decisions"].get("auto_off"))
        if verdicts[-1] == "dense":
            settled += 1
            assert not any(d.any() for d in debts(state, SIZES))
            if settled > 1:  # the first of them delivers what was owed, too
                assert all(torch.equal(m, dense_mean(size, step, i)) for i, m in enumerate(delivered))
    assert settled > 1
    assert state.stats()["auto_off"] == "dense"
    everything = over_ranks(fed)
    assert all(torch.equal(a, size * b) for a, b in zip(everything, means, strict=True))
    assert_replicas(means)
    # A fresh hook that loads this does not try again.
    again = sparcomm.attach(wrap(Fed()), Slow(density=0.05), timeout=TIMEOUT, auto_off=True)
    again.load_state_dict(state.state_dict())
    (entry,) = again.state_dict().values()
    assert entry["about"][0]["decisions"]["auto_off"] == "dense"
    state.close()
    again.close()
    logging.getLogger("sparcomm").removeHandler(listener)
    return [t for t in listener.texts if "does not pay" in t], verdicts


def test_compression_that_does_not_pay_is_switched_off_and_nothing_is_lost() -> None:
    results = pool(2).run(switched_off)
    assert [len(said) for said, _ in results] == [1, 0]
    assert results[0][1] == results[1][1]
    assert results[0][1][0] is None


@pytest.mark.parametrize("slow", ["sparse", "dense"])
def test_the_trial_takes_what_is_faster(slow: str) -> None:
    trial = Trial()
    steps = 0
    while trial.verdict is None:
        mode = trial.begin(steps, lambda mine: torch.tensor([mine]), RankLogger(0, 1))
        if trial.verdict is None:
            end = time.perf_counter() + (0.003 if mode == slow else 0)
            while time.perf_counter() < end:
                pass
        steps += 1
        assert steps < 100
    assert trial.verdict == ("dense" if slow == "sparse" else "sparse")
    assert steps >= 2 * STEPS


def honest(rank: int, size: int) -> tuple[str, float]:
    """On the loopback: whichever wins, it says so, replicas agree, and training goes on."""
    ddp = wrap(net(), bucket_cap_mb=1)
    start = float(loss_of(ddp.module).detach())
    state = sparcomm.attach(ddp, SparDL(density=0.01), timeout=TIMEOUT, auto_off=True)
    simply(ddp, rank, 60)
    verdict = state.stats()["auto_off"]
    state.close()
    assert_replicas([flat(ddp)])
    assert float(loss_of(ddp.module).detach()) < 0.2 * start
    return verdict, start


def test_auto_off_on_a_real_link_settles_on_all_ranks() -> None:
    results = pool(2).run(honest)
    assert results[0][0] == results[1][0]
    assert results[0][0] in ("sparse", "dense")
