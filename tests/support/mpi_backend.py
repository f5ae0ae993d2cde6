"""What every rank of an MPI job does in the tests of the backend: all checks in turn, and a report of each.

mpirun -n 3 python tests/support/mpi_backend.py FOLDER      # writes FOLDER/0.json, ...: {check: what was wrong}

Expectations are torch's own arithmetic on what all ranks have, which each rank can work out alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sparcomm.mpi_backend  # noqa: F401  registers the backend
from sparcomm.mpi_backend import buffers, channel
from support.mpi_failures import FAILURES
from support.mpi_training import TRAINING

FOLDER = Path(sys.argv[1])
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}
gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_from: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def values(rank: int, n: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that every order of adding them gives the same."""
    return (
        ((torch.arange(n) * 5 + 3 * rank) % 7).to(dtype)
        if dtype is not torch.bool
        else (torch.arange(n) + rank) % 3 > 0
    )


def expected(name: str, parts: list[Tensor]) -> Tensor:
    """The reduction by torch, exact, and rounded to the dtype once."""
    wide = torch.float64 if parts[0].is_floating_point() else torch.int64
    wide = torch.bool if parts[0].dtype is torch.bool else wide
    return reduce(OPS[name], [part.to(wide) for part in parts]).to(parts[0].dtype)


