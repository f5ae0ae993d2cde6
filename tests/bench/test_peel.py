"""The peeling benchmark runs, its rows add up, and it refuses nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparcomm.bench.peel import drawn, main, measured
from sparcomm.errors import ConfigError, SparcommError

SHORT = ["--keys", "30,500", "--ratios", "0.5,3", "--work", "3000", "--repeat", "1"]


def rows(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    main([*SHORT, "--json", *more])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_both_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main([*SHORT])
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert "peeling, 3 rows" in printed
    assert printed.count("estimate, projection") == 2


def test_rows_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--part", "success", "--width", "2")
    assert [(row["keys"], row["ratio"], row["columns"], row["tries"]) for row in found] == [
        (30, 0.5, 5, 100),
        (30, 3, 30, 100),
        (500, 0.5, 84, 6),
        (500, 3, 500, 6),
    ]
    for row in found:
        assert row["rate"] == pytest.approx(row["keys"] / (row["encode"] + row["peel"]))
        if row["ratio"] == 3:
            assert row["success"] > 0.8
            assert 1 <= row["rounds"] <= row["most_rounds"] < 12
            assert row["left"] < 0.02
        else:
            assert row["success"] == 0
            assert row["rounds"] is None
            assert 0.5 < row["left"] <= 1


def test_speeds_are_of_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--part", "speed", "--keys", "40", "--width", "3")
    names = ["sketch", "estimate, mean", "estimate, median", "estimate, projection", "encode", "peel"]
    assert [row["what"] for row in found] == names
    for row in found:
        assert row["ratio"] == pytest.approx(row["torch"] / row["ours"])
        assert (row["hashed"] is None) == (row["what"] == "peel")


def test_a_wrong_value_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparcomm.kernels import cpu

    def forgetful(*arguments: Any) -> Any:
        value, done, rounds = peel(*arguments)
        return value + 1, done, rounds

    peel = cpu.peel
    measured(50, 2.0, 3, 1, 3, 0)
    monkeypatch.setattr(cpu, "peel", forgetful)
    with pytest.raises(SparcommError, match="peeling 50 keys with seed 0 gave another value"):
        measured(50, 2.0, 3, 1, 3, 0)


@pytest.mark.parametrize("k", [1, 2, 1000])
def test_keys_are_keys(k: int) -> None:
    key, value = drawn(k, 3, 1)
    assert key.shape == (k,)
    assert value.shape == (3 * k,)
    assert bool((key.diff() > 0).all())
    assert 0 <= int(key[0]) <= int(key[-1]) < 1 << 32


def test_success_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main([*SHORT, "--part", "success", "--png", str(tmp_path / "peel.png")])
    assert "keys" in capsys.readouterr().out
    assert (tmp_path / "peel.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--keys", "10,0"], "--keys"),
        (["--ratios", "1.2,-1"], "--ratios"),
        (["--rows", "0"], "--rows"),
        (["--part", "time"], "--part"),
        (["--png", "peel.svg"], "must end in .png"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        main(arguments)
