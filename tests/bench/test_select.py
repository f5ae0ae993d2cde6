"""The selection benchmark runs, is right about what it calls right, and refuses nonsense."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparcomm.bench import distributions
from sparcomm.bench.select import main, parse, selectors
from sparcomm.bench.select_rows import TORCH, Vector, count_passes
from sparcomm.errors import ConfigError
from sparcomm.selectors import Memo, make_selector
from sparcomm.selectors.gaussiank import GaussianK
from sparcomm.selectors.topk import TopK

N = 60_000
SHORT = ["--numel", "40000", "--quality-numel", "40000", "--repeat", "1"]


def rows(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    main([*SHORT, "--json", *more])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_both_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main([*SHORT, "--distributions", "normal,zeros", "--densities", "0.01,0.1"])
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert "speed: 40,000 normal" in printed
    assert printed.count("normal  ") == printed.count("zeros  ") == 2
    assert "reestimate_every=32" in printed


def test_every_row_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--part", "quality", "--densities", "0.001,0.1")
    names = list(distributions.known())
    assert [row["distribution"] for row in found] == [name for name in names for _ in range(2 * 5)]
    for row in found:
        assert row["k"] == round(row["density"] * row["numel"])
        assert row["seconds"] > 0
        share = row["count"] / row["k"]
        if row["selector"] == "topk":
            assert row["identical"]
        if row["selector"] in (TORCH, "topk"):
            assert share == 1
            assert row["energy"] is None or row["energy"] == pytest.approx(1)
        elif "guard" not in row["selector"]:
            assert 2 / 3 <= share <= 4 / 3
        assert (row["passes"] is None) == (row["selector"] == TORCH)
        assert (row["energy"] is None) == (row["distribution"] == "nan")


def test_the_speed_table_is_of_one_vector(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(
        capsys, "--part", "speed", "--density", "0.02", "--selectors", "topk, gaussiank(adjust=1, guard=False)"
    )
    assert [row["selector"] for row in found] == [TORCH, "topk", "gaussiank(guard=False, adjust=1)"]
    assert {(row["part"], row["numel"], row["k"]) for row in found} == {("speed", 40_000, 800)}


@pytest.mark.parametrize("name", ["normal", "laplace", "student3", "lognormal", "spike", "denormal", "zeros"])
@pytest.mark.parametrize("text", ["topk", "gaussiank", "gaussiank(reestimate_every=32)"])
def test_one_pass_is_enough(text: str, name: str) -> None:
    selector, memo, draw = make_selector(text), Memo(), distributions.known()[name]
    for seed in range(3):
        assert count_passes(selector, draw(N, seed), N // 100, memo) == 1


def test_more_passes_are_counted() -> None:
    normal, constant = (distributions.known()[name](N, 0) for name in ("normal", "constant"))
    published = GaussianK(guard=False)
    assert count_passes(published, normal, 600, Memo()) == 2  # and mean and deviation
    assert count_passes(TopK(), constant, 600, Memo()) == 4  # no list, a look for NaN, two for the k largest
    # No list, a look for NaN; mean and deviation; three counts; the last count again, and what it counted.
    assert count_passes(published, constant, 600, Memo()) == 8


def test_a_wrong_selection_is_noticed() -> None:
    x = torch.tensor([3.0, -4.0, 0.0, 4.0])
    vector = Vector("few", x, x)
    right, wrong = torch.tensor([1, 3]), torch.tensor([0, 1])
    found = [vector._row("a", 0.5, 2, 1.0, 2.0, 1, index) for index in (right, wrong)]
    assert [(row.identical, row.energy, row.ratio, row.count) for row in found] == [
        (True, 1.0, 2.0, 2), (False, 25 / 32, 2.0, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(distributions.known()))
def test_distributions(name: str) -> None:
    draw = distributions.known()[name]
    x = draw(N, 1)
    assert (x.dtype, x.shape) == (torch.float32, (N,))
    assert torch.equal(x.nan_to_num(), draw(N, 1).nan_to_num())
    assert bool(x.isfinite().all()) == (name != "nan")
    assert not bool(x.isinf().any())
    assert name in ("constant", "zeros") or not torch.equal(x, draw(N, 2))
    assert draw(1, 0).shape == (1,)


def test_distributions_are_those_they_are_named_after() -> None:
    drawn = {name: draw(400_000, 5).double() for name, draw in distributions.known().items()}
    near: Any = functools.partial(pytest.approx, rel=0.05)
    for name in ("normal", "laplace", "student3", "lognormal"):
        assert abs(float((drawn[name] > 0).double().mean()) - 0.5) < 0.01
    magnitude = {name: x.abs() for name, x in drawn.items()}
    above = {name: float((x > 3).double().mean()) for name, x in magnitude.items()}
    assert above["normal"] == near(math.erfc(3 / math.sqrt(2)))
    assert above["laplace"] == near(math.exp(-3))
    assert above["student3"] == near(1 - 2 / math.pi * (math.sqrt(3) / (1 + 3) + math.atan(math.sqrt(3))))
    assert above["lognormal"] == near(math.erfc(math.log(3) / 1.5 / math.sqrt(2)) / 2)
    assert 0 < float(magnitude["denormal"].max()) < torch.finfo(torch.float32).tiny


def test_recorded_gradients_are_measured_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, n in ((1, 300), (50, 500)):
        torch.save(torch.randn(n), tmp_path / f"step-{step:05d}-unit-0.pt")
    found = rows(capsys, "--part", "quality", "--distributions", "normal", "--recorded", str(tmp_path))
    numel = {row["distribution"]: row["numel"] for row in found}
    assert numel == {"normal": 40_000, "step-00001-unit-0": 300, "step-00050-unit-0": 500}


@pytest.mark.parametrize(
    "content", [b"", b"no tensor", {"a": 1}, torch.ones(2, 2), torch.ones(3).half(), torch.ones(0)]
)
def test_files_that_are_no_gradients(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=r"--recorded: .*x\.pt"):
        distributions.recorded(tmp_path)


def test_selectors_are_told_apart() -> None:
    text = "topk, gaussiank(adjust=2, guard=False),gaussiank()"
    assert selectors(text) == [TopK(), GaussianK(guard=False, adjust=2), GaussianK()]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--numel", "0"], ["--numel", "at least 1"]),
        (["--quality-numel", "x"], ["--quality-numel"]),
        (["--density", "0"], ["--density", "above 0"]),
        (["--density", "1.5"], ["1.5", "(0, 1]"]),
        (["--densities", "0.1,2"], ["2", "(0, 1]"]),
        (["--densities", "0.1,"], ["--densities"]),
        (["--repeat", "0"], ["--repeat"]),
        (["--part", "both"], ["--part", "'speed', 'quality'"]),
        (["--selectors", "topkk"], ["'topkk'", "did you mean 'topk'?"]),
        (["--selectors", "topk,"], ["''"]),
        (["--distributions", "norml"], ["'norml'", "did you mean 'normal'?", "'lognormal'"]),
        (["--recorded", "/nonexistent"], ["/nonexistent", "record_gradients"]),
    ],
)
def test_nonsense_is_refused(typed: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(typed)
    for word in words:
        assert word in str(caught.value)
