"""What is installed here, and what it can do. Nothing is started that another job on this machine could notice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from sparcomm import __version__
from sparcomm.errors import ConfigError
from sparcomm.kernels import gpu
from sparcomm.launch import detect

PACKAGES = ("torch", "numpy", "numba", "mpi4py", "tensorboard", "ray")
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")  # a package for each major version of CUDA
LAUNCHERS = ("torchrun", "mpirun", "mpiexec", "srun", "sbatch", "kubectl", "ray")
PATIENCE = 60.0

# In a process of its own: loading an MPI library starts it, and one that does not fit this machine may end us.
_ASK_MPI = """
import json
from sparcomm.transport.mpi.library import MPI, cuda_aware, library
print(json.dumps([library(), MPI.Query_thread() == MPI.THREAD_MULTIPLE, cuda_aware()]))
"""


def facts() -> dict[str, Any]:
    """Versions, devices, backends, launchers, capabilities, and what launcher has started this process."""
    mpi = ask_mpi()
    return {
        "versions": {**versions(), "MPI": mpi.get("library")},
        "devices": devices(),
        "backends": backends(bool(mpi.get("library"))),
        "launchers": {name: find_program(name) for name in LAUNCHERS},
        "capabilities": capabilities(mpi),
        "started by": started_by(),
        "problems": [text for text in (mpi.get("error"), unseen_gpus()) if text],
    }


def unseen_gpus() -> str | None:
    """A driver whose GPUs torch does not see."""
    if torch.cuda.is_available() or find_program("nvidia-smi") is None:
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"nvidia-smi is there, but torch sees no GPU; this torch is {built}"


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """By what it is the version of; None = not installed."""
    found: dict[str, str | None] = {"sparcomm": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    found["cupy"] = next((f"{v} ({name})" for name in CUPY if (v := version(name))), None)
    found["CUDA"] = torch.version.cuda
    built = dist.is_nccl_available() and torch.version.cuda
    found["NCCL"] = ".".join(map(str, nccl.version())) if built else None
    return found


def devices() -> list[dict[str, Any]]:
    """The processors that torch can use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine(), "cores": usable}]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        found.append({"device": f"cuda:{number}", "name": about.name, "memory": about.total_memory})
    return found


def backends(mpi: bool) -> dict[str, bool]:
    """Backends of torch.distributed, by whether a job can use them here."""
    gpus = torch.cuda.is_available()
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available() and gpus, "mpi4py": mpi}


def capabilities(mpi: dict[str, Any]) -> dict[str, bool]:
    """What the parts can do together."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "compiled kernels on CPUs (Numba)": version("numba") is not None,
        "compiled kernels on GPUs (CuPy)": bool(gpus) and all(gpu.runs_on(device) for device in gpus),
        "GPUs over NCCL": bool(gpus) and dist.is_nccl_available(),
        "MPI from several threads": bool(mpi.get("threads")),
        "CUDA-aware MPI": bool(mpi.get("cuda")),
    }


def find_program(name: str) -> str | None:
    """Where a program is: next to this Python first, since an environment may be used without being activated."""
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return str(beside)
    return shutil.which(name) or (f"{sys.executable} -m torch.distributed.run" if name == "torchrun" else None)


def started_by() -> str:
    """What launcher's variables this process sees; or why they make no sense."""
    try:
        found = detect(os.environ)
    except ConfigError as error:
        return f"cannot be told: {error}"
    return found.launcher if found.launcher == "none" else f"{found.launcher}, rank {found.rank} of {found.size}"


def without_launcher() -> dict[str, str]:
    """The environment for a child that is started by nobody's launcher but the one that we start."""
    ours = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "SLURM_", "MPI_LOCAL", "TORCHELASTIC_", "HYDI_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in names}


def ask_mpi() -> dict[str, Any]:
    """``library``, ``threads`` and ``cuda`` of the MPI that mpi4py finds; ``error`` if it finds none; {} without it."""
    if version("mpi4py") is None:
        return {}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_MPI],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=without_launcher(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"MPI has not started within {PATIENCE:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"mpi4py is there, but MPI cannot be started (exit code {done.returncode}): {last}"}
    library, threads, cuda = json.loads(done.stdout.strip().splitlines()[-1])
    return {"library": library, "threads": threads, "cuda": cuda}
