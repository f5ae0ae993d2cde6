"""Which transport serves a process group: torch.distributed's own, or MPI where the ranks are mpirun's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sparcomm.errors import ConfigError
from sparcomm.transport.common import BaseTransport
from sparcomm.transport.torchdist import TorchTransport
from sparcomm.transport.torchdist.groups import backend_names

KINDS = ("auto", "torch", "mpi")
MPI_BACKEND = "mpi4py"  # the name of sparcomm.mpi_backend in torch.distributed


def check_kind(kind: object) -> None:
    """Raises ConfigError unless it is one of KINDS."""
    if kind not in KINDS:
        raise ConfigError(f"transport={kind!r}: must be one of {', '.join(map(repr, KINDS))}")


@dataclass(frozen=True)
class Choice:
    """How the ranks of ``group`` will talk.

    Attributes:
        device: where tensors usually live.
        backends: what moves them, by device type, such as "cpu:gloo,cuda:nccl"; "mpi" for MPI.
    """

    group: dist.ProcessGroup
    device: torch.device | None
    backends: str

    def describe(self) -> dict[str, str]:
        """What must be equal on all ranks, as text by field.

        Raises:
            ImportError: MPI is wanted, and is not there.
        """
        return {"transport": "mpi", "rank minus MPI's": str(self._offset())} if self.backends == "mpi" else {}

    def make(self, timeout: timedelta | float, name: str = "") -> BaseTransport:
        """The transport: on a group, or communicator, of its own. Collective.

        Args:
            timeout: how long any wait may take, timedelta or seconds.
            name: see ``TorchTransport.from_group``.

        Raises:
            ConfigError: the ranks are not numbered as mpirun numbers them.
            PeerError: not all ranks came.
        """
        if self.backends != "mpi":
            return TorchTransport.from_group(self.group, device=self.device, timeout=timeout, name=name)
        from sparcomm.transport.mpi import MpiTransport

        if offset := self._offset():
            raise ConfigError(
                f'transport "mpi": rank {dist.get_rank()} of torch.distributed is rank {dist.get_rank() - offset} '
                "of MPI, must be the same: start the job with mpirun, and give init_process_group its ranks"
            )
        return MpiTransport.over(dist.get_process_group_ranks(self.group), device=self.device, timeout=timeout)

    def _offset(self) -> int:
        from sparcomm.transport.mpi.library import MPI

        return dist.get_rank() - MPI.COMM_WORLD.Get_rank()


def choose(kind: str, group: dist.ProcessGroup, device: torch.device | None) -> Choice:
    """By ``kind``, see KINDS; "auto" takes MPI if that is the group's backend for ``device`` (None: for any)."""
    check_kind(kind)
    names = backend_names(group)
    on_mpi = MPI_BACKEND in (names.values() if device is None else [names.get(device.type)])
    return Choice(
        group, device, "mpi" if kind == "mpi" or (kind == "auto" and on_mpi) else dist.get_backend_config(group)
    )
