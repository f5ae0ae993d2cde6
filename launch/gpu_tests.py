#!/usr/bin/env python3
"""Runs every GPU test in several processes that share the GPU, with no plugin but tests/support/borrowed.py.

    python3 launch/gpu_tests.py [--out runs/gpu-check] [--shards 4] [--marked gpu] [PATH ...]

Without paths: tests/kernels, tests/gpu, and other files that say mark.gpu. Ends with 1 if a test has failed, or if
there was none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NONE_FOUND = 5  # pytest's exit code
# The project's own settings ask for plugins that may be missing.
SETTINGS = """\
[pytest]
addopts = --import-mode=importlib -ra -p no:cacheprovider -p support.borrowed
xfail_strict = true
markers =
    slow: takes more than a second of CPU
    torchrun: starts real processes with torchrun
    gpu: needs a CUDA device
    mpi: runs under mpirun
    timeout: for pytest-timeout
    xdist_group: for pytest-xdist
"""


def paths() -> list[str]:
    """Where GPU tests are, from the root."""
    folders = [folder for folder in ("tests/kernels", "tests/gpu") if (ROOT / folder).is_dir()]
    files = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py")))
    said = [name for name in files if re.search(r"\bmark\.gpu\b", (ROOT / name).read_text(encoding="utf-8"))]
    return [*folders, *(name for name in said if not name.startswith(tuple(f"{folder}/" for folder in folders)))]


def run(out: Path, shards: int, marked: str, wanted: Sequence[str]) -> int:
    """All shards at once, then what they have said. 0 if there were tests and all passed."""
    out.mkdir(parents=True, exist_ok=True)
    settings = out / "pytest.ini"
    settings.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(ROOT), "-q", "-m", marked, *wanted]
    logs = [out / f"tests-{shard}.log" for shard in range(shards)]
    processes: list[subprocess.Popen[bytes]] = []
    known = [*(str(ROOT / name) for name in ("", "tests", "launch")), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, known))}
    for shard, log in enumerate(logs):
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=env | {"SHARD": f"{shard}/{shards}"}, stdout=file, stderr=subprocess.STDOUT
                )
            )
    codes = [process.wait() for process in processes]
    for shard, (code, log) in enumerate(zip(codes, logs, strict=True)):
        print(f"-- shard {shard} of {shards}, exit code {code}")
        print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    return 0 if set(codes) <= {0, NONE_FOUND} and 0 in codes else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for."""
    lines = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=lines[0], epilog=lines[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="for logs")
    parser.add_argument("--shards", type=int, default=4, help="processes (4)")
    parser.add_argument("--marked", default="gpu", help="pytest's -m (gpu)")
    parser.add_argument("paths", nargs="*", help="of tests")
    options = parser.parse_args(argv)
    if options.shards < 1:
        parser.error(f"--shards {options.shards}: must be at least 1")
    return run(options.out.absolute(), options.shards, options.marked, options.paths or paths())


if __name__ == "__main__":
    sys.exit(main())
