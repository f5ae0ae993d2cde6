"""A rank's process for one row: joins the others of its row, measures, says what came of it, and ends.

What goes wrong in here, an abort in C++ included, ends this process and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from sparcomm.bench.options import Common
from sparcomm.bench.sample import Progress
from sparcomm.kernels import warm_up
from sparcomm.transport.common import BaseTransport
from sparcomm.transport.torchdist import TorchTransport

PATIENCE = 60.0  # seconds by which the ranks' own waits outlast the parents', so that the parents decide
_DIE_WITH_PARENT = 1  # prctl(PR_SET_PDEATHSIG)


@dataclass(frozen=True)
class Job:
    """What a child is to do.

    Attributes:
        kind: the module of ``sparcomm.bench`` whose ``measure(job, progress) -> Sample`` does it.
        typed: the algorithm.
        options: of the benchmark.
        rank, size: in the group of this row.
        host, port, prefix: the store through which the row's ranks meet, and where in it.
        log: file for what the process prints.
        over: what messages go over, see ``options.WAYS``.
    """

    kind: str
    typed: str
    options: Common
    rank: int
    size: int
    host: str
    port: int
    prefix: str
    log: str
    over: str = "gloo"

    @property
    def patience(self) -> timedelta:
        """How long the row's ranks wait for each other; longer than their parents, if they have any."""
        return timedelta(seconds=self.options.timeout + (PATIENCE if self.over == "gloo" else 0))

    def transport(self) -> BaseTransport:
        """Over the ranks of the row. Collective."""
        if self.over == "gloo":
            return TorchTransport.from_group(timeout=self.patience)
        from sparcomm.transport.mpi import MpiTransport

        return MpiTransport.world(timeout=self.patience)


def run(job: Job, connection: Connection, parent: int) -> None:
    """The life of a child. Sends ("step", number), at most one a second, then ("result", ...) or ("error", text)."""
    end_with(parent)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(job.options.threads)
    try:
        warm_up()  # before anyone waits for anyone
        with group(job):
            sample = import_module(f"sparcomm.bench.{job.kind}").measure(job, _progress(connection))
            dist.barrier()  # nobody leaves while another still reads its last bytes
        connection.send(("result", asdict(sample)))
    except BaseException as error:  # noqa: BLE001  the row says so, whatever it is
        connection.send(("error", one_line(error)))
        os._exit(1)  # waits for nothing: not for groups that are broken, nor for threads that hang


@contextlib.contextmanager
def group(job: Job) -> Iterator[None]:
    """The default process group of the row's ranks. Ended only if all went well: else it may hang."""
    store = dist.TCPStore(job.host, job.port, is_master=False, timeout=job.patience)  # pyright: ignore[reportPrivateImportUsage]
    meeting, backend = PrefixStore(job.prefix, store), {"gloo": "gloo", "mpi": "mpi4py"}[job.over]
    dist.init_process_group(backend, store=meeting, rank=job.rank, world_size=job.size, timeout=job.patience)
    yield
    dist.destroy_process_group()


def end_with(parent: int) -> None:
    """Asks Linux to end this process when its parent ends; ends it at once if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)


def _progress(connection: Connection) -> Progress:
    last = 0.0

    def progress(number: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 1:  # waking the parent at every step would disturb short ones
            last = now
            connection.send(("step", number))

    return progress


def one_line(error: BaseException) -> str:
    """What went wrong, for a table."""
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
