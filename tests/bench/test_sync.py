"""``sparcomm bench`` as it is run: rows in processes of their own, and what they say when these come to grief."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparcomm.algorithms.spardl import SparDL
from sparcomm.bench import report
from support import mpi

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 220
N = 60_000


def bench(*arguments: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, by itself or under a launcher, and returns what it printed."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, *launcher, "-m", "sparcomm", "bench", *arguments]
    env = {**os.environ, "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR", **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE)


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
NAMES = [
    "dense",
    "support.faulty.Aborting",
    "support.faulty.Faulty:step=1",
    "support.faulty.Leaving:step=0",
    "support.faulty.Late",
    "support.faulty.Hanging",
    "spardl:density=0.02",
    "topk",
    "torch:fp16",
    "torch:bf16",
    "torch:powersgd:rank=2",
]


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_rows_survive_each_other_and_keep_the_contract() -> None:
    done = bench(
        "--numel", str(N), "--density", "0.01", "--values", "bfloat16", "--steps", "3", "--timeout", "12",
        "--algorithms", ",".join(NAMES), "--json", launcher=TORCHRUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = objects(done)
    assert [row["algorithm"] for row in rows] == NAMES
    failed = {row["algorithm"].split(":")[0].rpartition(".")[2]: row for row in rows if "error" in row}
    assert {name: row["error"] for name, row in failed.items() if name != "Hanging"} == {
        "Aborting": "rank 1: ended by SIGABRT: terminate called after nothing in particular",
        "Faulty": "rank 1: ValueError: this rank",
        "Leaving": "rank 1: ended with exit code 7",
        "Late": "rank 1: ValueError: this rank",
    }
    assert "timed out: no step completed in 12 s" in failed["Hanging"]["error"]
    for row in rows:
        good = "error" not in row
        assert set(row) == set(report.KEYS) | (set() if good else {"error"})
        assert (row["numel"], row["size"]) == (N, 2)
        assert all((row[key] is not None) == good for key in report.KEYS[4:])
    measured = {row["algorithm"]: row for row in rows if "error" not in row}
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in measured.values())
    assert measured["dense"]["bytes_sent"] == 4 * N
    assert measured["torch:fp16"]["bytes_sent"] == measured["torch:bf16"]["bytes_sent"] == 2 * N
    # Rank 2 of a 244 x 245 matrix: P and Q travel, and the 220 elements that are left over.
    assert measured["torch:powersgd:rank=2"]["bytes_sent"] == 4 * (2 * (244 + 245) + 220)
    ours = measured["spardl:density=0.02"]
    assert (ours["rounds"], ours["messages"], ours["bytes_sent"]) == tuple(
        SparDL(density=0.02, values="bfloat16").cost(N, torch.float32, 2)
    )
    assert ours["kept"] == 1200
    assert 0.5 < ours["energy"] < 1 < measured["topk"]["energy"]
    assert measured["dense"]["energy"] == pytest.approx(1)
    assert measured["torch:bf16"]["energy"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_training_steps_with_ranks_of_its_own(tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    done = bench(
        "--ranks", "2", "--model", "mlp", "--batch", "2", "--steps", "2", "--bucket-mb", "2", "--timeout", "60",
        "--algorithms", "dense,torch:bf16,spardl", "--json", "--png", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, bf16, ours = objects(done)
    numel = dense["numel"]
    assert numel == 4 * (1024 * 1024 + 1024) + 10 * 1025
    assert all(row["model"] == "mlp" and row["seconds"] > 0 for row in (dense, bf16, ours))
    assert dense["bytes_sent"] == 4 * numel == 2 * bf16["bytes_sent"]
    assert ours["kept"] == pytest.approx(0.01 * numel, rel=0.01)
    assert ours["bytes_sent"] < dense["bytes_sent"] / 50
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_under_mpirun_over_both_ways() -> None:
    """The same sums and the same bytes; a rank that fails takes its row with it, and nothing else."""
    names = ["dense", "support.faulty.Faulty:step=1", "spardl:density=0.02", "torch:bf16"]
    done = mpi.mpirun(
        2, "-m", "sparcomm", "bench", "--numel", str(N), "--steps", "2", "--timeout", "30", "--over", "mpi,gloo",
        "--algorithms", ",".join(names), "--json", timeout=200, TORCH_CPP_LOG_LEVEL="ERROR",
    )  # fmt: skip
    assert done.code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert [(row["algorithm"], row["over"]) for row in rows] == [(n, w) for n in names for w in ("mpi", "gloo")]
    for over_mpi, over_gloo in zip(rows[::2], rows[1::2], strict=True):
        same = ("bytes_sent", "rounds", "messages", "kept", "energy", "size", "error")
        assert [over_mpi.get(key) for key in same] == [over_gloo.get(key) for key in same]
        assert ("error" in over_mpi) == ("Faulty" in over_mpi["algorithm"])
    assert rows[2]["error"] == "rank 1: ValueError: this rank"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_overlap_counts_every_bucket() -> None:
    done = bench(
        "overlap", "--ranks", "2", "--layers", "6", "--width", "512", "--batch", "4", "--steps", "2", "--timeout", "60",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = objects(done)
    assert row["buckets"] == 6
    assert row["numel"] == 6 * 512 * 512
    assert row["bytes_sent"] == 6 * SparDL().cost(512 * 512, torch.float32, 2).bytes_sent
    assert row["wire_seconds"] > 0
    assert row["hidden"] == pytest.approx((row["inline_seconds"] - row["overlapped_seconds"]) / row["wire_seconds"])
