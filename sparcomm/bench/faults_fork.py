"""A process that has loaded everything and forks ranks on demand, so that a rank costs a tenth of a second.

Run as ``python -m sparcomm.bench.faults_fork``. It reads one job a line, and prints the process ids it has made and how
they ended. A rank returns from the loop, does its job, and ends as any script does: what hangs at exit hangs here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def load() -> None:
    """Imports what a rank needs. DDP itself would import eight hundred modules of the compiler, in every rank."""
    for name in ("torch._dynamo", "torch.profiler", "sparcomm.bench.faults_rank"):
        import_module(name)
    import_module("sparcomm.kernels").warm_up()
    import_module("torch").set_num_threads(1)
    gc.collect()
    gc.freeze()  # forks then share the pages


def wait_for_job() -> dict[str, Any]:
    """Forks a rank for every line of stdin and returns in it, with its job. Ends the process when stdin does."""
    parent, buffer = os.getpid(), b""
    print(json.dumps({"ready": parent}), flush=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                os._exit(0)
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                job = json.loads(line)
                child = os.fork()
                if child == 0:
                    _settle(job, parent)
                    return job
                print(json.dumps({"pid": child, "world": job["world"], "rank": job["rank"]}), flush=True)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                print(json.dumps({"ended": ended[0], "status": os.waitstatus_to_exitcode(ended[1])}), flush=True)


def _settle(job: dict[str, Any], parent: int) -> None:
    """A fork's own life: ends with its parent, writes to a log, where SIGUSR1 makes it write its stacks, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    log = os.open(Path(job["folder"]) / f"{job['rank']}.log", os.O_WRONLY | os.O_CREAT)
    for fd, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


if __name__ == "__main__":
    load()
    import_module("sparcomm.bench.faults_rank").be_rank(wait_for_job())
