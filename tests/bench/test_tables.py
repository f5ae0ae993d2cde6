"""The benches run, and what they call equal or captured is so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.spardl import SparDL
from sparcomm.bench import quality, residuals, wire
from sparcomm.bench.gradient import exact_sum, gradient
from sparcomm.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "values", "limit"), [(4, "float32", 84), (8, "float32", 84), (8, "bfloat16", 52), (8, "int8", 36)]
)
def test_bits_per_kept_entry(size: int, values: str, limit: float) -> None:
    n, algorithm = 200_000, SparDL(density=0.01, values=values)
    traffic, equal = wire.measure(algorithm, n, size)
    assert equal
    assert 8 * traffic.bytes_sent / (algorithm.kept(n, size) * (size - 1) / size) <= limit
    assert traffic.rounds == traffic.messages == 2 * (size - 1).bit_length()


def test_wire_prints_a_row_for_each_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    wire.main(["--numel", "3000", "--sizes", "2", "--values", "float16"])
    out = capsys.readouterr().out
    assert out.count("equal") == out.count("within") == 2
    assert "DIFFERS" not in out


def test_the_exact_sum_captures_everything() -> None:
    assert quality.captured(Dense(), torch.ones(500), 3, seed=0) == pytest.approx(1.0)


def test_dealt_blocks_keep_up_where_contiguous_ones_do_not() -> None:
    scale = torch.logspace(0, 1, 20).repeat_interleave(2000)
    dealt, contiguous = (quality.captured(SparDL(layout=k), scale, 8, seed=0) for k in ("dealt", "contiguous"))
    even = quality.captured(SparDL(), torch.ones(40_000), 8, seed=0)
    assert dealt >= 0.9 * even
    assert contiguous < 0.8 * even


def test_what_stays_behind_adds_up() -> None:
    n, size, steps = 2000, 4, 6
    fed = sum(exact_sum(n, size, step).double() for step in range(steps))

    def behind(algorithm: SparDL) -> tuple[torch.Tensor, torch.Tensor]:
        return residuals.behind(algorithm, lambda step, rank: gradient(n, rank, step), fed, size, steps)

    owed, lost = behind(SparDL(0.05))
    assert owed.norm() > 0
    assert lost.norm() < 1e-3
    _, dropped = behind(SparDL(0.05, residuals="local"))
    assert dropped.norm() > 1
    best = residuals.exact(lambda step: exact_sum(n, size, step), n, 100, steps)
    assert best.norm() < owed.norm()


def test_residuals_prints_a_row_for_each_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    residuals.main(["--numel", "500", "--size", "4", "--steps", "2"])
    out = capsys.readouterr().out
    assert all(name in out for name in residuals.configurations(0.01, 4))


@pytest.mark.parametrize(
    ("bench", "wrong"),
    [
        (wire, ["--numel", "0"]),
        (wire, ["--sizes", "4", "0"]),
        (quality, ["--size", "0"]),
        (quality, ["--seeds", "0"]),
        (residuals, ["--steps", "0"]),
        (residuals, ["--size", "0"]),
    ],
)
def test_nonsense_is_refused(bench: Any, wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        bench.main(wrong)
