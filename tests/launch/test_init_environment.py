"""What launchers' variables mean, and what follows from them: pure functions, so every combination can be tried."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparcomm.errors import ConfigError
from sparcomm.launch import BACKENDS, Found, Plan, detect, plan
from sparcomm.launch.choose import Host

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "2900"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
    **ADDRESS,
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
# As a Slurm 22.05 sets them: launch/slurm-here.sh srun -n 2 env, with the numbers of a job of two nodes.
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODELIST": "tux[07-08]",
    "SLURM_STEP_NODELIST": "tux[07-08]",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "12", "ENVIRONMENT": "BATCH"}
PLACE = {"rank": 5, "size": 8, "local_rank": 1, "local_size": 4}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, Found("none")),
        ({"PATH": "/bin", "RANK": ""}, Found("none")),
        (TORCHRUN, Found("torchrun", **PLACE, host="node1", port=2900)),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": ""}, Found("environment", **PLACE, host="node1", port=2900)),
        # A pod of Kubeflow without torchrun: one rank per host.
        ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, Found("environment", 1, 2, 0, 1, "node1", 2900)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Found("environment")),
        (OPENMPI, Found("openmpi", **PLACE)),
        ({**OPENMPI, **ADDRESS}, Found("openmpi", **PLACE, host="node1", port=2900)),
        (MPICH, Found("mpich", **PLACE)),
        (SLURM, Found("slurm", **PLACE, host="tux07", port=15000 + 12 * 31 + 3)),
        ({**SLURM, "MASTER_PORT": "77"}, Found("slurm", **PLACE, host="tux07", port=77)),
        ({**SLURM, **ADDRESS}, Found("slurm", **PLACE, host="node1", port=2900)),
        ({**SLURM, "SLURM_STEP_RESV_PORTS": "12000-12001"}, Found("slurm", **PLACE, host="tux07", port=12000)),
        ({**SLURM, "SLURM_GPUS_PER_TASK": "1"}, Found("slurm", **PLACE, host="tux07", port=15375, own_devices=True)),
        # The innermost launcher counts: torchrun in srun, in mpirun; mpirun in a batch script.
        ({**SLURM, **TORCHRUN, "SLURM_PROCID": "1"}, Found("torchrun", **PLACE, host="node1", port=2900)),
        ({**OPENMPI, **TORCHRUN, "OMPI_COMM_WORLD_RANK": "1"}, Found("torchrun", **PLACE, host="node1", port=2900)),
        ({**BATCH, "SLURM_NTASKS": "8", **OPENMPI}, Found("openmpi", **PLACE)),
        # srun --mpi=pmi2 sets PMI_RANK, too, and nothing about this host.
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, Found("slurm", **PLACE, host="tux07", port=15375)),
        # A batch script that trains by itself, and a shell of salloc, are single processes.
        (BATCH, Found("none")),
        ({**BATCH, "SLURM_NTASKS": "1"}, Found("none")),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8"}, Found("none")),
        # Variables that agree are no contradiction.
        ({**OPENMPI, "RANK": "5", "WORLD_SIZE": "8", **ADDRESS}, Found("openmpi", **PLACE, host="node1", port=2900)),
    ],
)  # fmt: skip
def test_what_launchers_say(environ: dict[str, str], found: Found) -> None:
    assert detect(environ) == found


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "RANK=0 set but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 set but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_ADDR=h set but not MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **ADDRESS}, "RANK='-1': must be a whole number of at least 0"),
        ({"RANK": "0", "WORLD_SIZE": "0", **ADDRESS}, "WORLD_SIZE='0': must be a whole number of at least 1"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be at most 65535"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 ranks on this host, with WORLD_SIZE=8"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK=0 set but not OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 set but not PMI_RANK"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "not MPI_LOCALRANKID"),
        ({**OPENMPI, "MASTER_PORT": "1"}, "MASTER_PORT=1 set but not MASTER_ADDR"),
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "4", **ADDRESS}, "RANK=0 where openmpi says 5, WORLD_SIZE=4"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "8", **ADDRESS}, "RANK=0 where slurm says 5"),
        ({"SLURM_PROCID": "0"}, "SLURM_PROCID set but not SLURM_NTASKS"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, "set MASTER_ADDR"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE='four': must look like 2(x3),1"),
        ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID=2, but tasks are listed for 2 nodes"),
        ({**BATCH, "SLURM_NTASKS": "8"}, "this is the batch script"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(environ)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-4]", "n1"),
        ("n[01-04,7],m", "n01"),
        ("n[3,5-6]", "n3"),
        ("r[1-2]n[03-04]-ib.x,y", "r1n03-ib.x"),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert detect({**SLURM, "SLURM_STEP_NODELIST": hosts}).host == first


NAMES = sorted({*TORCHRUN, *OPENMPI, *MPICH, *SLURM, *BATCH})
VALUES = st.sampled_from(["", "0", "1", "2", "5", "8", "-1", "x", "4(x2)", "BATCH", "tux[07-08]", "10.0.0.1"])


@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.sampled_from([{}, TORCHRUN, OPENMPI, MPICH, SLURM, BATCH]))
def test_any_environment_is_understood_or_refused(some: dict[str, str], base: dict[str, str]) -> None:
    """No other exception, and nothing that cannot be."""
    try:
        found = detect({**base, **some})
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert any(name in refusal for name in NAMES)
        return
    assert 0 <= found.rank < found.size
    assert 0 <= found.local_rank < found.local_size <= found.size
    assert found.port is None or 0 < found.port < 65536
    assert found.launcher != "none" or found == Found("none")


@st.composite
def worlds(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Hosts with ranks each: (rank, local rank, ranks beside it) of all."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return [(sum(sizes[:host]) + i, i, size) for host, size in enumerate(sizes) for i in range(size)]


@given(worlds(), st.sampled_from(["torchrun", "openmpi", "mpich", "slurm"]))
def test_ranks_of_one_job_find_one_place(world: list[tuple[int, int, int]], launcher: str) -> None:
    size = len(world)
    nodes = [beside for _, local, beside in world if local == 0]
    found = []
    for rank, local, beside in world:
        numbers = [str(n) for n in (rank, size, local, beside)]
        names = {"torchrun": list(TORCHRUN), "openmpi": list(OPENMPI), "mpich": list(MPICH)}.get(launcher)
        if names:
            environ = dict(zip(names, numbers, strict=False)) | (ADDRESS if launcher == "torchrun" else {})
            environ |= {"TORCHELASTIC_RUN_ID": "x"} if launcher == "torchrun" else {}
        else:
            node = sum(1 for r, own, _ in world if own == 0 and r <= rank) - 1
            spread = ",".join(map(str, nodes))
            changed = {"SLURM_PROCID": numbers[0], "SLURM_LOCALID": numbers[2], "SLURM_NODEID": str(node)}
            changed |= {"SLURM_STEP_NUM_TASKS": numbers[1], "SLURM_STEP_TASKS_PER_NODE": spread}
            environ = {**SLURM, **changed}
        found.append(detect(environ))
    assert [f.rank for f in found] == list(range(size))
    assert [(f.local_rank, f.local_size) for f in found] == [(local, beside) for _, local, beside in world]
    assert {f.launcher for f in found} == {launcher}
    assert len({(f.size, f.host, f.port) for f in found}) == 1


STORE = Found("torchrun", 1, 4, 1, 2, "h", 1)
MPI = Found("openmpi", 1, 4, 1, 2)


@pytest.mark.parametrize(
    ("found", "host", "asked", "chosen"),
    [
        (Found("none"), Host(0, 4), {}, Plan("cpu", "gloo", "alone", None)),
        (Found("none"), Host(1, 4), {}, Plan("cuda:0", "nccl", "alone", None)),
        (STORE, Host(0, 4, mpi4py=True), {}, Plan("cpu", "gloo", "store", 2)),
        (STORE, Host(0, 4), {"threads_set": True}, Plan("cpu", "gloo", "store", None)),
        (STORE, Host(0, 1), {"threads_set": True}, Plan("cpu", "gloo", "store", 1)),
        (STORE, Host(2, 4), {}, Plan("cuda:1", "nccl", "store", 2)),
        (STORE, Host(1, 4), {}, Plan("cpu", "gloo", "store", 2)),  # not one for each
        (STORE, Host(2, 4), {"backend": "gloo"}, Plan("cuda:1", "gloo", "store", 2)),
        (STORE, Host(2, 4), {"device": "cpu"}, Plan("cpu", "gloo", "store", 2)),
        (MPI, Host(0, 4, mpi4py=True), {}, Plan("cpu", "mpi4py", "mpi", 2)),
        (MPI, Host(0, 4, mpi4py=True), {"backend": "gloo"}, Plan("cpu", "gloo", "mpi", 2)),
        (MPI, Host(2, 4, mpi4py=True), {}, Plan("cuda:1", "nccl", "mpi", 2)),
        (Found("openmpi", 1, 4, 1, 2, "h", 1), Host(0, 4), {}, Plan("cpu", "gloo", "store", 2)),
        (Found("openmpi", 1, 4, 1, 2, "h", 1), Host(0, 4, mpi4py=True), {}, Plan("cpu", "gloo", "store", 2)),
        (
            Found("slurm", 1, 4, 1, 2, "h", 1, own_devices=True),
            Host(1, 4),
            {},
            Plan("cuda:0", "nccl", "store", 2),
        ),
    ],
)
def test_what_is_chosen(found: Found, host: Host, asked: dict[str, Any], chosen: Plan) -> None:
    assert plan(found, host, **asked) == chosen


@pytest.mark.parametrize(
    ("found", "asked", "words"),
    [
        (STORE, {"backend": "mpi"}, "backend='mpi': must be None or one of 'gloo', 'nccl', 'mpi4py'"),
        (STORE, {"device": "tpu"}, "device='tpu': must be None or one of 'cpu', 'cuda'"),
        (STORE, {"backend": "nccl"}, "needs a GPU for each of the 2 ranks of this host, which shows 0"),
        (STORE, {"device": "cuda"}, "shows 0 GPUs for its 2 ranks"),
        (STORE, {"backend": "mpi4py"}, "pip install mpi4py"),
        (MPI, {}, "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_cannot_be_is_refused(found: Found, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(found, Host(0, 4), **asked)
    assert words in str(caught.value)


def chosen(found: Found, host: Host, backend: str | None) -> Plan | str:
    """The plan, or why there is none."""
    try:
        return plan(found, host, backend=backend)
    except ConfigError as error:
        return str(error)


@given(worlds(), st.sampled_from([None, *BACKENDS]), st.integers(0, 4), st.integers(1, 8), st.booleans())
def test_a_host_of_ranks_chooses_alike(
    world: list[tuple[int, int, int]], backend: str | None, gpus: int, cores: int, mpi4py: bool
) -> None:
    beside = world[0][2]
    first = [Found("openmpi", rank, len(world), local, beside) for rank, local, _ in world[:beside]]
    plans = [chosen(found, Host(gpus, cores, mpi4py), backend) for found in first]
    if isinstance(plans[0], str):
        assert len(set(plans)) == 1
        return
    plans = [p for p in plans if isinstance(p, Plan)]
    assert len(plans) == beside
    assert len({(p.backend, p.meet, p.threads, p.device.partition(":")[0]) for p in plans}) == 1
    devices = [p.device for p in plans]
    assert devices == ["cpu"] * beside or devices == [f"cuda:{i}" for i in range(beside)]
    assert plans[0].threads is None or 1 <= plans[0].threads <= cores
