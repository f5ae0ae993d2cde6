"""What torch.distributed's ``env://`` needs, from MPI: ranks from the launcher, one address and port from rank 0."""

from __future__ import annotations

import os
import socket

from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.world import local, world

# Set by the launchers of Open MPI, of MPICH and Intel MPI, and of what implements PMI or PMIx, as Slurm.
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")


def launched() -> bool:
    """Whether an MPI launcher has started this process."""
    return any(name in os.environ for name in LAUNCHED)


def fill() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where unset. Collective."""
    comm, (local_rank, local_size) = world(), local()
    found: dict[str, str | int] = {
        "RANK": comm.Get_rank(),
        "WORLD_SIZE": comm.Get_size(),
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    peers = comm.gather(MPI.Get_processor_name() if local_rank == 0 else None)
    if comm.Get_rank() == 0:
        away = [name for name in (peers or [])[1:] if name is not None]
        found["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or _address(away)
        found["MASTER_PORT"] = os.environ.get("MASTER_PORT") or _free_port()
    for name, value in comm.bcast(found).items() if comm.Get_size() > 1 else found.items():
        mine = found.get(name, value)
        os.environ.setdefault(name, str(mine))


def _address(away: list[str]) -> str:
    """One of this host's that the hosts ``away`` reach: of the interface that leads to one of them."""
    if not away:
        return "127.0.0.1"
    for host in [*away, "192.0.2.1"]:  # the last one stands for the default route, and is sent nothing
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, 9))
            except OSError:
                continue
            if not (address := probe.getsockname()[0]).startswith("127."):
                return address
    return socket.getfqdn()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
