"""What every rank of an MPI job does in the tests of the transport: all checks in turn, and a report of each.

mpirun -n 3 python tests/support/mpi_conformance.py FOLDER      # writes FOLDER/0.json, ...: {check: what was wrong}
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm.errors import ConfigError, ConfigMismatch, PeerError
from sparcomm.transport import mpi
from sparcomm.transport.base import Transport
from sparcomm.transport.mpi import MpiTransport
from sparcomm.transport.mpi.library import cuda_aware, library
from sparcomm.transport.mpi.world import nodes, notices, world
from support.conformance import CHECKS, bits, floats, sample


def own_abort(t: MpiTransport) -> None:
    """An abort ends the family it is of, and no other."""
    doomed = MpiTransport(timeout=20)
    team = doomed.split(0, -t.rank)
    CHECKS["check_abort_wakes_whoever_waits"](doomed)
    with pytest.raises(PeerError, match="has ended"):
        team.all_reduce(torch.ones(1))
    doomed.close()
    assert notices().look(t._family.number) == ""
    x = torch.ones(1)
    t.all_reduce(x)
    assert x.item() == t.size


def through_the_host(t: MpiTransport) -> None:
    """As if MPI could not reach the tensors where they are."""
    staged = MpiTransport(timeout=20)
    staged._direct = lambda t: False  # type: ignore[method-assign]
    for name in ("exchange_with_capacity", "exchange_takes_every_dtype", "all_to_all", "all_gather_in_place"):
        CHECKS[f"check_{name}"](staged)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((50,), t.rank + 1, dtype=dtype)
        staged.all_reduce(x, native=True)
        assert x.unique().tolist() == [t.size * (t.size + 1) / 2]
    if t.size > 1:
        assert {k: v.dtype for k, v in staged._staging.buffers.items()} == {"send": torch.uint8, "recv": torch.uint8}
    staged.close()


def messages_longer_than_mpi_counts(t: MpiTransport) -> None:
    to, source, before = (t.rank + 1) % t.size, (t.rank - 1) % t.size, mpi.LONGEST
    mpi.LONGEST = 1000
    try:
        for n in (1000, 1001, 2000, 54_321):
            recv = torch.zeros(n, dtype=torch.uint8)
            t.exchange(sample(n, torch.uint8, t.rank), to, recv, source)
            assert bits(recv) == bits(sample(n, torch.uint8, source)), n
        long, short = torch.zeros(10_000, dtype=torch.uint8), 2500 if t.rank % 2 else 900
        t.exchange(sample(short, torch.uint8, t.rank), to, long, source, capacity=True)
        came = 2500 if source % 2 else 900
        assert bits(long[:came]) == bits(sample(came, torch.uint8, source))
        assert not long[came:].any()
        out = torch.zeros(t.size, 3001, dtype=torch.uint8)
        t.all_gather(out, sample(3001, torch.uint8, t.rank))
        assert bits(out) == b"".join(bits(sample(3001, torch.uint8, r)) for r in range(t.size))
        x = torch.arange(5000.0)
        t.all_reduce(x, native=True)
        assert torch.equal(x, t.size * torch.arange(5000.0))
    finally:
        mpi.LONGEST = before


def a_late_peer(t: MpiTransport) -> None:
    slow = MpiTransport(timeout=0.4)
    slow.context = "step 7"
    if t.size > 1 and t.rank == 0:
        start = time.monotonic()
        with pytest.raises(PeerError) as caught:
            slow.exchange(None, 0, torch.empty(2), 1)
        assert 0.4 <= time.monotonic() - start < 5
        want = f"step 7: exchange(recv from float32[2] 1): waiting for rank 1 of {t.size} (tag 1): nothing within 0.4 s"
        assert str(caught.value) == want
        with pytest.raises(PeerError, match="this transport has ended: step 7: exchange"):
            slow.all_reduce(torch.ones(1))
    t.all_reduce(torch.ones(1))


def who_is_late(t: MpiTransport) -> None:
    """In a call of all with all the last rank does not come to; in MPI's own collective; and where a group is made."""
    last, who = t.size - 1, f"waiting for rank {t.size - 1} of"
    for native in (False, True):
        slow = MpiTransport(timeout=0.4)
        if t.rank != last:
            with pytest.raises(PeerError, match=f"{who} {t.size} .*nothing within 0.4 s"):
                slow.all_reduce(torch.ones(2 * t.size), native=native)
        t.all_reduce(torch.ones(1))
    if t.rank != last:
        with pytest.raises(PeerError, match=f"over {t.size} ranks: {who} the job: nothing within 0.4 s"):
            MpiTransport(timeout=0.4)
    t.all_reduce(torch.ones(1))
    if t.size > 1 and t.rank == last:
        with pytest.raises(PeerError, match=f"{who} the job"):
            MpiTransport(timeout=0.4)
    MpiTransport(timeout=20).close()


