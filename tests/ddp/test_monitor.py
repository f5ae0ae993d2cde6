"""Looks at compression: figures against an independent computation, limits, ages, and what must not count."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparcomm
from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.base import Reduced
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.spardl import SparDL
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.ddp.log import get_logger
from sparcomm.ddp.monitor import SAMPLE, Check, Monitor, _Sample
from sparcomm.ddp.units import Carried, Partition, Unit
from sparcomm.errors import ConfigError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.pool import pool
from support.training import SIZES as FED
from support.training import Fed, Halves, gradient_step, integers, wrap

CPU = torch.device("cpu")
SIZES = (3000, 700, 1)
GOOD, BAD = torch.tensor(True), torch.tensor(False)


@dataclass
class Seen:
    """What one unit went through in one step on one rank."""

    grad: Tensor
    before: Tensor
    after: Tensor
    total: Tensor
    sent: Tensor


class Loop:
    """Units by hand: what the hook's steps do around a monitor."""

    def __init__(
        self, transport: Transport, algorithm: Algorithm, check: Check, sizes: tuple[int, ...] = SIZES
    ) -> None:
        self.transport, self.algorithm = transport, algorithm
        self.monitor = Monitor(check, transport, get_logger(transport.rank, transport.size))
        self.partition = Partition(final=True)
        for n in sizes:
            p = torch.empty(n)
            self.partition.add([p], p.dtype, CPU, algorithm, transport.size, Carried(), wants_sent=True)
            self.partition.units[-1].state.wants_total = True

    def step(self, number: int, scale: float = 1.0, good: Tensor = GOOD, joined: bool = False) -> list[Seen]:
        """One step of random gradients; a step that wants to deliver all residuals does."""
        units = self.partition.units
        flush = self.monitor.wants_flush(number)
        self.monitor.begin(number, [] if flush else units)
        made = torch.Generator().manual_seed(1000 * number + self.transport.rank)
        seen, pending = [], []
        for unit in units:
            grad = torch.randn(unit.numel, generator=made) * scale * (not joined)
            owed = None if joined else unit.residual
            reduced = self.reduce(unit, grad, owed, number, flush, joined)
            pending.append((unit, reduced))
            before = torch.zeros(unit.numel) if owed is None else owed
            after = torch.zeros(unit.numel) if reduced.residual is None else reduced.residual
            sent = torch.zeros(unit.numel, dtype=torch.bool)
            sent[slice(None) if reduced.sent is None else reduced.sent] = True
            seen.append(Seen(grad, before, after.clone(), reduced.total.clone(), sent))
        if good:
            for unit, reduced in pending:
                if not joined:
                    unit.residual, unit.state = reduced.residual, reduced.state
        self.monitor.commit(good)
        return seen

    def reduce(self, unit: Unit, grad: Tensor, owed: Tensor | None, number: int, flush: bool, joined: bool) -> Reduced:
        if flush:
            return Dense().reduce(grad, owed, unit.state, number, self.transport)
        self.monitor.before(unit, grad, owed, joined=joined)
        reduced = self.algorithm.reduce(grad, owed, unit.state, number, self.transport)
        mean = reduced.total / self.transport.size
        grad_then = grad.clone()
        grad.copy_(mean)  # as DDP's bucket is: the monitor must not need it any more
        self.monitor.after(unit, self.algorithm, grad, reduced.residual)
        grad.copy_(grad_then)
        return reduced


def figures(seen: list[Seen], history: list[list[list[Seen]]], unit: int, kept: int) -> dict[str, Any]:
    """Of one unit, from the definitions, in float64: ``seen`` by rank, ``history[rank][step][unit]`` up to it."""
    dense = sum(s.grad.double() for s in seen)
    offered = sum(s.grad.double() + s.before.double() for s in seen)
    total = seen[0].total.double()
    best = offered.square().sort(descending=True).values[:kept].sum()
    captured = offered.square().sum() - (offered - total).square().sum()
    ratios = [float(s.after.double().norm() / s.grad.double().norm()) for s in seen]
    ages: list[int] = []
    for steps in history:
        age = torch.zeros(steps[0][unit].grad.numel(), dtype=torch.int64)
        for step in steps:
            age = torch.where(step[unit].sent, 0, age + 1)
        ages += [a for a in age.tolist() if a]
    ages.sort()
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(total, dense, dim=0)),
        "energy": float(captured / best),
        "captured": float(captured / offered.square().sum()),
        "residual_ratio": sum(ratios) / len(ratios),
        "residual_ratio_max": max(ratios),
        "age_median": ages[math.ceil(len(ages) / 2) - 1],
        "age_p90": ages[math.ceil(len(ages) * 0.9) - 1],
        "age_max": ages[-1],
    }


