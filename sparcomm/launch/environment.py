"""What a launcher's environment variables say about this process: a pure function of a mapping.

Launchers are nested on purpose: torchrun is started by srun or mpirun, mpirun by a Slurm batch script. The innermost
one counts, and variables that should say the same are compared: a RANK that was exported into the shell long ago, in
front of an mpirun, would otherwise give all ranks the same number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sparcomm.errors import ConfigError
from sparcomm.launch.slurm import batch_script, first_host, local_tasks, port_for

MPI = ("openmpi", "mpich")


@dataclass(frozen=True)
class Found:
    """Where this process stands, and where the ranks can meet.

    Attributes:
        launcher: "torchrun", "environment" (RANK and WORLD_SIZE without torchrun), "openmpi", "mpich" (and Intel
            MPI), "slurm", or "none".
        local_rank, local_size: among the ranks of this host.
        host, port: of the store that rank 0 keeps, or torchrun's agent; None where nobody has said.
        own_devices: whether the launcher shows each process its own GPUs only.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str | None = None
    port: int | None = None
    own_devices: bool = False


def detect(environ: Mapping[str, str]) -> Found:
    """What the launcher has said. An empty value counts as unset.

    Raises:
        ConfigError: variables are missing, are no numbers, or contradict each other; names them and their values.
    """
    given = {name: value for name, value in environ.items() if value}
    plain = _env(given)
    if plain and "TORCHELASTIC_RUN_ID" in given:
        return plain  # whatever else is set speaks of the processes that started torchrun
    for reader in (_openmpi, _mpich, _slurm):
        if found := reader(given):
            if plain:
                _same(plain, found)
            return found
    return plain or Found("none")