def messages_longer_than_their_place(t: MpiTransport) -> None:
    if t.size > 1:
        other = MpiTransport(timeout=20)
        with pytest.raises(PeerError, match=f"(?i)waiting for rank {(t.rank - 1) % t.size} of .*trunc"):
            other.exchange(torch.ones(9), (t.rank + 1) % t.size, torch.ones(4), (t.rank - 1) % t.size)


def two_threads(t: MpiTransport) -> None:
    """Each with a transport of its own: MPI is asked for that."""
    both, wrong = [MpiTransport(timeout=20) for _ in range(2)], list[int]()

    def work(number: int) -> None:
        for i in range(50):
            x = floats(500, torch.float32, t.rank + number)
            both[number].all_reduce(x, native=i % 5 == 0)
            y = floats(500, torch.float32, number)
            for r in range(1, t.size):
                y = y + floats(500, torch.float32, r + number)
            if not torch.allclose(x, y, rtol=1e-4, atol=1e-2):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for transport in both:
        transport.close()


def made_again_and_again(t: MpiTransport) -> None:
    for _ in range(30):
        made = MpiTransport(timeout=20)
        x = torch.tensor(float(t.rank))
        made.split(0, 0).all_reduce(x)
        made.close()
        assert x.item() == t.size * (t.size - 1) / 2


def over_some_ranks(t: MpiTransport) -> None:
    order = list(reversed(range(t.size)))
    back = MpiTransport.over(order, timeout=20)
    assert (back.rank, back.size) == (order.index(t.rank), t.size)
    out = torch.empty(t.size, dtype=torch.int64)
    back.all_gather(out, torch.tensor(t.rank))
    assert out.tolist() == order
    # Numbers of families stay apart where ranks have made different numbers of them.
    if t.rank == 0:
        for _ in range(3):
            MpiTransport.over([0]).close()
    after = MpiTransport(timeout=20)
    numbers = torch.empty(t.size, dtype=torch.int64)
    t.all_gather(numbers, torch.tensor(after._family.number))
    assert len(set(numbers.tolist())) == 1
    assert after._family.number != back._family.number
    for made in (back, after):
        made.close()
    for wrong in ([0, 0], [t.size], [r for r in order if r != t.rank]):
        with pytest.raises(ConfigError, match="must be different ones from 0 to"):
            MpiTransport.over(wrong)


def nodes_of_this_machine(t: MpiTransport) -> None:
    team = t.split(t.rank % 2, 0)
    assert (t.nodes, team.nodes) == ((tuple(range(t.size)),), (tuple(range(team.size)),))
    team.close()
    assert nodes([4, 0, 4, 4, 0]) == ((0, 2, 3), (1, 4))