def environment(r: int, p: int) -> None:
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (str(r), str(p), str(r))
    everyone: list[Any] = [None] * p
    dist.all_gather_object(everyone, (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
    assert set(everyone) == {everyone[0]}
    assert int(everyone[0][1]) > 0
    assert dist.get_backend() == "mpi4py"
    store = dist.distributed_c10d._get_default_store()
    store.set(f"from {r}", "here")
    assert all(store.get(f"from {i}") == b"here" for i in range(p))


def all_reduce(r: int, p: int) -> None:
    # As MPI adds, as all gathers and adds, and segment by segment, with a short last part.
    for n in (0, 1, 1001, 3 * (channel.NATIVE // 2) + 1):
        for dtype in (*FLOATS, *INTEGERS, *UNSIGNED, torch.bool):
            if n > 2000 and dtype not in (torch.float32, torch.bfloat16, torch.uint16, torch.bool):
                continue
            names = list(OPS)[: 4 if dtype.is_floating_point else 7] if n < 2000 else ["SUM", "MAX"]
            for name in names:
                if name in ("MIN", "MAX") and dtype is torch.uint64:
                    continue  # torch cannot say what is expected
                x = values(r, n, dtype)
                dist.all_reduce(x, getattr(dist.ReduceOp, name))
                want = expected(name, [values(i, n, dtype) for i in range(p)])
                assert torch.equal(x, want), (n, dtype, name)


def means(r: int, p: int) -> None:
    for dtype in FLOATS:
        for n in (5, 300000):
            x = torch.full((n,), r + 1.0, dtype=dtype)
            dist.all_reduce(x, dist.ReduceOp.AVG)
            assert torch.equal(x, torch.full_like(x, (p + 1) / 2)), (dtype, n)
            x = torch.full((n,), r + 1.0, dtype=dtype)
            dist.all_reduce(x, dist._make_nccl_premul_sum(2.0))
            assert torch.equal(x, torch.full_like(x, p * (p + 1))), (dtype, n)
    x = torch.complex(torch.arange(6.0), torch.full((6,), float(r))).view(2, 3).t()
    dist.all_reduce(x)
    assert torch.equal(x, torch.complex(p * torch.arange(6.0), torch.full((6,), 1.0 * sum(range(p)))).view(2, 3).t())


def nans(r: int, p: int) -> None:
    for n in (3, 200000):
        for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            x = torch.full((n,), float(r))
            x[1] = math.nan if r == 1 else x[1]
            dist.all_reduce(x, op)
            assert x.isnan().nonzero().tolist() == [[1]]
            assert x[0] == (0 if op == dist.ReduceOp.MIN else p - 1)


def same_bits(r: int, p: int) -> None:
    for n, dtype in ((100, torch.float32), (700000, torch.float32), (900000, torch.bfloat16)):
        x = torch.randn(n, generator=torch.Generator().manual_seed(r)).to(dtype)
        dist.all_reduce(x)
        first = x.clone()
        dist.broadcast(first, 0)
        assert torch.equal(x, first)


def scattered_memory(r: int, p: int) -> None:
    x = torch.arange(12.0).view(3, 4).t() + r
    dist.all_reduce(x)
    assert torch.equal(x, p * torch.arange(12.0).view(3, 4).t() + sum(range(p)))
    base = torch.zeros(4, 4)
    dist.all_gather([base[i % 4, ::2] if i == 0 else torch.empty(2) for i in range(p)], torch.tensor([1.0 + r, 2.0]))
    assert base[0].tolist() == [1.0, 0.0, 2.0, 0.0]
    y = torch.full((3, 2), float(r)).t()
    dist.broadcast(y, p - 1)
    assert (y == p - 1).all()


def coalesced(r: int, p: int) -> None:
    xs = [torch.full((n,), float(r)) for n in (1, 10, 200000)]
    dist.all_reduce_coalesced(xs)
    assert all((x == sum(range(p))).all() for x in xs)
    outs, ins = [torch.empty(p), torch.empty(p * 3)], [torch.full((1,), float(r)), torch.full((3,), 10.0 * r)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for out, t in zip(outs, ins, strict=True):
            gather_into(out, t)
    manager.wait()
    assert outs[0].tolist() == list(range(p))
    assert outs[1].view(p, 3)[:, 0].tolist() == [10.0 * i for i in range(p)]
    outs, ins = [torch.empty(1), torch.empty(2)], [torch.ones(p), torch.arange(2.0 * p)]
    with dist._coalescing_manager():
        for out, t in zip(outs, ins, strict=True):
            scatter_from(out, t)
    assert outs[0].item() == p
    assert outs[1].tolist() == [p * 2.0 * r, p * (2.0 * r + 1)]


def sparse(r: int, p: int) -> None:
    x = torch.sparse_coo_tensor([[r, p]], torch.full((2, 2), r + 1.0), (p + 1, 2))
    dist.all_reduce(x)
    want = torch.cat([torch.arange(1.0, p + 1), torch.tensor([p * (p + 1) / 2])])[:, None].expand(-1, 2)
    assert torch.equal(x.to_dense(), want)


def gathering(r: int, p: int) -> None:
    outs = [torch.empty(i + 1, dtype=torch.bfloat16) for i in range(p)]
    dist.all_gather(outs, torch.full((r + 1,), float(r), dtype=torch.bfloat16))  # of different sizes
    assert [out.tolist() for out in outs] == [[float(i)] * (i + 1) for i in range(p)]
    out = torch.empty(p, 2, dtype=torch.bool)
    gather_into(out, torch.tensor([r % 2 == 0, True]))
    assert out.tolist() == [[i % 2 == 0, True] for i in range(p)]
    for root in range(p):
        outs = [torch.empty(2, dtype=torch.int16) for _ in range(p)] if r == root else None
        dist.gather(torch.tensor([r, root], dtype=torch.int16), outs, root)
        assert outs is None or [t.tolist() for t in outs] == [[i, root] for i in range(p)]
        got = torch.empty(3)
        dist.scatter(got, [torch.full((3,), 10.0 * root + i) for i in range(p)] if r == root else None, root)
        assert got.tolist() == [10.0 * root + r] * 3
        x = torch.full((5,), float(r), dtype=torch.float16)
        dist.broadcast(x, root)
        assert (x == root).all()
        objects = [{"from": r}, None]
        dist.broadcast_object_list(objects, root)
        assert objects == [{"from": root}, None]
    big = torch.empty(p * 100000)
    gather_into(big, torch.full((100000,), float(r)))
    assert torch.equal(big.view(p, -1)[:, 7], torch.arange(float(p)))


def reducing(r: int, p: int) -> None:
    for root in range(p):
        for n in (3, 300000):
            x = torch.arange(float(n)) + r
            dist.reduce(x, root)
            assert torch.equal(
                x, p * torch.arange(float(n)) + sum(range(p)) if r == root else torch.arange(float(n)) + r
            )
    for dtype in (torch.float32, torch.bfloat16, torch.uint16):
        parts = [values(r + 2 * i, i + 4, dtype) for i in range(p)]
        out = torch.empty(r + 4, dtype=dtype)
        dist.reduce_scatter(out, parts)
        assert torch.equal(out, expected("SUM", [values(i + 2 * r, r + 4, dtype) for i in range(p)])), dtype
    out = torch.empty(200001)
    scatter_from(out, torch.arange(200001.0 * p) % 1000 + r, dist.ReduceOp.AVG)
    want = (torch.arange(200001.0 * p) % 1000).view(p, -1)[r] + (p - 1) / 2
    torch.testing.assert_close(out, want)


def all_to_all(r: int, p: int) -> None:
    out = torch.empty(2 * p, 3)
    dist.all_to_all_single(out, (torch.arange(2.0 * p) + 100 * r)[:, None].expand(-1, 3))
    assert out[:, 2].tolist() == [100.0 * i + 2 * r + j for i in range(p) for j in (0, 1)]
    sent, got = [(r + i) % 3 for i in range(p)], [(i + r) % 3 for i in range(p)]  # rows, some of them 0
    out = torch.full((sum(got),), -1, dtype=torch.int64)
    dist.all_to_all_single(out, torch.full((sum(sent),), r), got, sent)
    assert out.tolist() == [i for i in range(p) for _ in range(got[i])]
    outs = [torch.empty(r + i + 1) for i in range(p)]
    dist.all_to_all(outs, [torch.full((r + i + 1,), 10.0 * r + i) for i in range(p)])
    assert [t.tolist() for t in outs] == [[10.0 * i + r] * (r + i + 1) for i in range(p)]


def messages(r: int, p: int) -> None:
    right, left = (r + 1) % p, (r - 1) % p
    sends = [dist.isend(torch.full((n,), n + 0.5 * r), right, tag=n) for n in (3, 100000, 7)]
    for n in (7, 3, 100000):  # in another order, by tag
        x = torch.empty(n)
        assert dist.recv(x, left, tag=n) == left
        assert (x == n + 0.5 * left).all()
    for work in sends:
        work.wait()
    mine = torch.empty(2, dtype=torch.bfloat16)
    works = [dist.irecv(mine, r), dist.isend(torch.ones(2, dtype=torch.bfloat16), r)]
    assert all(work.wait() for work in works)
    assert (mine == 1).all()
    if r == 0:
        found = set()
        for _ in range(1, p):
            x = torch.empty(1)
            found.add((dist.recv(x, tag=9), int(x)))
        assert found == {(i, i) for i in range(1, p)}
    else:
        dist.send(torch.tensor([float(r)]), 0, tag=9)
    a, b = torch.full((2, 3), float(r)), torch.empty(3, 2).t()
    batch = [dist.P2POp(dist.isend, a, right), dist.P2POp(dist.irecv, b, left)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    assert (b == left).all()


def long_messages(r: int, p: int) -> None:
    before, buffers.LONGEST, channel.LONGEST = buffers.LONGEST, 1000, 1000
    try:
        x = torch.full((777,), float(r))
        dist.broadcast(x, 1)
        assert (x == 1).all()
        out = torch.empty(p * 777)
        gather_into(out, torch.full((777,), float(r)))
        assert torch.equal(out.view(p, 777)[:, 776], torch.arange(float(p)))
        work = dist.isend(torch.arange(999.0), (r + 1) % p)
        x = torch.empty(999)
        dist.recv(x, (r - 1) % p)
        work.wait()
        assert torch.equal(x, torch.arange(999.0))
        if r > 0:
            dist.send(torch.full((999,), float(r)), 0, tag=5)
        for _ in range(1, p if r == 0 else 0):  # in several pieces, which must not be mixed
            source = dist.recv(x, tag=5)
            assert (x == source).all()
    finally:
        buffers.LONGEST = channel.LONGEST = before


def sub_groups(r: int, p: int) -> None:
    ends, alone = dist.new_group([0, p - 1]), dist.new_group([p - 1])
    if r in (0, p - 1):
        x = torch.tensor([float(r)])
        dist.all_reduce(x, group=ends)
        assert x.item() == p - 1
        dist.broadcast(x.fill_(r), p - 1, group=ends)
        assert x.item() == p - 1
        assert dist.get_rank(ends) == (0 if r == 0 else 1)
    if r == p - 1:
        dist.barrier(alone)
        x = torch.ones(3)
        dist.all_reduce(x, dist.ReduceOp.AVG, group=alone)
        assert x.tolist() == [1.0] * 3
    if r in (0, p - 1):  # made by those two alone, the others know nothing of it
        pair = dist.new_group([0, p - 1], use_local_synchronization=True)
        objects: list[Any] = [None, None]
        dist.all_gather_object(objects, r, group=pair)
        assert objects == [0, p - 1]
        dist.destroy_process_group(pair)
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == p
    gloo = dist.new_group(backend="gloo")  # beside it
    dist.all_reduce(x, group=gloo)
    assert x.item() == p * p
    for group in (ends, alone, gloo):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def asynchronous(r: int, p: int) -> None:
    xs = [torch.full((n,), float(r + i)) for i, n in enumerate((10, 500000, 10, 300000, 1))]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    for i, work in reversed(list(enumerate(works))):
        assert work.wait()
        assert (xs[i] == sum(range(p)) + p * i).all()
        assert work.is_completed()
        assert work.is_success()
    big = torch.full((2000000,), float(r))
    work = dist.all_reduce(big, async_op=True)
    deadline = time.monotonic() + 60
    while not work._done and time.monotonic() < deadline:  # nobody but the thread moves it on
        time.sleep(0.01)
    assert work._done
    assert (big == sum(range(p))).all()
    doubled = dist.all_reduce(torch.ones(7), async_op=True).get_future().then(lambda f: f.value()[0] * 2)
    assert doubled.wait().tolist() == [2.0 * p] * 7

    def again(done: Any) -> Tensor:  # a callback that waits for another operation's future
        return dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0]

    chained = dist.all_reduce(torch.ones(7), async_op=True).get_future().then(again)
    assert chained.wait().tolist() == [float(p * p)] * 7


def functional(r: int, p: int) -> None:
    from torch.distributed import _functional_collectives as funcol
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (p,))
    group = mesh.get_group()
    assert funcol.all_reduce(torch.full((3,), float(r)), "sum", group).tolist() == [sum(range(p))] * 3
    assert funcol.all_gather_tensor(torch.tensor([[r]]), 0, group).view(-1).tolist() == list(range(p))
    assert funcol.reduce_scatter_tensor(torch.arange(float(p)), "sum", 0, group).tolist() == [float(p * r)]
    assert funcol.all_to_all_single(torch.arange(p) + 10 * r, None, None, group).tolist() == [
        10 * i + r for i in range(p)
    ]
    assert funcol.broadcast(torch.tensor([r]), 1, group).tolist() == [1]


CHECKS: tuple[Callable[[int, int], None], ...] = (
    environment, all_reduce, means, nans, same_bits, scattered_memory, coalesced, sparse, gathering, reducing,
    all_to_all, messages, long_messages, sub_groups, asynchronous, functional,
    *FAILURES, *TRAINING,
)  # fmt: skip


def main() -> None:
    """All checks in turn; a rank that fails one goes on, since the others do."""
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=40))
    r, p = dist.get_rank(), dist.get_world_size()
    report: dict[str, str] = {}
    for check in CHECKS:
        if len(sys.argv) > 2 and check.__name__ not in sys.argv[2:]:
            continue
        start = time.monotonic()
        try:
            check(r, p)
            report[check.__name__] = ""
        except BaseException:  # noqa: BLE001  a check may raise anything
            report[check.__name__] = traceback.format_exc()
        if os.environ.get("SHOW"):
            sys.stderr.write(f"{r} {check.__name__} {time.monotonic() - start:.2f} {report[check.__name__]}\n")
    (FOLDER / f"{r}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
