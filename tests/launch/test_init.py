"""``sparcomm.launch.init()`` in real processes: alone, twice, after someone else, and under mpirun."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparcomm
from sparcomm import launch
from sparcomm.errors import ConfigError, ConfigMismatch
from sparcomm.launch import Found, Plan, start
from support import mpi

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no process group; none left behind either."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert not dist.is_initialized()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group")
def test_alone_and_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparcomm")
    first = launch.init(device="cpu", timeout=7)
    assert (first.rank, first.size, first.local_rank, first.backend, first.launcher) == (0, 1, 0, "gloo", "none")
    assert first.device == torch.device("cpu")
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("[rank 0/1] launcher none: 1 rank, backend gloo, device cpu, alone, ")
    assert said.endswith("timeout 7 s")
    assert launch.init() is first
    assert launch.init("gloo", device="cpu") is first
    for asked in ({"backend": "nccl"}, {"device": "cuda"}):
        with pytest.raises(ConfigError, match="already"):
            launch.init(**asked)
    assert len(caplog.records) == 1
    dist.destroy_process_group()
    assert launch.init(device="cpu") is not first
    assert len(caplog.records) == 2


@pytest.mark.usefixtures("no_group")
def test_without_any_logging_it_is_said_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("sparcomm")
    monkeypatch.setattr(logger, "propagate", False)  # pytest has set it up
    said = []
    for quiet, level in ((False, logging.NOTSET), (True, logging.NOTSET), (False, logging.WARNING)):
        monkeypatch.setattr(logger, "level", level)
        sparcomm.launch.init(device="cpu", quiet=quiet)
        dist.destroy_process_group()
        said.append(capsys.readouterr().err)
    assert said[0].startswith("sparcomm: [rank 0/1] launcher none: 1 rank, backend gloo, device cpu, alone, ")
    assert said[0].count("\n") == 1
    assert said[1:] == ["", ""]


@pytest.mark.usefixtures("no_group")
def test_a_group_that_somebody_else_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("LOCAL_RANK", "3")  # as Ray Train does
    found = launch.init()
    assert (found.rank, found.size, found.local_rank, found.backend) == (0, 1, 3, "gloo")
    assert found.launcher == "initialised"


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"timeout": 0}, "timeout=0: must be a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"backend": "mpi"}, "backend='mpi': must be None or one of 'gloo', 'nccl', 'mpi4py'"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_wrong_arguments(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch.init(**asked)
    assert words in str(caught.value)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_group")
def test_half_an_environment_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="RANK=0 set but not WORLD_SIZE"):
        launch.init()
    assert not dist.is_initialized()


@pytest.mark.parametrize("different", [None, 0, 2])
def test_ranks_compare_their_backends_first(different: int | None) -> None:
    store, raised = dist.HashStore(), {}

    def rank(number: int) -> None:
        chosen = Plan("cpu", "nccl" if number == different else "gloo", "store", None)
        try:
            start._agree(store, Found("torchrun", number, 3), chosen, timedelta(seconds=20))
        except ConfigMismatch as error:
            raised[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(raised) == ([] if different is None else [0, 1, 2])
    assert len(set(raised.values())) <= 1
    if different is not None:
        assert f"rank {different}: nccl" in raised[0]


def test_every_start_has_a_part_of_the_store_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps one store over restarts: what an earlier start has left must not be found."""
    store, size = dist.HashStore(), 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = [start._own_part(store, size) for _ in range(size)]
    first[0].set("address", "old")
    assert all(part.check(["address"]) for part in first)
    second = [start._own_part(store, size) for _ in range(size)]
    assert not any(part.check(["address"]) for part in second)
    start._own_part(store, size)  # a rank that dies before the others arrive
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarted = [start._own_part(store, size) for _ in range(size)]
    restarted[1].set("address", "new")
    assert all(part.check(["address"]) for part in restarted)
    assert first[1].get("address") == b"old"


UNDER_MPIRUN = """
import os
import torch, torch.distributed as dist
from sparcomm import launch
from sparcomm.errors import ConfigError

def total():
    x = torch.ones(3) * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return x.tolist()

here = launch.init(timeout=60)
assert launch.init() is here
assert (here.backend, here.size) == ("mpi4py", 2), here
assert here.launcher in ("openmpi", "mpich")
assert here.rank == here.local_rank == int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")))
assert total() == [3.0] * 3
assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_PORT"].isdecimal()
dist.destroy_process_group()
again = launch.init("gloo", timeout=60)  # the address came by MPI
assert again.backend == dist.get_backend() == "gloo"
assert total() == [3.0] * 3
dist.destroy_process_group()
assert launch.init(timeout=60).backend == "mpi4py"  # the address is not taken for the user's
assert total() == [3.0] * 3
print(f"rank {here.rank} is content", flush=True)
if here.rank == 1:
    raise ConfigError("rank 1 has had enough")
dist.barrier()
print("rank 0 should not come here", flush=True)
"""


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
@pytest.mark.slow
def test_under_mpirun() -> None:
    """Both backends, and an exception on one rank, which ends both."""
    done = mpi.mpirun(2, "-c", UNDER_MPIRUN)
    assert done.code > 0, done.output
    for rank in range(2):
        assert f"rank {rank} is content" in done.output, done.output
    assert "ConfigError: rank 1 has had enough" in done.output
    assert "should not" not in done.output
    assert done.output.count("2 ranks, backend mpi4py, device cpu, at ") == 2
    assert done.output.count("2 ranks, backend gloo, device cpu, at ") == 1