def _env(given: Mapping[str, str]) -> Found | None:
    """RANK and WORLD_SIZE, as torchrun sets them, and Kubeflow, Ray, or a hand-written loop."""
    if not _both(given, "RANK", "WORLD_SIZE"):
        return None
    size = _number(given, "WORLD_SIZE", 1)
    local = "LOCAL_RANK" in given
    return _placed(
        "torchrun" if "TORCHELASTIC_RUN_ID" in given else "environment",
        ("RANK", _number(given, "RANK")),
        ("WORLD_SIZE", size),
        ("LOCAL_RANK", _number(given, "LOCAL_RANK") if local else 0),
        # One pod per rank, say: without either there is nobody beside this one.
        ("LOCAL_WORLD_SIZE", _number(given, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in given else None),
        _address(given) if size > 1 or "MASTER_ADDR" in given else (None, None),
        needs_address=size > 1,
    )


def _openmpi(given: Mapping[str, str]) -> Found | None:
    prefix = "OMPI_COMM_WORLD_"
    return _mpi(given, "openmpi", f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE")


def _mpich(given: Mapping[str, str]) -> Found | None:
    return _mpi(given, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _mpi(given: Mapping[str, str], launcher: str, rank: str, size: str, local: str, local_size: str) -> Found | None:
    if not _both(given, rank, size):
        return None
    if launcher == "mpich" and "SLURM_STEP_ID" in given and local not in given:
        return None  # srun's own PMI: Slurm's variables say more
    return _placed(
        launcher,
        (rank, _number(given, rank)),
        (size, _number(given, size, 1)),
        (local, _number(given, local) if local in given else None),
        (local_size, _number(given, local_size, 1) if local_size in given else None),
        _address(given),
    )


def _slurm(given: Mapping[str, str]) -> Found | None:
    if "SLURM_PROCID" not in given:
        return None  # a shell of salloc, or no Slurm
    sizes = [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in given]
    if batch_script(given):
        if sizes and _number(given, sizes[0], 1) > 1 and "RANK" not in given:
            raise ConfigError(
                f"{sizes[0]}={given[sizes[0]]}, but this is the batch script, of which there is one: start the "
                "ranks with srun, torchrun or mpirun"
            )
        return None
    if not sizes:
        raise ConfigError("SLURM_PROCID set but not SLURM_NTASKS: srun sets both")
    host, port = _address(given, alone=True)
    size = _number(given, sizes[0], 1)
    found = _placed(
        "slurm",
        ("SLURM_PROCID", _number(given, "SLURM_PROCID")),
        (sizes[0], size),
        ("SLURM_LOCALID", _number(given, "SLURM_LOCALID") if "SLURM_LOCALID" in given else None),
        ("SLURM_STEP_TASKS_PER_NODE", local_tasks(given)),
        (host or first_host(given), port or port_for(given)),
        own_devices="SLURM_GPUS_PER_TASK" in given,
    )
    if found.host is None and size > 1:
        raise ConfigError(
            "SLURM_PROCID and SLURM_NTASKS set, but none of SLURM_STEP_NODELIST, SLURM_NODELIST and "
            "SLURM_LAUNCH_NODE_IPADDR, so rank 0's host is unknown: set MASTER_ADDR"
        )
    return found


def _placed(
    launcher: str,
    rank: tuple[str, int],
    size: tuple[str, int],
    local: tuple[str, int | None],
    local_size: tuple[str, int | None],
    address: tuple[str | None, int | None],
    *,
    needs_address: bool = False,
    own_devices: bool = False,
) -> Found:
    """``Found`` of named numbers, once they fit each other."""
    if rank[1] >= size[1]:
        raise ConfigError(f"{rank[0]}={rank[1]} with {size[0]}={size[1]}: ranks are numbered from 0, so it is too high")
    if needs_address and None in address:
        raise ConfigError(
            f"{rank[0]} and {size[0]}={size[1]} set but not MASTER_ADDR and MASTER_PORT: a launcher sets all four"
        )
    here, beside = local[1], local_size[1]
    if here is None:
        if size[1] > 1 and beside != 1:
            raise ConfigError(f"{rank[0]} and {size[0]} set but not {local[0]}, which says what GPU is this rank's")
        here = 0
    if beside is None:  # at least those that must be there
        beside = here + 1
    if here >= beside:
        raise ConfigError(f"{local[0]}={here} with {local_size[0]}={beside}: it must be below")
    if beside > size[1]:
        raise ConfigError(f"{local_size[0]}={beside} ranks on this host, with {size[0]}={size[1]} in all")
    return Found(launcher, rank[1], size[1], here, beside, *address, own_devices)


def _both(given: Mapping[str, str], one: str, other: str) -> bool:
    """Whether both are set. Raises ConfigError for half."""
    there = [name for name in (one, other) if name in given]
    if len(there) == 1:
        missing = other if there[0] == one else one
        raise ConfigError(
            f"{there[0]}={given[there[0]]} set but not {missing}: a launcher sets both; without one, unset it"
        )
    return len(there) == 2


def _address(given: Mapping[str, str], *, alone: bool = False) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT; ``alone``: either may be missing."""
    if not alone and not _both(given, "MASTER_ADDR", "MASTER_PORT"):
        return None, None
    port = _number(given, "MASTER_PORT", 1) if "MASTER_PORT" in given else None
    if port is not None and port > 65535:
        raise ConfigError(f"MASTER_PORT={port}: must be at most 65535")
    return given.get("MASTER_ADDR"), port


def _number(given: Mapping[str, str], name: str, low: int = 0) -> int:
    text = given[name]
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < low:
        raise ConfigError(f"{name}={text!r}: must be a whole number of at least {low}")
    return int(text)


def _same(plain: Found, found: Found) -> None:
    """RANK and WORLD_SIZE next to a launcher that does not set them must say what it says."""
    pairs = {"RANK": (plain.rank, found.rank), "WORLD_SIZE": (plain.size, found.size)}
    wrong = [f"{name}={mine} where {found.launcher} says {its}" for name, (mine, its) in pairs.items() if mine != its]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: unset what was set before {found.launcher} started this process")
