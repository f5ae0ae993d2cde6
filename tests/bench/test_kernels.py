"""The benchmark of kernels runs on a CPU, counts what it says, leaves out what does not fit, and refuses nonsense."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparcomm import wire
from sparcomm.bench import kernels as bench
from sparcomm.bench import kernels_timer
from sparcomm.bench.kernels import main, parse
from sparcomm.bench.kernels_cases import KINDS, Data, Goal
from sparcomm.bench.kernels_timer import free_bytes, timed, waits
from sparcomm.errors import ConfigError, SparcommError
from sparcomm.kernels import cpu, reference

CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--repeat", "1"]
PHASES = ["step", "step: waiting", "step: select", "step: code", "step: rest"]


def rows_of(capsys: pytest.CaptureFixture[str], *typed: str) -> list[dict[str, object]]:
    main([*SHORT, *typed, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_kernel_has_a_row_that_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rows = rows_of(capsys, "--numel", "4097", "--ranks", "3")
    assert torch.get_num_threads() == threads
    assert [row["kernel"] for row in rows] == [*KINDS, *PHASES]
    for row in rows[: len(KINDS)]:
        rate, copy = row["bytes_per_second"], row["copy_bytes_per_second"]
        assert rate == pytest.approx(row["bytes"] / row["seconds"])
        assert row["of_copy"] == pytest.approx(rate / copy)
        assert row["reference_ratio"] > 0
        assert (row["numel"], row["kept"], row["goals"], row["note"], row["waits"]) == (4097, 41, {}, None, None)
    by_name = {row["kernel"]: row for row in rows}
    assert by_name["topk"]["bytes"] == 16 * 4097
    assert by_name["vote"]["bytes"] == 4 * 129 * (3 + 1)
    assert by_name["elias-fano-decode"]["bytes"] == 8 * 41 + 4 * wire.elias_fano_words(41, 4097)
    assert [row["kernel"] for row in rows if row["torch_ratio"]] == ["topk", "topk-blocks", "gaussiank"]
    assert [row["kernel"] for row in rows if row["of_selection"]] == [
        "elias-fano-encode", "elias-fano-decode", "rice-encode", "rice-decode"
    ]  # fmt: skip
    step, waiting, *parts = (by_name[name]["seconds"] for name in PHASES)
    assert step > 0
    assert min(parts[:2]) > 0
    assert sum(parts) == pytest.approx(waiting)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 4097])
@pytest.mark.parametrize("name", KINDS)
def test_a_case_runs_again_and_again_on_any_length(name: str, n: int) -> None:
    for kernels in (cpu, reference):
        case = KINDS[name].make(Data(n, 0.01, 2, CPU), kernels)
        for _ in range(2):
            case.run(kernels)
        assert case.moved > 0
        assert case.items > 0
        assert case.formula.count("+") == len(case.bytes) - 1


def test_codes_are_compared_only_with_a_selection_that_was_timed(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of(capsys, "--numel", "1000", "--kernels", "elias-fano-encode")
    assert row["of_selection"] is None
    topk, row = rows_of(capsys, "--numel", "1000", "--kernels", "elias-fano-encode,topk")
    assert row["of_selection"] == pytest.approx(row["seconds"] / topk["seconds"])


def test_a_table_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SHORT, "--numel", "1e3,2000", "--kernels", "narrow,topk"])
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert "n = 1,000 float32, k = 10" in first
    assert "n = 2,000 float32, k = 20" in second
    title, heading, rule, topk, narrow = second.splitlines()
    assert "16n" in topk
    assert "10k" in narrow
    assert rule.startswith("------  ")
    assert "goal" not in heading
    assert "GB/s" in title


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 20_000.0)
    topk, narrow, step = rows_of(capsys, "--numel", "1000", "--kernels", "topk,narrow,step")
    assert topk["note"] == "left out: needs 0.0 GB of memory, 0.0 are free"
    assert topk["seconds"] is None
    assert step["note"].startswith("left out")
    assert narrow["seconds"] > 0
    with pytest.raises(SparcommError, match="memory for a copy alone"):
        main([*SHORT, "--numel", "10000"])
    main([*SHORT, "--numel", "1000", "--kernels", "topk"])
    assert "topk: left out" in capsys.readouterr().out


def test_a_slow_reference_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 0.0)
    (row,) = rows_of(capsys, "--numel", "1000", "--kernels", "narrow")
    assert row["reference_ratio"] is None
    assert row["note"].startswith("reference left out: it would take")


def test_goals_are_met_on_their_side_of_the_bound() -> None:
    least, most = Goal("of_copy", 0.7, ">= 70 %"), Goal("of_selection", 0.1, "<= 10 %")
    assert [least.met(x) for x in (0.69, 0.7, None)] == [False, True, None]
    assert [most.met(x) for x in (0.11, 0.1, None)] == [False, True, None]


def test_a_median_of_as_many_runs_as_asked_for() -> None:
    runs: list[None] = []
    found = timed(lambda: runs.append(None), 4, CPU)
    assert len(runs) == 5
    assert found.seconds == found.host > 0
    assert waits(lambda: None, CPU) is None


def test_free_memory_is_read_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      3 kB\n", encoding="ascii")
    monkeypatch.setattr(kernels_timer, "MEMINFO", tmp_path / "meminfo")
    assert free_bytes(CPU) == 3072
    monkeypatch.setattr(kernels_timer, "MEMINFO", tmp_path / "none")
    assert free_bytes(CPU) == float("inf")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")
def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.png"
    main([*SHORT, "--numel", "100,200", "--kernels", "narrow,rank", "--png", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


MISSING = ("pydantic", "rich", "typer", "matplotlib")
WITHOUT = f"""
import sys
for name in {MISSING}:
    sys.modules[name] = None
import runpy
sys.argv = ["kernels", "--device", "cpu", "--numel", "1000", "--kernels", "topk,step", "--repeat", "1"]
runpy.run_module("sparcomm.bench.kernels", run_name="__main__")
"""


def test_it_runs_where_only_torch_and_numba_are_installed() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "step: code" in done.stdout


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--numel", "0"], ["--numel", "at least 1", "25e6"]),
        (["--numel", "1.5"], ["--numel", "'1.5'"]),
        (["--numel", "10,"], ["--numel"]),
        (["--numel", "nan"], ["--numel"]),
        (["--kernels", "topk,heap"], ["--kernels", "'heap'", "elias-fano-encode"]),
        (["--density", "0"], ["--density"]),
        (["--ranks", "0"], ["--ranks"]),
        (["--repeat", "0"], ["--repeat"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--png", "kernels.pdf"], ["--png", ".png"]),
    ],
)
def test_nonsense_is_refused(typed: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(typed)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        parse(["--device", "cuda"])
    assert parse([]).device == "cpu"
    assert parse([]).numel == (25_000_000,)
