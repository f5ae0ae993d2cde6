"""Several hosts, for real: torchrun's nodes and mpirun's, in network namespaces that reach each other by TCP only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparcomm.doctor.facts import without_launcher
from support import mpi
from support.hosts import Hosts, agent, hosts, missing
from support.jobs_run import check_sums

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
    check_sums("".join(printed), NODES, "torchrun")
    assert network.bytes_carried() - before > 10_000


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
def test_four_nodes_of_mpirun(network: Hosts, tmp_path: Path) -> None:
    """mpirun reaches the other hosts by an agent in place of ssh; the ranks find each other by MPI."""
    assert mpi.LAUNCHER is not None
    if b"Open MPI" not in subprocess.run([mpi.LAUNCHER, "--version"], capture_output=True).stdout:
        pytest.skip("the options are those of Open MPI's mpirun")
    before = network.bytes_carried()
    where = ["--host", ",".join(f"{name}:1" for name in network.names), "--map-by", "node"]
    passed = [part for name in ("PYTHONPATH", "OMP_NUM_THREADS") for part in ("-x", name)]
    job = [mpi.LAUNCHER, "-n", str(NODES), *where, *passed, sys.executable, "-m", "sparcomm.doctor.step", "mpi"]
    done = subprocess.run(
        network.command(0, *job),
        env={**environment(), **mpi.ENV, "PRTE_MCA_plm_ssh_agent": str(agent(tmp_path))},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_sums(done.stdout, NODES, "openmpi")
    assert network.bytes_carried() - before > 10_000
