"""The transport on real Gloo groups: the conformance suite, groups of our own, and how failures reach everyone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparcomm.errors import ConfigError, NotInitializedError, PeerError
from sparcomm.transport.torchdist import TorchTransport
from support.conformance import CHECKS
from support.pool import Died, pool, spawn

SIZES = (1, 2, 3, 4)
# All on one group, in the same order on all ranks; after an abort a group is of no further use.
LASTING = [check for name, check in CHECKS.items() if name != "check_abort_wakes_whoever_waits"]


def store() -> dist.Store:
    """The job's own store: how ranks of a test wait for each other without the transport."""
    return dist.distributed_c10d._get_default_store()


def conform(rank: int, size: int, name: str) -> None:
    t = TorchTransport.from_group(timeout=20)
    try:
        CHECKS[name](t)
    finally:
        t.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_conformance(name: str, size: int) -> None:
    pool(size).run(conform, name)


def conform_on_a_given_group(rank: int, size: int) -> None:
    for check in LASTING:
        check(TorchTransport())


def conform_through_the_host(rank: int, size: int) -> None:
    t = TorchTransport.from_group(timeout=20)
    t._staged.add("cpu")  # as if the group could not take tensors where they are
    for check in LASTING:
        check(t)
    assert {k: v.dtype for k, v in t._staging.buffers.items()} == {"send": torch.uint8, "recv": torch.uint8}
    t.close()


@pytest.mark.parametrize("size", [2, 3])
def test_conformance_on_the_default_group(size: int) -> None:
    pool(size).run(conform_on_a_given_group)


def test_conformance_through_host_memory() -> None:
    pool(3).run(conform_through_the_host)


# ---- groups -------------------------------------------------------------------------------------------------------


def remake(rank: int, size: int) -> list[float]:
    sums: list[float] = []
    for _ in range(15):
        t = TorchTransport.from_group(timeout=10)
        x = torch.tensor(float(rank))
        t.all_reduce(x, native=True)
        sums.append(x.item())
        t.close()
    return sums


def test_groups_can_be_made_again_and_again() -> None:
    assert pool(4).run(remake) == [[6.0] * 15] * 4


def disjoint(rank: int, size: int) -> list[int]:
    team = [[0, 2], [3, 1]][rank % 2]
    pg = dist.new_group(team, use_local_synchronization=True)
    if rank % 2:
        store().wait(["the even ranks are done"], timedelta(seconds=20))
    for _ in range(1 if rank % 2 else 5):
        t = TorchTransport.from_group(pg, timeout=10)
        out = torch.empty(2, dtype=torch.int64)
        t.all_gather(out, torch.tensor(rank))
        t.close()
    if store().add("even ranks", 1 - rank % 2) == 2:
        store().set("the even ranks are done", "")
    dist.destroy_process_group(pg)
    return [t.rank, t.size, *out.tolist()]


def test_groups_on_disjoint_ranks_do_not_wait_for_each_other() -> None:
    # new_group sorts its ranks.
    assert pool(4).run(disjoint) == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]


def uneven(rank: int, size: int) -> float:
    if rank < 2:
        extra = dist.new_group([0, 1], use_local_synchronization=True)
    t = TorchTransport.from_group(timeout=10)
    x = torch.tensor(1.0)
    t.all_reduce(x)
    t.close()
    if rank < 2:
        dist.destroy_process_group(extra)
    return x.item()


def test_ranks_with_different_numbers_of_groups_find_each_other() -> None:
    assert pool(3).run(uneven) == [3.0] * 3


def outsider(rank: int, size: int) -> str:
    pg = dist.new_group([0])
    try:
        TorchTransport(pg)
    except ConfigError as error:
        return str(error)
    finally:
        if rank == 0:
            dist.destroy_process_group(pg)
    return ""


def test_a_group_this_rank_is_not_in() -> None:
    member, other = pool(2).run(outsider)
    assert member == ""
    assert "must be a process group that rank 1 belongs to" in other


def test_an_uninitialised_process_says_what_to_do() -> None:
    with pytest.raises(NotInitializedError, match=r"init_process_group\(\) first, in a script started by torchrun"):
        TorchTransport()
    with pytest.raises(NotInitializedError):
        TorchTransport.from_group()


