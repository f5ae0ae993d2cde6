"""Starts whole torchrun jobs as child processes, for the programs that compare runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import report

LAUNCH = Path(__file__).resolve().parent.parent
TRAIN, RANKS = LAUNCH / "train.py", LAUNCH / "ranks.py"


def positive(text: str) -> int:
    """An argument that counts something: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


class JobFailed(Exception):
    """A torchrun job ended with an error; it has printed why."""


def command(config: Path, ranks: int, overrides: list[str]) -> list[str]:
    """The command line of a job on this host; a single rank needs no launcher."""
    torchrun = [str(RANKS), "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(TRAIN), "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread a rank, since the ranks share this host's cores."""
    root = str(LAUNCH.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run(config: Path, ranks: int, output: Path, overrides: list[str], *, quiet: bool = False) -> dict[str, Any]:
    """Runs one job to its end and returns its metrics.

    Raises:
        JobFailed: it ended with another code than 0.
    """
    # A comparison measures whole runs, so none may continue an earlier one.
    arguments = [*overrides, f"output={output}", "checkpoint.resume=false"]
    done = subprocess.run(
        command(config, ranks, arguments),
        env=environment(),
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    if done.returncode:
        raise JobFailed(f"{config} on {ranks} ranks ended with exit code {done.returncode}")
    return report.read(output)
