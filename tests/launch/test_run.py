"""The main job end to end, as real processes: it trains, reports, fails in one line, and survives being killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import demo
import pytest

from jobs import checkpoint, report
from jobs.launcher import TRAIN, environment
from support.jobs_run import finish, kill_when

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]

SHARED = pytest.mark.xdist_group("runs")  # one worker, so that the runs they share happen once
STEPS, EVERY, KILL_AFTER = 30, 2, 4
# Large enough for several buckets, so that DDP's rebuild after the first step is part of what is resumed.
DIGITS = """
task: {name: digits, width: 24, dropout: 0.2}
optimizer: {name: sgd, lr: 0.05}
algorithm: {name: spardl, density: 0.01}
schedule: {warmup: 5}
bucket_mb: 0.3
batch: 64
"""


def config(folder: Path, text: str = DIGITS) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def digits(folder: Path, name: str) -> list[str]:
    return [f"output={folder / name}", f"steps={STEPS}", f"checkpoint.every={EVERY}"]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, Any]:
    """A run of 4 ranks that nothing disturbs."""
    done = finish(config(folder), 4, digits(folder, "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return report.read(folder / "whole")


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """The folder of the same run, all of whose processes were killed after a checkpoint of step 4 or later."""
    output = folder / "killed"
    saved = output / "checkpoints"

    def reached() -> bool:
        found = checkpoint.newest(saved)
        return found is not None and int(found.name.removeprefix("step-")) >= KILL_AFTER

    kill_when(config(folder), 4, digits(folder, "killed"), reached, folder / "log")
    assert not (output / report.METRICS).exists(), "the run was over before it could be killed"
    return output


@SHARED
@pytest.mark.timeout(240)
def test_spardl_trains_on_four_ranks(uninterrupted: dict[str, Any], folder: Path) -> None:
    summary, history = uninterrupted["summary"], uninterrupted["history"]
    assert (summary["steps"], summary["size"], summary["algorithm"]) == (STEPS, 4, "spardl")
    assert summary["identical"]
    assert summary["train_loss"] < history[0]["loss"]
    assert summary["ratio"] > 60
    assert history[-1]["bytes_total"] == summary["bytes_sent"] == sum(record["bytes"] for record in history)
    assert (folder / "whole" / report.PLOT).read_bytes().startswith(b"\x89PNG")
    kept = [path.name for path in checkpoint.complete(folder / "whole" / "checkpoints")]
    assert kept == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


@SHARED
@pytest.mark.timeout(240)
def test_a_killed_run_resumes_bit_for_bit(uninterrupted: dict[str, Any], killed: Path, folder: Path) -> None:
    copy = folder / "resumed"
    shutil.copytree(killed, copy)
    done = finish(config(folder), 4, digits(folder, "resumed"))
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = report.read(copy)
    assert resumed["summary"]["sha256"] == uninterrupted["summary"]["sha256"]
    assert resumed["summary"]["identical"]
    assert resumed["summary"]["bytes_sent"] == uninterrupted["summary"]["bytes_sent"]
    losses = [[record["loss"] for record in run["history"]] for run in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


@SHARED
@pytest.mark.timeout(240)
def test_a_killed_run_resumes_on_fewer_ranks(killed: Path, folder: Path) -> None:
    copy = folder / "fewer"
    shutil.copytree(killed, copy)
    done = finish(config(folder), 2, digits(folder, "fewer"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = report.read(copy)["summary"]
    assert (summary["size"], summary["steps"]) == (2, STEPS)
    assert summary["identical"]


CHARLM = """
task: {name: charlm, layers: 1, width: 32, heads: 2, context: 32, validation_windows: 8}
optimizer: {name: adamw, lr: 0.003}
algorithm: {name: dense, native: true}
clip_norm: 1.0
batch: 8
steps: 6
evaluate_every: 4
tensorboard: true
"""


@pytest.mark.timeout(240)
def test_charlm_trains_dense_and_writes_tensorboard_events(tmp_path: Path) -> None:
    done = finish(config(tmp_path, CHARLM), 2, [f"output={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = report.read(tmp_path / "run")["summary"]
    assert summary["identical"]
    assert 0 < summary["scores"]["bits"] < 8
    assert summary["ratio"] == pytest.approx(1.0, rel=0.01)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert "step 4: loss" in done.stdout
    assert "bits/char" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["steps=2", "batch=5000"], 2, "batch=5000 is larger than the 1198 samples"),
        (["steps=2", "batchh=64"], 2, "unknown key 'batchh' (did you mean 'batch'?)"),
        (["steps=1"], 0, ""),
    ],
)
def test_one_process_needs_no_launcher_and_mistakes_are_one_line(
    tmp_path: Path, overrides: list[str], code: int, words: str
) -> None:
    start = [sys.executable, str(TRAIN), "--config", str(config(tmp_path)), f"output={tmp_path}", *overrides]
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == (1 if words else 0)
    assert (tmp_path / report.METRICS).exists() == (code == 0)


@pytest.mark.timeout(240)
def test_the_demo_puts_both_arms_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--ranks", "2", "--output", str(tmp_path), "steps=3", "epochs=null", "task.width=8"]) == 0
    shown = capfd.readouterr().out
    assert "side by side" in shown
    assert "times fewer bytes over the whole run" in shown
    assert (tmp_path / report.PLOT).exists()
    runs = {arm: report.read(tmp_path / arm)["summary"] for arm in ("dense", "spardl")}
    assert runs["dense"]["bytes_sent"] > 30 * runs["spardl"]["bytes_sent"] > 0


@pytest.mark.timeout(240)
def test_the_comparison_pairs_seeds(tmp_path: Path) -> None:
    where = ["--output", str(tmp_path), "--json", str(tmp_path / "found.json")]
    overrides = ["steps=1", "epochs=null", "task.width=8"]
    assert compare.main(["--seeds", "2", "--ranks", "1", *where, *overrides]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [summary["seed"] for summary in found["runs"]["arm"]] == [0, 1]
    low, mean, high = (found["difference"][key] for key in ("low", "mean", "high"))
    assert low <= mean <= high
    # One rank sends nothing, and one step from the same weights on the same batch: only the update can differ.
    first = [[summary["train_loss"] for summary in found["runs"][which]] for which in ("base", "arm")]
    assert first[0] == first[1]


def test_a_single_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--seeds", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