def watched(transport: Transport, algorithm: Algorithm, steps: int) -> tuple[list[list[Seen]], list[dict[str, Any]]]:
    loop = Loop(transport, algorithm, Check(every=2), SIZES[:2])
    history, reports = [], []
    for number in range(steps):
        history.append(loop.step(number))
        reports.append(loop.monitor.report())
    return history, reports


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "algorithm",
    [SparDL(density=0.05), SparDL(density=0.1, values="bfloat16", schedule="direct"), TopKAllGather(density=0.02)],
    ids=repr,
)
def test_figures_are_those_of_the_definitions_and_the_same_on_all_ranks(algorithm: Algorithm, size: int) -> None:
    results = sim.run(size, lambda t: watched(t, algorithm, 7)).results
    history = [h for h, _ in results]
    assert all(reports == results[0][1] for _, reports in results)
    looks = results[0][1]
    assert looks[0]["looks"] == looks[1]["looks"] == 0
    assert set(looks[1]) == {"looks", "flushes", "bytes_sent"}
    for step, unit in ((2, 0), (4, 1), (6, 0)):  # every second step, the units in turn
        assert (looks[step]["step"], looks[step]["unit"], looks[step]["looks"]) == (step, unit, step // 2)
        kept = algorithm.kept(SIZES[unit], size)
        want = figures([h[step][unit] for h in history], [h[: step + 1] for h in history], unit, kept)
        got = {name: looks[step][name] for name in want}
        assert got == pytest.approx(want, rel=1e-5), (step, unit)
        assert 0 < got["captured"] < got["energy"] <= 1 + 1e-6


def test_sending_everything_is_perfect() -> None:
    def rank(transport: Transport) -> dict[str, Any]:
        loop = Loop(transport, Dense(), Check(every=1), (500,))
        for number in range(3):
            loop.step(number)
        return loop.monitor.report()

    report = sim.run(3, rank).results[0]
    assert [report[k] for k in ("cosine", "energy", "captured")] == pytest.approx([1, 1, 1], abs=1e-6)
    assert all(report[k] == 0 for k in ("residual_ratio", "age_median", "age_p90", "age_max"))


def test_what_is_sent_every_other_step_is_one_step_old() -> None:
    def rank(transport: Transport) -> list[list[int]]:
        loop, found = Loop(transport, Halves(), Check(every=1), (601,)), []
        for number in range(6):
            loop.step(number)
            report = loop.monitor.report()
            found.append([report.get(k, -1) for k in ("age_median", "age_p90", "age_max")])
        return found

    # Halves sends one half of the positions in each step.
    assert sim.run(2, rank).results[0][1:] == [[1, 1, 1]] * 5


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_bytes_of_looks_are_counted_and_told(size: int) -> None:
    def rank(transport: Transport, check: Check) -> tuple[int, int]:
        loop = Loop(transport, TopKAllGather(density=0.01), check, (6000,))
        for number in range(5):
            loop.step(number)
        return transport.traffic.bytes_sent, loop.monitor.report()["bytes_sent"]

    looked = sim.run(size, lambda t: rank(t, Check(every=2))).results
    never = sim.run(size, lambda t: rank(t, Check(every=100))).results
    others, chunk = size - 1, -(-6000 // size)
    dense = 2 * others * chunk * 4  # ours: all_to_all and all_gather of p chunks
    figures = others * (8 * 8 + 4 * SAMPLE)  # eight float64 and the ages, gathered
    for (sent, told), (plain, nothing) in zip(looked, never, strict=True):
        assert nothing == 0
        assert told == sent - plain == 2 * (2 * dense + figures)  # two looks


# ---- limits ----------------------------------------------------------------------------------------------------------

CROSSED = [
    (Check(every=3, max_age=2), "age 4 is above 2"),  # at step 3, nine in ten have waited since step 0
    (Check(every=3, max_residual_ratio=0.5), "residual ratio"),
    (Check(every=3, min_energy=1.0), "energy"),
    (Check(every=3, min_cosine=0.99), "cosine"),
]


def flushed(transport: Transport, check: Check, bad: int, steps: int = 6) -> tuple[list[bool], list[float], int]:
    """Whether each step wanted to deliver all; the norms owed after each; how often that happened."""
    loop, wanted, owed = Loop(transport, SparDL(density=0.02), check, (2000,)), [], []
    for number in range(steps):
        wanted.append(loop.monitor.wants_flush(number))
        loop.step(number, good=BAD if number == bad else GOOD)
        residual = loop.partition.units[0].residual
        owed.append(0.0 if residual is None else float(residual.norm()))
    return wanted, owed, loop.monitor.report()["flushes"]


@pytest.mark.parametrize(("check", "text"), CROSSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_crossed_limit_delivers_everything_in_the_next_step_and_is_said_once(
    check: Check, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "sparcomm"):
        results = sim.run(3, lambda t: flushed(t, check, bad=-1)).results
    for wanted, owed, flushes in results:
        assert wanted == [False, False, False, False, True, False]
        assert flushes == 1
        assert owed[4] == 0.0
        assert all(norm > 0 for step, norm in enumerate(owed) if step != 4)
    said = [r for r in caplog.records if "delivers all residuals" in r.getMessage()]
    assert sorted(r.rank for r in said) == [0, 1, 2]
    assert [r.rank for r in said if r.levelno == logging.WARNING] == [0]
    assert all("step 3, unit 0: " in r.getMessage() and text in r.getMessage() for r in said)


def test_a_flush_that_was_dropped_is_wanted_again() -> None:
    check = Check(every=3, max_residual_ratio=0.5)
    for wanted, owed, flushes in sim.run(2, lambda t: flushed(t, check, bad=4)).results:
        assert wanted == [False, False, False, False, True, True]
        assert owed[4] == owed[3] > 0 == owed[5]
        assert flushes == 1


def test_limits_that_are_kept_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check = Check(every=1, max_age=100, max_residual_ratio=100.0, min_energy=0.01, min_cosine=-1.0)
    with caplog.at_level(logging.DEBUG, "sparcomm"):
        for wanted, _, flushes in sim.run(2, lambda t: flushed(t, check, bad=-1)).results:
            assert not any(wanted)
            assert flushes == 0
    assert not [r for r in caplog.records if "residuals" in r.getMessage()]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "whole number"),
        ({"every": None}, "every=None"),
        ({"every": True}, "every=True"),
        ({"max_age": 0}, "max_age=0"),
        ({"max_residual_ratio": 0.0}, "max_residual_ratio=0.0"),
        ({"max_residual_ratio": math.nan}, "above 0"),
        ({"max_residual_ratio": "2"}, "max_residual_ratio='2'"),
        ({"min_energy": 1.5}, "at most 1"),
        ({"min_energy": 0}, "above 0"),
        ({"min_cosine": -1.1}, "from -1"),
        ({"min_cosine": True}, "min_cosine=True"),
    ],
)
def test_a_wrong_check_is_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"^Check\(") as caught:
        Check(**kwargs)
    assert text in str(caught.value)


