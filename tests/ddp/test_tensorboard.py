"""Curves: written with a real SummaryWriter, and read back from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparcomm
from sparcomm import SparDL
from sparcomm.collectives.dense import dense_traffic
from sparcomm.ddp.tensorboard import Recorder, scalars, write
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, wrap

Curves = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Curves:
    """All curves in a folder of event files: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def recorded(rank: int, size: int, folder: str) -> tuple[list[dict[str, Any]], float]:
    """Two records of a real run; the statistics at those times."""
    from torch.utils.tensorboard import SummaryWriter

    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.05), timeout=30, check=sparcomm.Check(every=2))
    writer = SummaryWriter(f"{folder}/{rank}")
    record = Recorder(state, writer)
    every = Recorder(state, writer, "mine/", per_unit=True, every_rank=True)
    found = []
    for step in range(10):
        gradient_step(ddp, integers(SIZES, rank, step))
        if step in (4, 9):
            record()
            every(100 * step)
            found.append(state.stats())
    writer.close()
    state.close()
    return found, float(torch.zeros(()))


def test_a_run_leaves_its_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    results = pool(2).run(recorded, str(tmp_path))
    for rank, (found, _) in enumerate(results):
        curves = read(tmp_path / str(rank))
        ours = {t.removeprefix("sparcomm/"): c for t, c in curves.items() if t.startswith("sparcomm/")}
        assert bool(ours) == (rank == 0)
        theirs = {t.removeprefix("mine/"): c for t, c in curves.items() if t.startswith("mine/")}
        assert {"unit 0/bytes_per_step", "unit 1/residual_norm", "unit 0/seconds_per_step/wire"} <= set(theirs)
        for at, got in ((found, theirs), *([(found, ours)] if ours else [])):
            first, second = at
            assert {s for s, _ in got["kept"]} == ({5, 10} if got is ours else {400, 900})
            bytes_then, bytes_later = (value for _, value in got["bytes_per_step"])
            assert bytes_then == pytest.approx(first["bytes_sent"] / 5)
            assert bytes_later == pytest.approx((second["bytes_sent"] - first["bytes_sent"]) / 5)
            dense = sum(dense_traffic(u["numel"], 4, 2)[2] for u in second["per_unit"])
            assert got["ratio"][1][1] == pytest.approx(dense / bytes_later)
            wire = (second["seconds"]["wire"] - first["seconds"]["wire"]) / 5
            assert got["seconds_per_step/wire"][1][1] == pytest.approx(wire, rel=1e-4)
            assert got["residual_norm"][1][1] == pytest.approx(second["residual_norm"], rel=1e-5)
            assert got["skipped"][1][1] == 0
            assert got["check/cosine"][1][1] == pytest.approx(second["check"]["cosine"], rel=1e-5)


class Points:
    """A writer of one's own: anything with ``add_scalar`` serves."""

    def __init__(self) -> None:
        self.points: dict[str, tuple[float, int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        self.points[tag] = (scalar_value, global_step)


def stats(steps: int, sent: int, names: tuple[str, ...] = ("w",), **more: Any) -> dict[str, Any]:
    unit = {"names": list(names), "numel": 1000, "bytes_sent": sent, "seconds": {"wire": sent / 1e3}}
    per_unit = [{**unit, "residual_norm": 0.5}]
    return {
        "steps": steps, "size": 2, "skipped": 1, "bytes_sent": sent, "kept": 10, "residual_norm": 0.5,
        "seconds": {"wire": sent / 1e3}, "per_unit": per_unit, **more,
    }  # fmt: skip


def test_rates_are_over_the_steps_since_the_last_record() -> None:
    writer = Points()
    first = write(stats(4, 400), writer)
    assert writer.points["sparcomm/bytes_per_step"] == (100.0, 4)
    write(stats(6, 1000), writer, 77, prefix="x/", since=first)
    assert writer.points["x/bytes_per_step"] == (300.0, 77)
    assert writer.points["x/seconds_per_step/wire"] == pytest.approx((0.3, 77))
    assert writer.points["x/skipped"] == (1, 77)


def test_no_step_no_rate() -> None:
    for before in (None, stats(3, 30)):
        now = stats(0 if before is None else 3, 0 if before is None else 30)
        assert {tag for tag, _ in scalars(now, before, per_unit=True)} == {
            "kept", "residual_norm", "skipped", "unit 0/residual_norm",
        }  # fmt: skip


def test_nothing_sent_has_no_ratio_and_an_absent_check_no_curves() -> None:
    assert "ratio" not in dict(scalars(stats(3, 0)))
    assert not [tag for tag, _ in scalars(stats(3, 9, check=None)) if tag.startswith("check")]
    odd = {"looks": 2, "cosine": float("nan"), "note": "text"}
    assert [t for t in scalars(stats(3, 9, check=odd)) if t[0].startswith("check")] == [("check/looks", 2)]


def test_a_unit_that_became_another_one_has_no_rates_at_first() -> None:
    made_anew = dict(scalars(stats(6, 900, names=("b",)), stats(4, 400), per_unit=True))
    assert "unit 0/bytes_per_step" not in made_anew
    same = dict(scalars(stats(6, 900), stats(4, 400), per_unit=True))
    assert same["unit 0/bytes_per_step"] == 250
