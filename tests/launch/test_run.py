"""The main job end to end, as real processes: it trains, reports, fails in one line, and survives being killed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import demo
import elastic
import pytest
import torch
import train

from jobs import checkpoint, report
from support.jobs_run import finish, kill_when, restarted

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]

SHARED = pytest.mark.xdist_group("runs")  # one worker, so that the runs they share happen once
RANKS, STEPS, EVERY, KILL_AFTER = 2, 20, 2, 4
# Large enough for several buckets, so that DDP's rebuild after the first step is part of what is resumed.
DIGITS = """
task: {name: digits, width: 24, dropout: 0.2}
optimizer: {name: sgd, lr: 0.05, momentum: 0.5}
algorithm: {name: spardl, density: 0.01}
schedule: {warmup: 5}
bucket_mb: 0.3
batch: 48
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
    """A run that nothing disturbs."""
    done = finish(config(folder), RANKS, digits(folder, "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return report.read(folder / "whole")


def reached(output: Path) -> bool:
    """Whether the run has a checkpoint that it is to be killed after."""
    found = checkpoint.newest(output / "checkpoints")
    return found is not None and int(found.name.removeprefix("step-")) >= KILL_AFTER


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """The folder of the same run, all of whose processes were killed after a checkpoint of step 4 or later."""
    output = folder / "killed"
    kill_when(config(folder), RANKS, digits(folder, "killed"), lambda: reached(output), folder / "log")
    assert not (output / report.METRICS).exists(), "the run was over before it could be killed"
    return output


@SHARED
@pytest.mark.timeout(240)
def test_spardl_trains_on_several_ranks(uninterrupted: dict[str, Any], folder: Path) -> None:
    summary, history = uninterrupted["summary"], uninterrupted["history"]
    assert (summary["steps"], summary["size"], summary["algorithm"]) == (STEPS, RANKS, "spardl")
    assert summary["identical"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert summary["scores"]["accuracy"] > 0.3  # chance is 0.1
    assert summary["ratio"] > 60
    assert history[-1]["bytes_total"] == summary["bytes_sent"] == sum(record["bytes"] for record in history)
    assert (folder / "whole" / report.PLOT).read_bytes().startswith(b"\x89PNG")
    kept = [path.name for path in checkpoint.complete(folder / "whole" / "checkpoints")]
    assert kept == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


@SHARED
@pytest.mark.timeout(240)
def test_torchrun_restarts_a_job_whose_worker_was_killed(uninterrupted: dict[str, Any], folder: Path) -> None:
    """One rank ends by SIGKILL in a step. The job goes on from its checkpoint: what the ranks owe is kept to the bit,
    the losses continue, and the weights are those of a run that nothing has disturbed."""
    at = STEPS - EVERY + 1
    done = restarted(config(folder), RANKS, [*digits(folder, "elastic"), "--kill", f"1@{at}"])
    assert done.returncode == 0, done.stdout + done.stderr
    # "checkpoint after step 18: loss 1.889712, owed +2.153528024e+02, bits 43cf4f7191647032"
    told = re.findall(r"^(checkpoint|went on) after step (\d+): (.* bits .*)$", done.stdout, re.MULTILINE)
    steps = [(what, int(step)) for what, step, _ in told]
    before = [("checkpoint", step) for step in range(EVERY, at, EVERY)]
    assert steps == [*before, ("went on", at - 1), ("checkpoint", STEPS)]
    (saved, resumed, last) = [text for _, _, text in told[-3:]]
    assert saved == resumed != last
    found = report.read(folder / "elastic")
    losses = [[record["loss"] for record in run["history"]] for run in (uninterrupted, found)]
    assert losses[0] == losses[1]
    assert found["summary"]["identical"]
    assert found["summary"]["sha256"] == uninterrupted["summary"]["sha256"]
    assert done.stdout.count(f"loss {losses[0][at - 2]:.6f}") == 2
    assert f"trained {STEPS} steps: loss {losses[0][-1]:.6f}, weights {found['summary']['sha256'][:16]}" in done.stdout


@SHARED
@pytest.mark.timeout(240)
def test_a_killed_run_resumes_on_fewer_ranks(killed: Path, folder: Path) -> None:
    copy = folder / "fewer"
    shutil.copytree(killed, copy)
    done = finish(config(folder), RANKS - 1, digits(folder, "fewer"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = report.read(copy)["summary"]
    assert (summary["size"], summary["steps"]) == (RANKS - 1, STEPS)
    assert summary["identical"]


@SHARED
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (2, ["batchh=64"], "unknown key 'batchh' (did you mean 'batch'?)"),
        (1, ["seed=3"], "of another run: seed was 0 and is 3. Choose another output, or set checkpoint.resume=false"),
    ],
)
def test_a_mistake_is_one_line_of_one_rank(
    killed: Path, folder: Path, ranks: int, overrides: list[str], words: str
) -> None:
    done = finish(config(folder), ranks, [*digits(folder, "killed"), *overrides])
    assert done.returncode == 2, done.stderr
    # Once the ranks have met, the first one has said how.
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("sparcomm: [rank 0/1] launcher none: ")]
    assert line.startswith("error: ")
    assert words in line
    assert not (killed / report.METRICS).exists()


TINY_CHARLM = [
    "task={name: charlm, layers: 1, width: 32, heads: 2, context: 32, validation_windows: 8}",
    *("batch=8", "steps=6", "evaluate_every=4"),
]


@pytest.mark.timeout(240)
def test_rows_travel_alone_in_the_embedding_job(tmp_path: Path) -> None:
    """The table's gradient of sparse layout, the rest dense by the backend's own all-reduce."""
    settings = ["task.layout=sparse", "steps=30", "evaluate_every=0", "schedule.warmup=0", f"output={tmp_path}"]
    done = finish(demo.CONFIGS / "embedding-dense.yaml", 2, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = report.read(tmp_path)["summary"]
    assert summary["identical"]
    assert summary["scores"]["accuracy"] > 0.12  # the most frequent class has 0.075
    assert summary["ratio"] > 9


@pytest.mark.timeout(240)
def test_the_demo_puts_both_arms_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        demo.main(["--task", "charlm", "--ranks", "2", "--output", str(tmp_path), *TINY_CHARLM, "tensorboard=true"])
        == 0
    )
    shown = capfd.readouterr().out
    for text in ("side by side", "times fewer bytes over the whole run", "step 4: loss", "bits/char"):
        assert text in shown
    assert (tmp_path / report.PLOT).exists()
    dense, spardl = (report.read(tmp_path / arm)["summary"] for arm in ("dense", "spardl"))
    assert dense["bytes_sent"] > 30 * spardl["bytes_sent"] > 0
    assert dense["ratio"] == pytest.approx(1.0, rel=0.01)
    for arm, summary in (("dense", dense), ("spardl", spardl)):
        assert summary["identical"]
        assert 0 < summary["scores"]["bits"] < 8
        assert list((tmp_path / arm / "tensorboard").glob("events.*"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs of one rank, run here: what starts processes is tested above, and each costs seconds."""

    def run(config: Path, ranks: int, output: Path, overrides: list[str], *, quiet: bool) -> dict[str, Any]:
        assert (ranks, quiet) == (1, True)
        assert train.main(["--config", str(config), *overrides, f"output={output}", "checkpoint.resume=false"]) == 0
        return report.read(output)

    monkeypatch.setattr(compare, "run", run)
    threads = torch.get_num_threads()
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(threads)


@pytest.mark.timeout(240)
def test_the_comparison_pairs_seeds(tmp_path: Path, in_this_process: None) -> None:
    where = ["--output", str(tmp_path), "--json", str(tmp_path / "found.json")]
    spardl = f"{demo.CONFIGS}/charlm-spardl.yaml"
    arms = [f"--base={demo.CONFIGS}/charlm-dense.yaml", "--arms", f"{spardl} algorithm.density=0.1"]
    how = [*TINY_CHARLM, "steps=1", "--seeds", "2", "--first-seed", "7", "--ranks", "1", "--reuse", *where, *arms]
    assert compare.main(how) == 0
    base, arm = json.loads((tmp_path / "found.json").read_text())
    assert (base["label"], arm["label"]) == ("charlm-dense", "charlm-spardl algorithm.density=0.1")
    assert [summary["seed"] for summary in arm["runs"]] == [7, 8]
    assert base["difference"] is None
    assert arm["difference"]["low"] <= arm["difference"]["mean"] <= arm["difference"]["high"]
    # One step from the same weights on the same batch: only the update can differ.
    assert [s["train_loss"] for s in arm["runs"]] == [s["train_loss"] for s in base["runs"]]
    # Again: runs of the same settings that have finished are taken, others are not.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(report.METRICS)}
    assert len(written) == 4
    assert compare.main(how) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for path in written:
        read = compare.Arm.parse(str(next(iter(demo.CONFIGS.glob(f"{path.parent.name[:10]}*.yaml")))))
        assert compare.finished(read, [*TINY_CHARLM, "steps=2"], path.parent) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1"], "at least 2"),
        (["--first-seed", "-1"], "between 0 and"),
        (["--seeds", "5", "--first-seed", str(compare.TUNING_SEED - 4)], "between 0 and"),
        (["--arms", "configs/digits-plain.yaml", "configs/digits-plain.yaml"], "'digits-plain' comes twice"),
        (["--arms", f"{demo.CONFIGS}/digits-plain.yaml", "steps=400"], "no configuration 'steps=400'"),
        (["--arms", f"{demo.CONFIGS}/digits-plain.yaml batchh=4"], "did you mean 'batch'?"),
    ],
)
def test_seeds_that_cannot_be_compared_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1", "1@0", "-1@3", "one@3"])
def test_a_victim_has_a_rank_and_a_step(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic.main([f"--kill={text}"])
    assert "must look like 1@12" in capsys.readouterr().err


@pytest.mark.parametrize("program", [compare, demo])
@pytest.mark.parametrize("ranks", ["0", "-1", "two"])
def test_a_job_needs_a_rank(program: Any, ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--ranks", ranks])
    assert "--ranks" in capsys.readouterr().err
