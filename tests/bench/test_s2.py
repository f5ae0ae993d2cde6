"""The map of S2Reducer says what is sent, and who sends least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.s2 import S2Reducer
from sparcomm.bench.s2 import EXACT, WAYS, Row, main, parse, row, union_of
from sparcomm.errors import ConfigError
from support.sums import normals, simulate

SHORT = ["--numel", "65536", "--sizes", "2,8", "--densities", "0.01,0.1", "--overlaps", "0,1"]


def gradients(case: Row, steps: int) -> list[list[Tensor]]:
    """Such as the case is about."""
    n, keys = case.numel, case.numel // case.width
    k = round(case.density * keys)
    common = round(case.overlap * k)
    made = []
    for step in range(steps):
        by_rank = []
        for rank in range(case.size):
            x, first = torch.zeros(keys, case.width), common + rank * (k - common)
            at = [*range(common), *range(first, first + k - common)]
            x[at] = normals(k * case.width, rank, step).view(k, -1)
            by_rank.append(x.view(-1)[:n])
        made.append(by_rank)
    return made


@pytest.mark.parametrize(("width", "overlap"), [(1, 1.0), (32, 0.5), (32, 0.0)])
def test_bytes_are_what_steps_send(width: int, overlap: float) -> None:
    case = row(32768, width, 4, 0.05, overlap, 1e-4, 1e8)
    fed = gradients(case, 3)
    ways: dict[str, Algorithm] = {
        "compact": S2Reducer(None, "compact", width),
        "peel": S2Reducer(None, "peel", width),
        "projection": S2Reducer(None, "projection", width, error_feedback=False),
        "dense": Dense(),
    }
    for way, algorithm in ways.items():
        done, _, traffic = simulate(algorithm, fed)[0]
        assert traffic[2].bytes_sent == case.bytes_sent[way], way
        if way != "dense":
            assert done[-1].state.union == case.union


def test_unions() -> None:
    assert [union_of(1000, 10, overlap, 8) for overlap in (0, 0.5, 1)] == [80, 45, 10]
    assert union_of(50, 10, 0.0, 8) == 50


def test_every_case_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SHORT, "--json"])
    lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * 2 * 2 * 2
    for line in lines:
        assert line["bytes_sent"].keys() == line["seconds"].keys() == set(WAYS)
        assert line["bytes_sent"][line["fewest_bytes"]] == min(line["bytes_sent"][way] for way in EXACT)
        assert line["seconds"][line["fastest"]] == min(line["seconds"][way] for way in EXACT)


def test_tables_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    main([*SHORT, "--png", str(tmp_path / "map.png")])
    printed = capsys.readouterr().out
    assert "keys are elements" in printed
    assert "keys are rows of 64" in printed
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "wrong", [["--densities", "0.1,2"], ["--overlaps", "-1"], ["--sizes", "0"], ["--png", "x.gif"]]
)
def test_nonsense_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match=wrong[0]):
        parse(wrong)
