"""``init()``: finds the launcher, chooses, starts torch.distributed, and says on rank 0 what it did."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sparcomm.errors import ConfigError, ConfigMismatch, PeerError
from sparcomm.launch.choose import BACKENDS, Host, Plan, plan
from sparcomm.launch.environment import MPI, Found, detect
from sparcomm.launch.variables import export

TIMEOUT = 300.0

_log = logging.getLogger("sparcomm")


@dataclass(frozen=True)
class Launch:
    """Where this process stands, and what it runs on.

    Attributes:
        rank, size: in the whole job.
        local_rank: among the ranks of this host.
        device: this rank's; the current CUDA device if it is one.
        backend: of the default process group: "gloo", "nccl", "mpi4py", or what somebody else has chosen.
        launcher: "torchrun", "environment", "openmpi", "mpich", "slurm", "ray", "none", or "initialised" if the
            process group had been there before.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    launcher: str


_launched: tuple[Launch, Any] | None = None  # and the process group it speaks of


def init(
    backend: str | None = None, *, device: str | None = None, timeout: float = TIMEOUT, quiet: bool = False
) -> Launch:
    """Starts the default process group, whoever has started this process. Collective; later calls only return.

    Knows torchrun (and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set by anyone), Open MPI, MPICH and Intel MPI,
    srun, Ray Train (or anyone else who has called ``init_process_group``), and a process started by hand, which gets
    a group of one. Sets these variables and LOCAL_RANK, LOCAL_WORLD_SIZE where they are unset, for libraries that
    read them. Under MPI an exception that nobody catches ends all ranks, if mpi4py is there.

    Args:
        backend: "gloo", "nccl" or "mpi4py". None: NCCL with a GPU each; else Gloo; mpi4py if the launcher is MPI's
            and MASTER_ADDR is not set.
        device: "cpu" or "cuda". None: ``cuda:local_rank`` where this host has a GPU for each of its ranks.
        timeout: seconds any wait may take: for the others to come, and for any collective operation.
        quiet: rank 0 does not say what it found. Otherwise it tells the logger "sparcomm", or stderr where nobody has
            set up logging.

    Raises:
        ConfigError: the environment says half, or contradicts itself, or what is asked for is impossible here.
        ConfigMismatch: ranks have chosen different backends; names who.
        PeerError: a rank did not come in time.
    """
    global _launched
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout!r}: must be a number of seconds above 0")
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: must be None or one of {', '.join(map(repr, BACKENDS))}")
    if dist.is_initialized():
        if _launched is None or _launched[1] is not dist.group.WORLD:
            _launched = _joined(), dist.group.WORLD
            _say(_launched[0], "the process group was there already", quiet)
        return _agreeing(_launched[0], backend, device)
    found = _found()
    chosen = plan(found, _host(), backend=backend, device=device, threads_set="OMP_NUM_THREADS" in os.environ)
    here = torch.device(chosen.device)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    _start(found, chosen, timedelta(seconds=timeout))
    launch = Launch(found.rank, found.size, found.local_rank, here, chosen.backend, found.launcher)
    _launched = launch, dist.group.WORLD
    where = f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if found.size > 1 else "alone"
    threads = torch.get_num_threads()
    _say(launch, f"{where}, {threads} thread{'s' * (threads > 1)} a rank, timeout {timeout:g} s", quiet)
    return launch


def _found() -> Found:
    found = detect(os.environ)
    if found.launcher in MPI and "sparcomm.mpi_backend" in sys.modules:
        # It has set the address itself, by way of MPI; that says nothing about what the user wants.
        found = replace(found, host=None, port=None)
    return found


def _host() -> Host:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Host(gpus, os.cpu_count() or 1, importlib.util.find_spec("mpi4py") is not None)


def _start(found: Found, chosen: Plan, limit: timedelta) -> None:
    """``init_process_group``. MPI's part comes first: whatever fails afterwards then ends all ranks."""
    bound = torch.device(chosen.device) if chosen.backend == "nccl" else None
    needed = chosen.backend == "mpi4py" or chosen.meet == "mpi"
    if needed or found.launcher in MPI:
        _start_mpi(found, chosen.backend, needed)
    if chosen.meet == "alone":
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(chosen.backend, timeout=limit, device_id=bound, store=store, rank=0, world_size=1)
        return
    export(found)
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        own = _own_part(store, found.size)
        _agree(own, found, chosen, limit)
        dist.init_process_group(chosen.backend, timeout=limit, device_id=bound, store=own, rank=rank, world_size=size)
    except RuntimeError as error:  # torch's own errors of stores and backends are
        if isinstance(error, PeerError):
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PeerError(
            f"rank {found.rank} of {found.size} ({found.launcher}): the ranks did not meet at {where} within "
            f"{limit.total_seconds():g} s: {error}"
        ) from error