def refusals(t: MpiTransport) -> None:
    with pytest.raises(ConfigError, match="must be a timedelta or seconds"):
        MpiTransport(timeout=0)
    for said, means in (("1", True), ("0", False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARCOMM_MPI_CUDA", said)
            cuda_aware.cache_clear()
            assert cuda_aware() is means
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARCOMM_MPI_CUDA", "yes")
        cuda_aware.cache_clear()
        with pytest.raises(ConfigError, match="SPARCOMM_MPI_CUDA='yes': must be 0"):
            cuda_aware()
    assert isinstance(cuda_aware(), bool)
    assert library().startswith(("Open MPI ", "MPICH "))
    closed = MpiTransport(timeout=20)
    closed.close()
    closed.close()
    with pytest.raises(PeerError, match="ended: closed"):
        closed.all_reduce(torch.ones(1))


def bits_of_the_simulator(t: MpiTransport) -> None:
    """Every algorithm, as over the simulator: totals, residuals and traffic. Not MPI's own sums, in its own order.

    At one size: every rank loads all kernels.
    """
    if t.size != 3:
        return
    from sparcomm.algorithms import registry
    from sparcomm.transport import sim

    for cls in registry().values():
        for algorithm in [case for case in cls.cases(t.size) if not getattr(case, "native", False)][:2]:
            made, here = MpiTransport(timeout=20), torch.empty(t.size, 32, dtype=torch.uint8)
            t.all_gather(here, digest(made, algorithm))
            made.close()
            if t.rank == 0:
                there = sim.run(t.size, lambda rank, algorithm=algorithm: digest(rank, algorithm)).results
                assert bits(here) == bits(torch.stack(there)), algorithm


def digest(transport: Transport, algorithm: Any) -> Tensor:
    """A digest of three steps on one rank."""
    from support.sums import normals

    state, residual = algorithm.init(300, torch.float32, torch.device("cpu"), transport.size), None
    found = hashlib.sha256()
    for step in range(3):
        done = algorithm.reduce(normals(300, transport.rank, step), residual, state, step, transport)
        residual, state = done.residual, done.state
        found.update(bits(done.total) + (b"none" if residual is None else bits(residual)))
    found.update(repr(transport.traffic).encode())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


def the_hook(t: MpiTransport) -> None:
    """DDP over Gloo, the hook over Gloo and over MPI: the same weights, bit for bit. At one size, for it takes long."""
    if t.size != 2:
        return
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import sparcomm
    from support.sums import normals

    store = dist.FileStore(str(Path(sys.argv[1]) / "store"), t.size)
    dist.init_process_group("gloo", store=store, rank=t.rank, world_size=t.size)
    found: list[tuple[str, bytes, object]] = []
    for kind in ("torch", "mpi"):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 5)))
        state = sparcomm.attach(ddp, sparcomm.SparDL(density=0.05), transport=kind, timeout=20)
        sgd = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(4):
            ddp(normals(240, t.rank, step).view(8, 30)).square().mean().backward()
            sgd.step()
            sgd.zero_grad()
        weights = b"".join(bits(p) for p in ddp.parameters())
        found.append((type(state._engine.transport).__name__, weights, state.traffic))
        state.close()
    assert [name for name, _, _ in found] == ["TorchTransport", "MpiTransport"]
    assert found[0][1:] == found[1][1:]
    dist.destroy_process_group()
    # Numbered otherwise than by mpirun.
    store = dist.FileStore(str(Path(sys.argv[1]) / "other store"), t.size)
    dist.init_process_group("gloo", store=store, rank=t.size - 1 - t.rank, world_size=t.size)
    with pytest.raises(ConfigMismatch, match=r"rank minus MPI's \(rank 0: -1; rank 1: 1\)"):
        sparcomm.attach(DistributedDataParallel(nn.Linear(2, 2)), sparcomm.Dense(), transport="mpi", timeout=20)
    dist.destroy_process_group()


OWN: tuple[Callable[[MpiTransport], None], ...] = (
    own_abort, through_the_host, messages_longer_than_mpi_counts, messages_longer_than_their_place, a_late_peer,
    who_is_late, the_hook, two_threads, made_again_and_again, over_some_ranks, nodes_of_this_machine, refusals,
    bits_of_the_simulator,
)  # fmt: skip
ALL: dict[str, Callable[[MpiTransport], None]] = {
    **{name: check for name, check in CHECKS.items() if name != "check_abort_wakes_whoever_waits"},
    **{check.__name__: check for check in OWN},
}


def wrong_with(check: Callable[[MpiTransport], None], t: MpiTransport) -> str:
    """The traceback of what a check raises; "" = it holds."""
    try:
        check(t)
    except BaseException:  # noqa: BLE001  (pytest.fail is one, too)
        return traceback.format_exc()
    return ""


def main(folder: Path) -> None:
    """Runs all checks, also after one that fails: the others then show what still works."""
    torch.set_num_threads(1)
    t = MpiTransport.world(timeout=20)
    report = dict.fromkeys(ALL, "did not come to it")
    try:
        for name, check in ALL.items():
            report[name] = wrong_with(check, t)
    finally:
        (folder / f"{world().Get_rank()}.json").write_text(json.dumps(report))
    t.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
