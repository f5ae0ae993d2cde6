"""Several hosts, for real: torchrun's nodes and mpirun's, in network namespaces that reach each other by TCP only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparcomm.config import algorithm_from_config
from sparcomm.doctor import step
from sparcomm.doctor.facts import without_launcher
from sparcomm.transport import sim
from support import mpi
from support.hosts import Hosts, agent, hosts, missing

NODES = 4
REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("hosts"),
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(200),
]


@pytest.fixture(scope="module")
def network() -> Iterator[Hosts]:
    with hosts(NODES) as made:
        yield made


def environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return {**without_launcher(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def check(printed: str, size: int, launcher: str) -> None:
    """All ranks have the sums that the simulator gives."""
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert sorted(found["rank"] for found in ranks) == list(range(size)), printed
    assert {(found["size"], found["launcher"]) for found in ranks} == {(size, launcher)}
    algorithm = algorithm_from_config({"name": "spardl"})
    expected = sim.run(size, lambda t: step.reduce(algorithm, t, torch.device("cpu"))).results
    assert {found["sha256"] for found in ranks} == set(expected)


@pytest.mark.torchrun
def test_four_nodes_of_torchrun(network: Hosts) -> None:
    before = network.bytes_carried()
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{network.names[0]}:29400", "--rdzv-id", "test"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NODES), "--nproc-per-node", "1", *meet]
    started = [
        subprocess.Popen(
            network.command(node, *torchrun, "-m", "sparcomm.doctor.step", "gloo"),
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(NODES)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * NODES, "\n".join(printed)
    check("".join(printed), NODES, "torchrun")
    assert network.bytes_carried() - before > 10_000


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
def test_two_nodes_of_mpirun(network: Hosts, tmp_path: Path) -> None:
    """mpirun reaches the other host by an agent in place of ssh; the ranks find each other by MPI."""
    assert mpi.LAUNCHER is not None
    before = network.bytes_carried()
    where = ["--host", f"{network.names[0]}:1,{network.names[1]}:1", "--map-by", "node"]
    passed = [part for name in ("PYTHONPATH", "OMP_NUM_THREADS") for part in ("-x", name)]
    job = [mpi.LAUNCHER, "-n", "2", *where, *passed, sys.executable, "-m", "sparcomm.doctor.step", "mpi"]
    done = subprocess.run(
        network.command(0, *job),
        env={**environment(), **mpi.ENV, "PRTE_MCA_plm_ssh_agent": str(agent(tmp_path))},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, 2, "openmpi")
    assert network.bytes_carried() - before > 10_000
