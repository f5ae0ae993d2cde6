"""The command line: what it lists, what it starts, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sparcomm
from sparcomm import cli, selectors
from sparcomm.algorithms import Algorithm, registry
from sparcomm.config import algorithm_from_config, settings


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["sparcomm", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"sparcomm {sparcomm.__version__}\n"


def test_list_names_every_algorithm_and_selector_with_its_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert call(monkeypatch, "list") == 0
    listed = capsys.readouterr().out.partition("selectors")
    assert listed[0].startswith("algorithms")
    for shown, known in ((listed[0], registry()), (listed[2], selectors.registry())):
        for name, cls in known.items():
            assert name in shown
            for field in settings(cls):
                assert field.name in shown
                default = field.default
                assert (default.name if isinstance(default, Algorithm) else repr(default)) in shown


def test_list_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    found, chosen = ({entry["name"]: entry for entry in listed[kind]} for kind in ("algorithms", "selectors"))
    assert set(found) == set(registry())
    fields = {field["name"]: field for field in found["spardl"]["fields"]}
    assert fields["density"]["default"] == 0.01
    nested = {field["name"]: field["default"] for field in found["hierarchical"]["fields"]}
    assert algorithm_from_config(nested["outer"]) == registry()["spardl"]()
    assert fields["density"]["type"] == "float"
    assert found["dense"]["fields"][0]["allowed"] == [False, True]
    assert list(chosen) == list(selectors.registry())
    assert {field["name"]: field["default"] for field in chosen["gaussiank"]["fields"]}["reestimate_every"] == 1
    assert all(entry["doc"] for entry in (*found.values(), *chosen.values()))
    assert all(field["doc"] for entry in chosen.values() for field in entry["fields"])


def test_list_of_some(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "list", "s2", "gaussiank") == 0
    shown = capsys.readouterr().out
    assert "s2 (S2Reducer): " in shown
    assert "granularity" in shown
    assert "reestimate_every" in shown
    assert "spardl" not in shown
    assert call(monkeypatch, "list", "S2Reducer") == 2
    assert capsys.readouterr().err.startswith("error: nothing is called 'S2Reducer' (did you mean 's2'?): must be one")


def test_an_unknown_benchmark_is_one_line_that_lists_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "bench", "wiree") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: unknown benchmark 'wiree' (did you mean 'wire'?)")
    assert shown.err.count("\n") == 1


def test_the_benchmarks_are_found() -> None:
    assert {"gather", "quality", "select", "votes", "wire"} <= set(cli.benches())


@pytest.mark.parametrize("name", cli.benches())
def test_a_benchmark_takes_its_own_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "bench", name, "--help") == 0
    assert "usage" in capsys.readouterr().out.lower()
    assert call(monkeypatch, "bench", name, "--no-such-option") == 2


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--help"]])
def test_bench_alone_says_what_there_is(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "wire" in shown
    assert "S2Reducer sends least" in shown, "what each shows"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--numel", "none"], "--numel"),
        (["--algorithms", "dense,spardl:layout=heap"], "layout='heap'"),
        (["sync", "--density", "2"], "--density 2"),
        (["overlap", "--layers", "1"], "--layers"),
        (["feedback", "--density", "2"], "--density: must be in (0, 1], got '2'"),
        (["feedback", "--png", "owed.pdf"], "--png owed.pdf: must end in .png"),
        (["s2", "--overlaps=-1"], "--overlaps: must be in [0, 1], got '-1'"),
        (["wire", "--sizes", "0"], "--sizes"),
    ],
)
def test_what_is_typed_wrong_after_bench_is_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "bench", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert complaint in shown.err
    assert shown.err.count("\n") == 1


def test_of_several_ranks_the_first_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert call(monkeypatch, "bench", "--numel", "0") == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["list", "--nonsense"]])
def test_wrong_use(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert "nonsense" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "sparcomm", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"sparcomm {sparcomm.__version__}\n")
