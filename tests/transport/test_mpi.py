"""The transport under mpirun: the conformance suite and its own laws at every size, and how failures end all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.mpi import MISSING, mpirun

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CHECKS = Path(__file__).parent.parent / "support" / "mpi_conformance.py"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_conformance(size: int, tmp_path: Path) -> None:
    ended = mpirun(size, CHECKS, tmp_path)
    reports = {p.stem: json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))}
    assert list(reports) == [str(r) for r in range(size)], ended.output
    wrong = [f"--- rank {r}, {name}\n{text}" for r, checks in reports.items() for name, text in checks.items() if text]
    assert not wrong, "\n".join(wrong)
    assert all(len(checks) > 25 for checks in reports.values())
    assert ended.code == 0, ended.output


# ---- failures: rank 1 goes wrong, rank 0 waits for it, rank 2 is busy with something else --------------------------

FAILING = """
import os, sys, threading, time, torch
from sparcomm.transport.mpi import MpiTransport
t = MpiTransport.world(timeout=float(sys.argv[2]))
t.context = "step 7"
x = torch.ones(3)
t.all_reduce(x)
if t.rank == 1:
    if sys.argv[1] == "dies":
        os._exit(7)
    elif sys.argv[1] == "raises":
        raise ValueError("the data ran out")
    elif sys.argv[1] == "raises on a thread":
        threading.Thread(target=lambda: {}["no such key"]).start()
    time.sleep(600)
if t.rank == 2:
    time.sleep(600)
t.exchange(x, 1, torch.empty(3), 1)
"""


def failing(tmp_path: Path, size: int, how: str, timeout: float) -> str:
    """What all ranks print. They end with an error, by themselves, long before the sleepers wake."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    ended = mpirun(size, script, how, str(timeout), timeout=90)
    assert ended.code > 0, ended
    return ended.output


def test_an_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 3, "raises", 300)
    assert "[rank 1 of 3] ValueError: the data ran out" in output
    waited = "[rank 0 of 3] sparcomm.errors.PeerError: step 7: exchange(send to float32[3] 1, recv from float32[3] 1): "
    assert waited in output
    assert "rank 1 of the job failed: ValueError: the data ran out" in output


def test_an_exception_on_a_thread_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "raises on a thread", 300)
    assert "[rank 1 of 2] KeyError: 'no such key'" in output
    assert "rank 1 of the job failed: KeyError: 'no such key'" in output


def test_a_rank_that_is_late_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "is late", 0.5)
    assert (
        "PeerError: step 7: exchange(send to float32[3] 1, recv from float32[3] 1): waiting for rank 1 of 2" in output
    )
    assert "nothing within 0.5 s" in output


def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "dies", 300)
    assert "7" in output
