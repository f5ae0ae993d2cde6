"""The backend mpi4py under mpirun: every operation against torch's arithmetic, training against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import torch_suite
from support.mpi import MISSING, check, mpirun

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CHECKS = Path(__file__).parent.parent / "support" / "mpi_backend.py"


@pytest.mark.parametrize("size", [2, 3])
def test_operations_and_training(size: int, tmp_path: Path) -> None:
    check(size, CHECKS, tmp_path, least=26)


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
        (0.5, "is late", "DistBackendError: mpi4py backend, all_reduce: Timed out waiting 500ms"),
    ],
)
def test_a_rank_that_fails_ends_all(timeout: float, how: str, first: str, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    ended = mpirun(2, script, str(timeout), how, timeout=60)
    assert ended.code > 0, ended
    assert first in ended.output


LIFE = """
import pytest, torch, torch.distributed as dist, sparcomm.mpi_backend
from sparcomm.errors import ConfigError
with pytest.raises(ConfigError, match="world_size=3: must be 2, the processes that MPI was started with"):
    dist.init_process_group("mpi4py", store=dist.HashStore(), rank=0, world_size=3)
for _ in range(3):
    dist.init_process_group("mpi4py")
    pair = dist.new_group([0, 1])
    x = torch.ones(3)
    dist.all_reduce(x, group=pair)
    assert x.tolist() == [2.0] * 3
    dist.destroy_process_group()
dist.init_process_group("mpi4py")
rank = dist.get_rank()
never = dist.irecv(torch.empty(1), 1 - rank, tag=1)
unread = dist.isend(torch.ones(5000000), 1 - rank, tag=2)
future = dist.all_reduce(torch.ones(300000), async_op=True).get_future()
print("rank", rank, "ends", flush=True)
"""


def test_groups_are_made_again_and_the_last_one_is_left_to_the_end_of_the_process(tmp_path: Path) -> None:
    script = tmp_path / "life.py"
    script.write_text(LIFE)
    ended = mpirun(2, script, timeout=60)
    assert ended.code == 0, ended
    assert ended.output.count("ends") == 2, ended.output


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
        "test_isend_autograd_profiler",
        "test_monitored_barrier_failure_order",  # leaves messages that nobody receives, to the next group
        "test_monitored_barrier_gloo",
        "test_reduce_scatter_v_cuda",
        "test_scatter_complex",
        "test_send_recv_any_source",
    ]
    found = torch_suite.run(3, names, tmp_path / "results", unlock=True)
    assert {name: why for name, (kind, why) in found.items() if kind == "failed"} == {}
    assert [name for name, (kind, _) in found.items() if kind == "skipped"] == ["test_reduce_scatter_v_cuda"]
