"""A torch.distributed backend on any MPI: ``import sparcomm.mpi_backend``, then ``dist.init_process_group("mpi4py")``.

PyTorch's wheels have no MPI. This one needs nothing compiled, only mpi4py. See docs/mpi.md.

Importing it registers the backend. Under an MPI launcher it also starts MPI, sets the environment that ``env://`` reads
where it is not set, and makes an exception that nobody catches end all ranks; the import is then collective. And it
lets ``dist.monitored_barrier``, which PyTorch keeps for Gloo, take groups of this backend.
"""

from __future__ import annotations

from sparcomm.mpi_backend.environment import fill, launched
from sparcomm.mpi_backend.group import MpiGroup
from sparcomm.mpi_backend.identity import NAME
from sparcomm.mpi_backend.register import register
from sparcomm.transport.mpi.world import abort_on_error

__all__ = ["NAME", "MpiGroup"]

register()
if launched():
    abort_on_error()
    fill()
