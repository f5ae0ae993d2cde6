"""What ``sparcomm bench feedback`` shows of sketches, at a size at which it takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparcomm.bench import feedback
from sparcomm.errors import ConfigError


def test_only_a_projection_with_new_seeds_keeps_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "owed.png"
    feedback.main(["--size", "2", "--numel", "2000", "--steps", "40", "--json", "--png", str(picture)])
    rows = {row["decoder"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    owed = {name: row["owed"][-1] for name, row in rows.items()}
    assert owed["median, fixed seed"] > 1e6
    assert owed["median, new seeds"] > 1e2
    assert 2 * owed["projection, new seeds"] < owed["projection, fixed seed"] < 1e2
    assert owed["compact"] == 0
    assert owed["peel"] < 1e-5
    assert rows["projection, new seeds"]["lag"][-1] < 0.3 < rows["projection, fixed seed"]["lag"][-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--density", "0"], ["--density", "1.5"], ["--ratio", "-1"]])
def test_wrong_sizes(wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{wrong[0]}.*{wrong[1]}"):
        feedback.main(wrong)


def test_a_gradient_of_nothing_but_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rank has any of 3 entries"):
        feedback.main(["--numel", "3", "--density", "1e-9", "--steps", "1"])
