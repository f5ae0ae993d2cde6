"""Real torchrun jobs for tests: started, awaited, and killed as a power failure would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jobs.launcher import TRAIN, command, environment
from sparcomm.config import algorithm_from_config
from sparcomm.doctor import step
from sparcomm.transport import sim

DEADLINE = 100.0


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


def restarted(config: Path, ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs launch/elastic.py to its end; torchrun may start it again once."""
    line = command(config, ranks, arguments)
    at = line.index(str(TRAIN))
    line[at : at + 1] = ["--max-restarts=1", str(TRAIN.with_name("elastic.py"))]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=False)


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


def check_sums(printed: str, size: int, launcher: str) -> None:
    """Ranks of ``sparcomm.doctor.step``: all are there, and have the sums that the simulator gives."""
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert sorted(found["rank"] for found in ranks) == list(range(size)), printed
    assert {(found["size"], found["launcher"]) for found in ranks} == {(size, launcher)}
    algorithm = algorithm_from_config({"name": "spardl"})
    expected = sim.run(size, lambda t: step.reduce(algorithm, t, torch.device("cpu"))).results
    assert {found["sha256"] for found in ranks} == set(expected)
