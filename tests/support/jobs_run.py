"""Real torchrun jobs for tests: started, awaited, and killed as a power failure would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from jobs.launcher import command, environment

DEADLINE = 90.0


def finish(config: Path, ranks: int, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a job to its end; the caller looks at the exit code."""
    return subprocess.run(
        command(config, ranks, overrides),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def kill_when(config: Path, ranks: int, overrides: list[str], reached: Callable[[], bool], log: Path) -> None:
    """Starts a job and sends SIGKILL to all its processes at once as soon as ``reached``."""
    with log.open("wb") as out:
        job = subprocess.Popen(command(config, ranks, overrides), env=environment(), stdout=out, stderr=out)
        try:
            end = time.monotonic() + DEADLINE
            while not reached():
                assert job.poll() is None, f"the job ended by itself:\n{log.read_text()}"
                assert time.monotonic() < end, f"nothing to kill after {DEADLINE} s:\n{log.read_text()}"
                time.sleep(0.005)
        finally:
            family = [job.pid, *children(job.pid)]
            # Stopped first, so that none of them sees another die.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            job.wait()


def kill_one_when(
    config: Path, ranks: int, overrides: list[str], reached: Callable[[], bool], rank: int, log: Path
) -> tuple[int, str]:
    """Starts a job that torchrun may restart once, and sends SIGKILL to one rank as soon as ``reached``.

    Returns the exit code and all that was printed, once the job has ended.
    """
    line = command(config, ranks, overrides)
    line.insert(line.index("--standalone"), "--max-restarts=1")
    with log.open("wb") as out:
        job = subprocess.Popen(line, env=environment(), stdout=out, stderr=out)
        try:
            end = time.monotonic() + DEADLINE
            while not reached():
                assert job.poll() is None, f"the job ended by itself:\n{log.read_text()}"
                assert time.monotonic() < end, f"nothing to kill after {DEADLINE} s:\n{log.read_text()}"
                time.sleep(0.005)
            (victim,) = [pid for pid in children(job.pid) if _is_rank(pid, rank)]
            os.kill(victim, signal.SIGKILL)
            job.wait(DEADLINE)
        finally:
            for pid in [job.pid, *children(job.pid)] if job.poll() is None else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.wait()
    return job.returncode, log.read_text()


def _is_rank(pid: int, rank: int) -> bool:
    """Whether a process is this rank of a job: what it was started as says so."""
    try:
        given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return f"RANK={rank}".encode() in given and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """All descendants of a process (torchrun gives each rank a session of its own, so its group is not enough)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        mine = [child for child, its in parents.items() if its == parent]
        found += mine
        todo += mine
    return found