def _own_part(store: Any, size: int) -> Any:
    """A part of the store that this start of the job has to itself.

    torchrun keeps one store over restarts, with the addresses of ranks that are gone; a group that is made again has
    the same ranks' old ones. Every start has all ranks arrive once before any of them can go on.
    """
    prefix = f"sparcomm/launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}"
    start = (store.add(f"{prefix}/arrived", 1) - 1) // size
    return dist.PrefixStore(f"{prefix}/{start}", store)  # pyright: ignore[reportPrivateImportUsage]


def _agree(store: Any, found: Found, chosen: Plan, limit: timedelta) -> None:
    """Compares the backends before they are started: one rank with NCCL and one with Gloo would wait for each other."""
    if found.rank:
        store.set(f"backend/{found.rank}", chosen.backend)
        different = json.loads(store.get("verdict"))
    else:
        keys = [f"backend/{rank}" for rank in range(1, found.size)]
        store.wait(keys, limit)
        theirs = [store.get(key).decode() for key in keys]
        different = {rank: name for rank, name in enumerate(theirs, 1) if name != chosen.backend}
        different = different and {0: chosen.backend, **different}
        store.set("verdict", json.dumps(different))
    if different:
        listed = ", ".join(f"rank {rank}: {name}" for rank, name in list(different.items())[:8])
        raise ConfigMismatch(
            f"ranks have chosen different backends ({listed}): their hosts differ; name one with backend="
        )


def _start_mpi(found: Found, backend: str, needed: bool) -> None:
    """Starts MPI, if mpi4py is there or ``needed``: for the backend, the address of rank 0, and the abort of all."""
    try:
        from sparcomm.transport.mpi.world import abort_on_error, world
    except ImportError:
        if needed:
            raise
        return
    comm = world()
    if (comm.Get_rank(), comm.Get_size()) != (found.rank, found.size):
        if not needed:
            return
        raise ConfigError(
            f"backend={backend!r}: MPI says rank {comm.Get_rank()} of {comm.Get_size()}, {found.launcher} says rank "
            f"{found.rank} of {found.size}: start the ranks with the mpirun of the MPI that mpi4py uses"
        )
    abort_on_error()
    if needed:
        import sparcomm.mpi_backend  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _joined() -> Launch:
    """What a process group says that somebody else has started."""
    ray = "ray.train" in sys.modules
    backend = dist.get_backend()
    nccl = "nccl" in backend and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", "")
    return Launch(
        dist.get_rank(),
        dist.get_world_size(),
        int(local) if local.isdecimal() else 0,
        device,
        backend,
        "ray" if ray else "initialised",
    )


def _agreeing(launch: Launch, backend: str | None, device: str | None) -> Launch:
    """The group that is there, if it is what a later call asks for."""
    if backend is not None and backend != launch.backend:
        raise ConfigError(f"backend={backend!r}: the process group is there already, with {launch.backend!r}")
    if device is not None and device != launch.device.type:
        raise ConfigError(f"device={device!r}: this rank has {launch.device} already")
    return launch


def _say(launch: Launch, more: str, quiet: bool) -> None:
    """One line of rank 0; the other ranks' are for debugging. Python drops such lines where logging is not set up."""
    if quiet:
        return
    level = logging.INFO if launch.rank == 0 else logging.DEBUG
    ranks = f"{launch.size} rank{'s' * (launch.size > 1)}"
    found = f"launcher {launch.launcher}: {ranks}, backend {launch.backend}, device {launch.device}, {more}"
    text = f"[rank {launch.rank}/{launch.size}] {found}"
    if launch.rank == 0 and not _log.hasHandlers() and _log.level <= logging.INFO:
        print(f"sparcomm: {text}", file=sys.stderr, flush=True)
    _log.log(level, "%s", text, extra={"rank": launch.rank, "size": launch.size})
