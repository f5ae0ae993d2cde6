"""The ranks of a benchmark: started by a launcher, by ``--ranks``, or one alone; and the store they agree through.

These are the parents. They measure nothing themselves: every row runs in children (rows.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sparcomm.bench.child import PATIENCE, end_with
from sparcomm.bench.options import Common
from sparcomm.errors import ConfigError, ConfigMismatch, PeerError
from sparcomm.launch.environment import detect
from sparcomm.launch.variables import export, of_ranks

LAUNCHER = "SPARCOMM_BENCH_LAUNCHER"  # its process, which the ranks do not outlive
GRACE = 5.0  # seconds the other ranks have after the first has failed


@dataclass
class World:
    """One rank's place.

    Attributes:
        store: shared by all ranks; ``host`` and ``port`` are where children find it.
        token: differs between runs.
    """

    rank: int
    size: int
    host: str
    port: int
    store: Any
    token: str = ""

    def get(self, key: str, timeout: float) -> Any:
        """What some rank has set. Raises PeerError if that takes more than ``timeout`` seconds."""
        try:
            self.store.wait([key], timedelta(seconds=timeout))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank} waited {timeout:g} s for {key!r}: a rank is gone") from error

    def set(self, key: str, value: Any) -> None:
        """Publishes ``value`` as JSON."""
        try:
            self.store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank}: rank 0, which keeps the store, is gone") from error


def join(options: Common) -> World:
    """This rank's place. Collective over the ranks of the launcher.

    Raises:
        ConfigError: the environment says half of what it must.
        ConfigMismatch: ranks were started with different options.
        PeerError: a rank did not come.
    """
    if os.environ.get(LAUNCHER, "").isdecimal():
        end_with(int(os.environ[LAUNCHER]))
    found = place()
    patience = timedelta(seconds=options.timeout + PATIENCE)
    if found is None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)  # pyright: ignore[reportPrivateImportUsage]
        world = World(0, 1, "127.0.0.1", store.port, store)
    else:
        rank, size, host, port = found
        try:
            store, *_ = next(rendezvous("env://", timeout=patience))
        except RuntimeError as error:
            raise PeerError(f"rank {rank} of {size}: no rendezvous at {host}:{port}: {error}") from error
        world = World(rank, size, host, port, store)
    agree(world, options)
    return world


def leave(world: World, timeout: float) -> None:
    """After the last use of the store: returns on rank 0, which may be its home, when all others have come here."""
    if world.rank:
        world.set(f"{world.token}/left/{world.rank}", True)
    else:
        for rank in range(1, world.size):
            world.get(f"{world.token}/left/{rank}", timeout)


def place() -> tuple[int, int, str, int] | None:
    """(rank, size, host, port) by any launcher, set in the environment, too; None if there is none, or one rank alone.

    Collective under mpirun, which says nothing of host and port: the ranks agree on them by MPI.

    Raises:
        ConfigError: the launcher says half, or nothing says where ranks can meet.
    """
    found = detect(os.environ)
    if found.size == 1 and found.host is None:
        return None
    if found.host is None:
        try:
            import sparcomm.mpi_backend  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise ConfigError(f"{found.launcher} has started {found.size} ranks: {error}") from error
    export(found)
    return found.rank, found.size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def launch(ranks: int, command: Sequence[str]) -> int:
    """Runs ``command`` as so many ranks of this machine, over a store kept here. Returns the first exit code not 0."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    started = [
        subprocess.Popen([sys.executable, "-m", *command], env=environ)
        for environ in of_ranks(ranks, store.port, {**os.environ, LAUNCHER: str(os.getpid())})
    ]
    status, deadline, waiting = 0, float("inf"), list(started)
    try:
        while waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            for process in [p for p in waiting if p.poll() is not None]:
                waiting.remove(process)
                if process.returncode and not status:
                    status, deadline = process.returncode, time.monotonic() + GRACE
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return status if status >= 0 else 128 - status


def agree(world: World, options: Common) -> None:
    """Gives the run its name, and compares the options. Collective. Raises ConfigMismatch on all ranks alike."""
    mine = {name: str(value) for name, value in asdict(options).items()}
    if world.rank:
        first = world.get("sparcomm-bench", options.timeout + PATIENCE)
        different = [f"{name}={mine.get(name)} here, {value} there" for name, value in first["options"].items()
                     if mine.get(name) != value]  # fmt: skip
        world.token = first["token"]
        world.set(f"{world.token}/options/{world.rank}", different)
    else:
        world.token = f"sparcomm-bench/{uuid.uuid4().hex}"
        world.set("sparcomm-bench", {"token": world.token, "options": mine})
    for rank in range(1, world.size):
        if different := world.get(f"{world.token}/options/{rank}", options.timeout + PATIENCE):
            raise ConfigMismatch(f"rank {rank} was started with other options than rank 0: {'; '.join(different)}")
