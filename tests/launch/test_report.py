"""Reports: readable numbers, curves without bias, plots that are pictures, intervals that cover."""

from __future__ import annotations

import io
import math
import random
import sys
from pathlib import Path
from typing import Any

import compare
import pytest
from rich.console import Console

from jobs import report
from jobs.paired import paired_difference
from jobs.progress import display, human
from sparcomm.errors import ConfigError


def metrics(name: str = "spardl", steps: int = 5) -> dict[str, Any]:
    history = [{"step": s + 1, "loss": 1 / (s + 1), "bytes_total": 100.0 * s} for s in range(steps)]
    summary = {
        "algorithm": name, "scores": {"loss": 0.5, "accuracy": 0.975}, "train_loss": 0.25, "steps": steps, "size": 4,
        "parameters": 1234567, "seconds": 1.5, "bytes_sent": 2_500_000.0, "ratio": 76.25, "identical": True,
    }  # fmt: skip
    return {"summary": summary, "history": history}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    report.write(tmp_path / "new" / "run", metrics())
    assert report.read(tmp_path / "new" / "run") == metrics()
    assert (tmp_path / "new" / "run" / report.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_plot_of_hardly_anything(tmp_path: Path, steps: int) -> None:
    report.plot(tmp_path / "x.png", {"a": metrics(steps=max(1, steps)), "b": metrics(steps=max(1, steps))})
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_table_lays_runs_side_by_side() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(report.table("runs", [metrics("dense")["summary"], metrics()["summary"]]))
    shown = out.getvalue()
    for text in ("dense", "spardl", "97.50 %", "1,234,567", "2.50 MB", "76.2x", "identical"):
        assert text in shown


def test_a_language_model_is_scored_in_bits() -> None:
    summary = metrics()["summary"] | {"scores": {"loss": math.log(2), "bits": 1.0}, "identical": False}
    out = io.StringIO()
    Console(file=out, width=120).print(report.table("run", [summary]))
    assert "1.000 bits/char" in out.getvalue()
    assert "DIFFERENT" in out.getvalue()


def test_smoothing_is_unbiased() -> None:
    assert report.smooth([]) == []
    assert report.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert report.smooth([1.0, 0.0], weight=0.5) == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (5e9, "5.00 GB"), (5e12, "5000.00 GB")],
)
def test_human(count: float, text: str) -> None:
    assert human(count) == text


def test_only_the_first_rank_shows_anything(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "step": 2.0,
        "loss": 0.5,
        "rate": 0.1,
        "seconds": 0.02,
        "bytes": 1500.0,
        "bytes_total": 3e3,
        "ratio": 70.0,
    }
    for rank in (1, 0):
        with display(rank, "run", None) as shown:
            shown.begin(2, 0)
            shown.show(record, 2)
            shown.evaluated(2, {"accuracy": 0.75})
        out = capsys.readouterr().out
        assert (out == "") == (rank == 1)
    for text in ("step 2/2", "loss 0.5000", "20 ms/step", "1.50 kB/step", "70.0x fewer", "accuracy 0.7500"):
        assert text in out


def test_paired_difference_of_a_known_case() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027.
    found = paired_difference([10.0, 20.0, 30.0], [11.0, 22.0, 33.0])
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(3)
    covered = 0
    for _ in range(600):
        base = [draw.gauss(0, 5) for _ in range(5)]
        found = paired_difference(base, [x + draw.gauss(1, 2) for x in base])
        covered += found.low <= 1 <= found.high
    assert 0.92 < covered / 600 < 0.98


@pytest.mark.parametrize(("base", "arm"), [([], []), ([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_too_few_pairs(base: list[float], arm: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_difference(base, arm)


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what an import finds without the package
    with pytest.raises(ConfigError, match=r"pip install 'sparcomm\[tensorboard\]'"), display(0, "run", tmp_path):
        pass


@pytest.mark.parametrize(
    ("score", "by_rate", "chosen"),
    [
        ("accuracy", {0.1: [97.0, 98.0], 0.2: [97.6, 97.0]}, 0.1),
        ("accuracy", {0.1: [97.0], 0.2: [97.5]}, 0.2),
        ("accuracy", {0.1: [97.0], 0.2: [97.0]}, 0.1),
        ("bits", {0.1: [2.0], 0.2: [1.5]}, 0.2),
    ],
)
def test_a_rate_is_chosen_by_the_score_that_is_compared(
    score: str, by_rate: dict[float, list[float]], chosen: float
) -> None:
    tried = {rate: [{"score": s, "scores": {score: s}} for s in scores] for rate, scores in by_rate.items()}
    assert compare.best(tried) == chosen
