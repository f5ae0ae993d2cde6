"""The transport under mpirun: the conformance suite and its own laws at every size, and how failures end all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.mpi import MISSING, check, mpirun

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CHECKS = Path(__file__).parent.parent / "support" / "mpi_conformance.py"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_conformance(size: int, tmp_path: Path) -> None:
    check(size, CHECKS, tmp_path, least=26)


# ---- failures: rank 1 goes wrong, rank 0 waits for it, rank 2 is busy with something else --------------------------

FAILING = """
import os, signal, sys, threading, time, torch
from sparcomm.transport.mpi import MpiTransport, ending
how, one = sys.argv[1], os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1"
if one and how == "raises early":
    raise ImportError("no such module")
t = MpiTransport.world(timeout=float(sys.argv[2]))
t.context = "step 7"
x = torch.ones(3)
t.all_reduce(x)
if how == "stops inside":
    ending.GRACE = 0.5
    if one:
        here = t._all_here
        t._all_here = lambda peers: (here(peers), os.kill(os.getpid(), signal.SIGSTOP))
    t.all_reduce(x, native=True)
if one:
    if how == "dies":
        os._exit(7)
    elif how == "leaves":
        sys.exit("I have had enough")
    elif how == "raises on a thread":
        threading.Thread(target=lambda: {}["no such key"]).start()
    time.sleep(600)
if t.rank == 2:
    time.sleep(600)
t.exchange(x, 1, torch.empty(3), 1)
"""
WAITED = "PeerError: step 7: exchange(send to float32[3] 1, recv from float32[3] 1): waiting for rank 1 of"


def failing(tmp_path: Path, size: int, how: str, timeout: float, code: int = 1) -> str:
    """What all ranks print. They end with an error, by themselves, long before the sleepers wake."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    ended = mpirun(size, script, how, str(timeout), timeout=90)
    assert ended.code == code, ended
    return ended.output


def test_an_exception_on_a_thread_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 3, "raises on a thread", 300)
    assert "[rank 1 of 3] KeyError: 'no such key'" in output
    assert f"[rank 0 of 3] sparcomm.errors.{WAITED} 3" in output
    assert "rank 1 of the job failed: KeyError: 'no such key'" in output


def test_an_exception_before_the_ranks_have_met_ends_all(tmp_path: Path) -> None:
    assert "[rank 1 of 2] ImportError: no such module" in failing(tmp_path, 2, "raises early", 300)


def test_a_rank_that_leaves_ends_those_who_wait_for_it(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "leaves", 300)
    assert "I have had enough" in output
    assert WAITED in output
    assert "rank 1 of the job came to the end of the program (or sys.exit) before" in output


def test_a_rank_that_is_late_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "is late", 0.5)
    assert WAITED in output
    assert "nothing within 0.5 s" in output


def test_a_rank_that_stops_in_a_call_that_cannot_be_left_ends_all(tmp_path: Path) -> None:
    output = failing(tmp_path, 2, "stops inside", 0.5)
    said = "PeerError: step 7: all_reduce(x float32[3], sum, native): waiting for rank 1 of 2"
    assert f"[rank 0 of 2] sparcomm.errors.{said}" in output
    assert "in MPI_Allreduce: not through within 0.5 s" in output
    assert "[rank 0 of 2] no answer within 0.5 s, and so stuck or busy: rank 1" in output


def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    """By the launcher, which passes its exit status on; what MPI prints of it is the vendor's."""
    failing(tmp_path, 2, "dies", 300, code=7)