# ---- what must not count ---------------------------------------------------------------------------------------------


def ages_after_a_drop(transport: Transport) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports of the last step, where step 3 was dropped on the one hand, and never happened on the other."""
    reports = []
    for drop in (True, False):
        loop = Loop(transport, Halves(), Check(every=4), (400,))
        for number in range(5):
            if number != 3:
                loop.step(number)
            elif drop:
                loop.step(number, good=BAD)
        reports.append(loop.monitor.report())
    return reports[0], reports[1]


def test_a_dropped_step_sends_nothing() -> None:
    for dropped, never in sim.run(2, ages_after_a_drop).results:
        assert dropped["age_max"] == never["age_max"] == 3  # the odd ones: sent in step 1, looked at in step 4
        for name in ("cosine", "energy", "residual_ratio"):
            assert dropped[name] == never[name]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_look_at_something_not_finite_or_at_zeros_is_none(bad: float) -> None:
    def rank(transport: Transport) -> list[dict[str, Any]]:
        loop = Loop(transport, TopKAllGather(density=0.05), Check(every=1, min_energy=0.1), (100,))
        reports = []
        for number, scale in enumerate((1.0, 1.0, bad, 1.0)):
            loop.step(number, scale, good=torch.tensor(math.isfinite(scale)))
            reports.append(loop.monitor.report())
        return reports

    reports = sim.run(2, rank).results[0]
    assert [r["looks"] for r in reports] == [0, 1, 1, 2]
    assert {**reports[2], "bytes_sent": 0} == {**reports[1], "bytes_sent": 0}
    assert reports[3]["flushes"] == 0


def joined(transport: Transport) -> list[dict[str, Any]]:
    loop = Loop(transport, TopKAllGather(density=0.05), Check(every=1), (400,))
    reports = []
    for number in range(6):
        loop.step(number, joined=transport.rank == 1 and number >= 3)
        reports.append(loop.monitor.report())
    return reports


def test_a_joined_rank_takes_part_with_zeros_and_has_no_ages() -> None:
    results = sim.run(2, joined).results
    assert results[0] == results[1]
    alone = results[0][5]
    assert alone["looks"] == 5
    assert alone["residual_ratio"] == alone["residual_ratio_max"] > 0  # of the rank that still has gradients
    assert 0 < alone["age_max"] <= 6


def test_no_look_in_step_0_nor_without_compressed_units_and_empty_units_are_passed_over() -> None:
    def rank(transport: Transport) -> list[int | None]:
        loop = Loop(transport, TopKAllGather(density=0.5), Check(every=1), (0, 10, 20))
        units = loop.partition.units
        chosen = [loop.monitor.begin(step, units) for step in range(5)] + [loop.monitor.begin(5, [])]
        loop.monitor.before(units[0], torch.empty(0), None)
        loop.monitor.after(units[0], loop.algorithm, torch.empty(0), None)
        return [None if unit is None else unit.number for unit in chosen]

    assert sim.run(1, rank).results == [[None, 1, 2, 1, 2, None]]


def test_units_that_are_made_again_start_with_new_ages() -> None:
    def rank(transport: Transport) -> tuple[int, int]:
        loop = Loop(transport, TopKAllGather(density=0.01), Check(every=1), (300,))
        for number in range(6):
            loop.step(number)
        old = loop.monitor.report()["age_max"]
        fresh = Loop(transport, loop.algorithm, Check(every=1), (300,)).partition
        fresh.units[0].residual = loop.partition.units[0].residual
        loop.partition = fresh
        loop.step(6)
        return old, loop.monitor.report()["age_max"]

    assert sim.run(2, rank).results == [(6, 1)] * 2


@given(n=st.integers(1, 30_000), number=st.integers(0, 50))
def test_the_sample_is_fair_and_fixed(n: int, number: int) -> None:
    p = torch.empty(n)
    partition = Partition(final=True)
    unit = partition.add([p], p.dtype, CPU, Dense(), 2, Carried())
    unit.number = number
    index = _Sample(unit, 0).index
    assert torch.equal(index, _Sample(unit, 9).index)
    assert index.numel() == min(n, SAMPLE)
    assert int(index[0]) >= 0
    assert int(index[-1]) < n
    gaps = index.diff()
    assert n == 1 or 1 <= int(gaps.min()) <= int(gaps.max()) < 2 * (n / min(n, SAMPLE) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_the_loss_scale(dtype: torch.dtype) -> None:
    def rank(transport: Transport) -> tuple[dict[str, Any], dict[str, Any]]:
        found = []
        for scale in (None, torch.tensor(1024.0)):
            monitor = Monitor(Check(every=1), transport, get_logger(transport.rank, transport.size))
            p, partition = torch.empty(512, dtype=dtype), Partition(final=True)
            unit = partition.add([p], dtype, CPU, SparDL(density=0.1), transport.size, Carried())
            unit.state.wants_total = True
            made = torch.Generator().manual_seed(transport.rank)
            grad = torch.randn(512, generator=made).to(dtype)
            monitor.begin(1, [unit])
            monitor.before(unit, grad, None)
            reduced = SparDL(density=0.1).reduce(grad, None, unit.state, 1, transport)
            mean = (reduced.total / transport.size * (1 if scale is None else scale)).to(dtype)
            monitor.after(unit, SparDL(density=0.1), mean, reduced.residual, scale)
            monitor.commit(GOOD)
            found.append(monitor.report())
        return found[0], found[1]

    for plain, scaled in sim.run(2, rank).results:
        assert plain["looks"] == scaled["looks"] == 1
        assert 0.1 < plain["energy"] <= 1.001
        assert scaled == pytest.approx(plain, rel=1e-3)


# ---- in real training ------------------------------------------------------------------------------------------------


def trained(rank: int, size: int, check: Check, steps: int) -> list[dict[str, Any]]:
    """By step: gradients, means, residuals before and after by parameter, and the statistics."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.05), check=check, timeout=30)
    names = [f"p.{i}" for i in range(len(FED))]

    def owed() -> dict[str, Tensor]:
        engine = state._engine
        assert engine is not None
        engine.drain()
        held = engine.committed().residual
        by_name = zip(names, ddp.parameters(), strict=True)
        return {name: held.get(id(p), torch.zeros(p.numel())).clone() for name, p in by_name}

    found, before = [], {name: torch.zeros(n) for name, n in zip(names, FED, strict=True)}
    for step in range(steps):
        grads = integers(FED, rank, step)
        means = gradient_step(ddp, grads)
        after = owed()
        found.append(
            {
                "grad": dict(zip(names, grads, strict=True)),
                "mean": dict(zip(names, means, strict=True)),
                "before": before,
                "after": after,
                "stats": state.stats(),
            }
        )
        before = after
    state.close()
    return found


