"""The backend mpi4py under mpirun: every operation against torch's arithmetic, training against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import torch_suite
from support.mpi import MISSING, mpirun

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CHECKS = Path(__file__).parent.parent / "support" / "mpi_backend.py"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_operations_and_training(size: int, tmp_path: Path) -> None:
    ended = mpirun(size, CHECKS, tmp_path)
    reports = {p.stem: json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))}
    assert list(reports) == [str(r) for r in range(size)], ended.output
    wrong = [f"--- rank {r}, {name}\n{text}" for r, checks in reports.items() for name, text in checks.items() if text]
    assert not wrong, "\n".join(wrong)
    assert all(len(checks) > 20 for checks in reports.values())
    assert ended.code == 0, ended.output


FAILING = """
import sys, time, torch, torch.distributed as dist, sparcomm.mpi_backend
from datetime import timedelta
dist.init_process_group("mpi4py", timeout=timedelta(seconds=float(sys.argv[1])))
if dist.get_rank() == 1:
    if sys.argv[2] == "raises":
        raise ValueError("the data ran out")
    time.sleep(600)
dist.all_reduce(torch.ones(3))
"""


@pytest.mark.parametrize(
    ("timeout", "how", "first"),
    [
        (300, "raises", "ValueError: the data ran out"),
        (0.5, "is late", "DistBackendError: mpi4py backend, all_reduce: not complete within 0.5 s"),
    ],
)
def test_a_rank_that_fails_ends_all(timeout: float, how: str, first: str, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    ended = mpirun(2, script, str(timeout), how, timeout=60)
    assert ended.code > 0, ended
    assert first in ended.output


def test_another_number_of_ranks_than_mpi_has_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "few.py"
    script.write_text(
        "import torch.distributed as dist, sparcomm.mpi_backend\n"
        "dist.init_process_group('mpi4py', store=dist.HashStore(), rank=0, world_size=3)\n"
    )
    ended = mpirun(1, script)
    assert ended.code > 0
    assert "world_size=3: must be 1, the processes that MPI was started with" in ended.output


def test_a_part_of_pytorchs_own_tests(tmp_path: Path) -> None:
    """All of them take minutes: tests/support/torch_suite.py."""
    pytest.importorskip("expecttest")
    names = [
        "test_DistributedDataParallel_requires_grad",
        "test_Backend_enum_class",
        "test_all_gather_object_default_pg",
        "test_all_reduce_coalesced_sum",
        "test_all_reduce_product",
        "test_barrier_full_group",
        "test_broadcast_group",
        "test_ddp_grad_div_uneven_inputs",
        "test_isend_autograd_profiler",
        "test_reduce_scatter_v_cuda",
        "test_scatter_complex",
        "test_send_recv_any_source",
    ]
    found = torch_suite.run(3, names, tmp_path / "results")
    assert {name: why for name, (kind, why) in found.items() if kind == "failed"} == {}
    assert sum(kind == "passed" for kind, _ in found.values()) >= 9