def refusals(rank: int, size: int) -> list[str]:
    texts: list[str] = []
    for timeout in (0, timedelta(seconds=-1)):
        with pytest.raises(ConfigError, match="must be a timedelta or seconds"):
            TorchTransport(timeout=timeout)
    t = TorchTransport.from_group(timeout=10)
    t.links.names["cpu"] = "nccl"
    with pytest.raises(ConfigError, match="not possible on NCCL") as caught:
        t.exchange(torch.ones(1), 1 - rank, torch.ones(1), 1 - rank, capacity=True)
    texts.append(str(caught.value))
    t.links.backends.clear()
    with pytest.raises(ConfigError, match="tensor on meta, but the process group has only nccl for cpu"):
        t.exchange(torch.ones(1, device="meta"), 1 - rank, torch.ones(1, device="meta"), 1 - rank)
    t.close()
    return texts


def test_what_a_backend_cannot_do_is_refused() -> None:
    first, second = pool(2).run(refusals)
    assert first == second


# ---- failures -----------------------------------------------------------------------------------------------------


def killed(rank: int, size: int) -> tuple[float, str]:
    t = TorchTransport.from_group(timeout=30)
    t.context = "step 12, unit 3"
    t.all_reduce(torch.ones(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        t.exchange(torch.ones(10), 1, torch.empty(10), 1)
    except PeerError as error:
        return time.monotonic() - start, str(error)
    return -1, ""


def test_the_death_of_a_rank_is_noticed_at_once() -> None:
    first, second, third = spawn(3, killed)
    assert second == Died(-signal.SIGKILL)
    for seconds, text in (first, third):
        assert 0 <= seconds < 2
        assert text.startswith("step 12, unit 3: exchange(send to float32[10] 1, recv from float32[10] 1): waiting for")
        assert "rank 1 of 3 (tag 6)" in text


def late(rank: int, size: int) -> str:
    t = TorchTransport.from_group(timeout=0.3)
    t.context = "step 7"
    if rank == 1:
        store().wait(["given up"], timedelta(seconds=20))
        t.close()
        return ""
    with pytest.raises(PeerError) as caught:
        t.exchange(None, 0, torch.empty(2), 1)
    store().set("given up", "")
    with pytest.raises(PeerError, match="this transport has ended: step 7: exchange"):
        t.all_reduce(torch.ones(1))
    t.close()
    return str(caught.value)


def test_a_peer_that_does_not_answer_in_time() -> None:
    text, _ = pool(2).run(late)
    assert text.startswith("step 7: exchange(recv from float32[2] 1): waiting for rank 1 of 2 (tag 2): ")
    assert "300ms" in text


WAITS = ("recv", "send", "all_to_all", "all_gather", "native all_reduce", "sub-group")


def aborted(rank: int, size: int, how: str) -> float:
    t = TorchTransport.from_group(timeout=30)
    team = t.split(0, rank)
    big = torch.ones(8_000_000)  # more than the sockets' buffers hold, so that sending it has to wait
    store().add(f"waiting {how}", 1)
    if rank == 1:
        deadline = time.monotonic() + 20
        while store().add(f"waiting {how}", 0) < size and time.monotonic() < deadline:
            pass
        store().set(f"time {how}", str(time.time()))
        t.abort("had enough")
        return 0.0
    waits = {
        "recv": lambda: t.exchange(None, 0, torch.empty(4), 1),
        "send": lambda: t.exchange(big, 1, None, 0),
        "all_to_all": lambda: t.all_to_all(torch.empty(size, 2), torch.ones(size, 2)),
        "all_gather": lambda: t.all_gather(torch.empty(size, 2), torch.ones(2)),
        "native all_reduce": lambda: t.all_reduce(torch.ones(4), native=True),
        "sub-group": lambda: team.exchange(None, 0, torch.empty(4), 1),
    }
    with pytest.raises(PeerError):
        waits[how]()
    end = time.time()
    t.abort("a peer has gone")
    with pytest.raises(PeerError, match="has ended"):
        team.all_reduce(torch.ones(1))
    return end - float(store().get(f"time {how}"))


@pytest.mark.parametrize("how", WAITS)
def test_an_abort_wakes_all_peers(how: str) -> None:
    assert max(pool(4).run(aborted, how)) < 2


SCRIPT = """
import sys, torch, torch.distributed as dist
from sparcomm.transport.torchdist import TorchTransport
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
t = TorchTransport.from_group(timeout=20)
t.all_reduce(torch.ones(3))
if rank == 0:
    t.abort("and out")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_leaving_without_close_is_silent(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], env=env, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "terminate" not in err