def test_looks_in_real_training_are_right() -> None:
    size = 2
    results = pool(size).run(trained, Check(every=2), 9)
    looked = set()
    for step in (2, 4, 6, 8):
        report = results[0][step]["stats"]["check"]
        assert all(r[step]["stats"]["check"] == report for r in results)
        assert report["step"] == step
        looked.add(report["unit"])
        unit = results[0][step]["stats"]["per_unit"][report["unit"]]

        def flat(rank: int, what: str, step: int = step, names: tuple[str, ...] = tuple(unit["names"])) -> Tensor:
            return torch.cat([results[rank][step][what][name] for name in names])

        seen = [
            Seen(flat(r, "grad"), flat(r, "before"), flat(r, "after"), size * flat(r, "mean"), torch.empty(0))
            for r in range(size)
        ]
        now = [[[Seen(s.grad, s.before, s.after, s.total, s.after == 0)]] for s in seen]  # ages are tested elsewhere
        want = figures(seen, now, 0, unit["kept"])
        for name in ("cosine", "energy", "captured", "residual_ratio", "residual_ratio_max"):
            assert report[name] == pytest.approx(want[name], rel=1e-5), (step, name)
        assert 1 <= report["age_median"] <= report["age_p90"] <= report["age_max"] <= step + 1
    assert looked == set(range(len(results[0][8]["stats"]["per_unit"])))
    assert results[0][8]["stats"]["check"]["bytes_sent"] > 0


def test_a_limit_makes_the_next_real_step_deliver_all_residuals() -> None:
    results = pool(2).run(trained, Check(every=3, max_residual_ratio=0.01), 6)
    for found in results:
        for step in (3, 4, 5):
            exact = {
                n: sum(r[step]["grad"][n] + r[step]["before"][n] for r in results) / 2 for n in found[step]["mean"]
            }
            delivered = all(torch.equal(found[step]["mean"][name], exact[name]) for name in exact)
            assert delivered == (step == 4)
            assert (found[step]["stats"]["residual_norm"] == 0) == (step == 4)
        assert [found[step]["stats"]["check"]["flushes"] for step in (3, 4, 5)] == [0, 1, 1]
