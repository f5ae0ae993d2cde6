"""``nn.Embedding(sparse=True)`` under the hook: in as COO, out as COO, whole, beside whatever the algorithm does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparcomm
from sparcomm import ConfigMismatch, Dense, GradientError, RemoteError, SparDL
from sparcomm.algorithms import Algorithm
from sparcomm.collectives.rows import union_traffic
from sparcomm.ddp.sparse_layout import check_sparse
from sparcomm.transport import sim
from support.modes import assert_replicas
from support.pool import pool
from support.training import small_net, wrap

TIMEOUT = 30.0
ROWS, WIDTH = 500, 16


class Words(nn.Module):
    """Bags of words from a table, and a small network that the table's rows go through."""

    def __init__(self, sparse: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", sparse=sparse, dtype=dtype)
        self.net = small_net().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.table(x))


class Table(nn.Module):
    """A table: ``backward`` of the output gives row ``x[i]`` the gradient ``g[i]``, added up where rows repeat."""

    def __init__(self, sparse: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse, dtype=dtype)
        self.other = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return (self.table(x).to(g.dtype) * g).sum() + self.other.sum()


def rows_of(rank: int, step: int, count: int = 24) -> tuple[Tensor, Tensor]:
    """This rank's rows, some of them several times and some on other ranks too, and their gradients."""
    made = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 90, (count,), generator=made), torch.randn(count, WIDTH, generator=made)


def ordered_mean(size: int, step: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """What the ordered dense all-reduce makes of all ranks' gradients, and the hook of that: (ROWS, WIDTH)."""
    working = torch.float64 if dtype == torch.float64 else torch.float32

    def rank(t: Any) -> Tensor:
        x, g = rows_of(t.rank, step)
        mine = torch.sparse_coo_tensor(x.view(1, -1), g.to(dtype).to(working), (ROWS, WIDTH)).coalesce().to_dense()
        state = Dense().init(mine.numel(), working, torch.device("cpu"), t.size)
        total = Dense().reduce(mine.view(-1), None, state, step, t).total
        assert total is not None
        return (total / size).to(dtype).view(ROWS, WIDTH)

    with torch.sparse.check_sparse_tensor_invariants(False):
        return sim.run(size, rank).results[0]


def coo_step(ddp: nn.Module, rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One backward pass; the table's gradient as DDP leaves it."""
    ddp.zero_grad()
    x, g = rows_of(rank, step)
    ddp(x, g.to(dtype)).backward()
    grad = next(p for name, p in ddp.named_parameters() if name.endswith("table.weight")).grad
    assert grad is not None
    return grad


def exact(rank: int, size: int, algorithm: Algorithm, dtype: torch.dtype, options: dict[str, Any]) -> None:
    ddp = wrap(Table(dtype=dtype))
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, **options)
    for step in range(4):
        before = vars(state.traffic).copy()
        grad = coo_step(ddp, rank, step, dtype)
        anyone = sorted({int(i) for r in range(size) for i in rows_of(r, step)[0]})
        assert grad.layout == torch.sparse_coo
        assert grad.is_coalesced()
        assert grad.indices().view(-1).tolist() == anyone
        assert torch.equal(grad.to_dense(), ordered_mean(size, step, dtype))
        assert_replicas([grad.values()])
        rounds, _, sent = union_traffic(ROWS, len(anyone), WIDTH, max(4, dtype.itemsize), size)
        state.stats()  # waits for the worker
        assert 0 <= state.traffic.rounds - before["rounds"] - rounds <= 4  # what is left is the other parameter's
        assert 0 <= state.traffic.bytes_sent - before["bytes_sent"] - sent <= 400
    stats = state.stats()
    assert (stats["steps"], stats["skipped"]) == (4, 0)
    assert set(stats["per_parameter"]) == {"other"}
    assert stats["seconds"]["wire"] > 0
    entry = next(iter(state.state_dict().values()))
    assert "table.weight" not in entry["owed"][0]["residuals"]
    state.close()


WAYS: list[tuple[int, Algorithm, torch.dtype, dict[str, Any]]] = [
    (1, SparDL(density=0.01), torch.float32, {}),
    (2, Dense(), torch.float32, {}),
    (2, Dense(native=True), torch.float64, {}),
    (3, SparDL(density=0.01), torch.float32, {"warmup": 2}),
    (3, SparDL(density=0.01), torch.bfloat16, {"skip": 10}),
]


@pytest.mark.parametrize(("size", "algorithm", "dtype", "options"), WAYS)
def test_rows_are_summed_in_rank_order_whatever_the_algorithm(
    size: int, algorithm: Algorithm, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pool(size).run(exact, algorithm, dtype, options)


def trained(rank: int, size: int, hooked: bool, sparse: bool, kind: str, kwargs: dict[str, Any]) -> list[Tensor]:
    ddp = DistributedDataParallel(Words(sparse), **kwargs)
    if hooked:
        state = sparcomm.attach(ddp, SparDL(density=1.0), timeout=TIMEOUT)
    table, rest = [ddp.module.table.weight], list(ddp.module.net.parameters())
    optimizers = [torch.optim.SGD(rest, lr=0.1)]
    optimizers += [torch.optim.SparseAdam(table, lr=0.01) if kind == "SparseAdam" else torch.optim.SGD(table, lr=0.5)]
    made = torch.Generator().manual_seed(rank)
    for _ in range(6):
        x = torch.randint(0, ROWS, (8, 5), generator=made)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (ddp(x) - (x.sum(1, keepdim=True) % 3)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    if hooked:
        assert_replicas(ddp.parameters())
        assert state.step == 6
        state.close()
    return [p.detach().clone() for p in ddp.parameters()]


@pytest.mark.parametrize("kind", ["SGD", "SparseAdam"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, {"static_graph": True}], ids=str
)
def test_training_is_that_of_plain_ddp(kind: str, kwargs: dict[str, Any]) -> None:
    mine, plain = (pool(2).run(trained, hooked, True, kind, kwargs) for hooked in (True, False))
    for ours, theirs in zip(mine[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sgd_takes_either_layout_to_the_same_weights() -> None:
    sparse, dense = (pool(2).run(trained, True, sparse, "SGD", {})[0] for sparse in (True, False))
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def mixed(rank: int, size: int) -> float:
    """Dense layers go by SparDL with error feedback, the table whole."""
    ddp = wrap(Words(True))
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    made = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(40):
        x = torch.randint(0, 60, (16, 5), generator=made)
        optimizer.zero_grad()
        loss = (ddp(x) - (x[:, :1] % 2)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert_replicas(ddp.parameters())
    stats = state.stats()
    assert stats["residual_norm"] > 0
    assert stats["bytes_sent"] < 0.25 * 40 * 2 * (size - 1) / size * 4 * sum(p.numel() for p in ddp.parameters())
    state.close()
    return sum(losses[-5:]) / sum(losses[:5])


def test_a_mixed_model_trains() -> None:
    assert max(pool(3).run(mixed)) < 0.7


def empty_and_joined(rank: int, size: int) -> None:
    """Ranks without any row, steps in which no rank has one, accumulation without synchronisation, and Join."""
    ddp = wrap(Table())
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT)
    nothing = torch.zeros(0, dtype=torch.long)
    for some in (True, False, True):
        ddp.zero_grad(set_to_none=some)
        x = nothing if rank == 0 or not some else torch.tensor([4, 2, 4])
        ddp(x, torch.ones(len(x), WIDTH)).backward()
        grad = ddp.module.table.weight.grad.coalesce()
        expected = torch.zeros(ROWS)
        if some:
            expected[2], expected[4] = (size - 1) / size, 2 * (size - 1) / size
        assert torch.equal(grad.to_dense(), expected.unsqueeze(1).expand(ROWS, WIDTH))
    ddp.zero_grad()
    with ddp.no_sync():
        ddp(torch.tensor([rank]), torch.ones(1, WIDTH)).backward()
    ddp(torch.tensor([rank, 10]), torch.ones(2, WIDTH)).backward()
    expected = torch.zeros(ROWS)
    expected[:size], expected[10] = 2 / size, 1.0
    assert torch.equal(ddp.module.table.weight.grad.to_dense()[:, 0], expected)
    with ddp.join():
        for step in range(1 + rank):
            ddp.zero_grad()
            ddp(torch.tensor([7]), torch.ones(1, WIDTH)).backward()
            assert torch.equal(ddp.module.table.weight.grad.to_dense()[7, 0], torch.tensor((size - step) / size))
    assert state.stats()["skipped"] == 0
    state.close()


def test_ranks_without_rows_and_without_inputs() -> None:
    pool(2).run(empty_and_joined)


def overflown(rank: int, size: int, bad: float) -> None:
    """One rank's inf or NaN: the step counts nowhere, not even for what the dense layers owe; the next one does."""
    ddp = wrap(Words(True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = sparcomm.attach(ddp, SparDL(density=0.05), scaler=scaler, timeout=TIMEOUT)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    broken = ddp.module.table.weight.register_hook(lambda g: g * bad if rank == size - 1 and step == 2 else g)
    made = torch.Generator().manual_seed(rank)
    norms = []
    for step in range(4):
        weights = [p.detach().clone() for p in ddp.parameters()]
        optimizer.zero_grad()
        scaler.scale(ddp(torch.randint(0, ROWS, (8, 5), generator=made)).square().mean()).backward()
        norms.append(state.stats()["residual_norm"])
        scaler.step(optimizer)
        scaler.update()
        changed = not all(torch.equal(a, b) for a, b in zip(weights, ddp.parameters(), strict=True))
        assert changed == (step != 2)
    assert norms[2] == norms[1] != norms[3]
    assert state.stats()["skipped"] == 1
    assert scaler.get_scale() == 512.0
    broken.remove()
    assert_replicas(ddp.parameters())
    state.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_skips_the_step_everywhere(bad: float) -> None:
    pool(2).run(overflown, bad)


def scaled(rank: int, size: int, dtype: torch.dtype) -> None:
    """The mean carries the scale that the gradients carry; clipping by norm knows the rows."""
    ddp = wrap(Table(dtype=dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    state = sparcomm.attach(ddp, Dense(), scaler=scaler, timeout=TIMEOUT)
    for step in range(3):
        x, g = rows_of(rank, step)
        ddp.zero_grad()
        scaler.scale(ddp(x, g.to(dtype))).backward()
        grad = ddp.module.table.weight.grad
        expected = ordered_mean(size, step, dtype).float() * 2.0**12
        assert torch.equal(grad.to_dense().float(), expected)
    local = torch.sparse_coo_tensor(x.view(1, -1), g.to(dtype).float(), (ROWS, WIDTH), check_invariants=False)
    mine = (local.coalesce().values().double().square().sum() + 5.0).sqrt()
    dist.all_reduce(mine)
    before = grad.to_dense()
    bound = state.clip_grad_norm_(1.0)
    torch.testing.assert_close(bound, mine / size, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(grad.to_dense().float(), before.float() / float(bound), rtol=1e-2, atol=1e-4)
    state.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_scale_and_the_norm(dtype: torch.dtype) -> None:
    pool(2).run(scaled, dtype)


def wrong_on_one_rank(rank: int, size: int) -> None:
    ddp = wrap(Table())
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT)
    coo_step(ddp, rank, 0)
    if rank == 1:
        ddp.module.table.weight.register_hook(lambda g: g.to_dense().to_sparse())
    with pytest.raises(RuntimeError, match=r"GradientError.*2 sparse and 0 dense dimensions.*sparse=False"):
        coo_step(ddp, rank, 1)
    with pytest.raises(GradientError if rank == 1 else RemoteError, match="2 sparse and 0 dense"):
        state.raise_if_failed()
    state.close()


def test_a_gradient_of_scattered_elements_is_everybodys_error() -> None:
    pool(3).run(wrong_on_one_rank)


def sparse_on_one_rank(rank: int, size: int) -> None:
    """Found before the first byte: DDP's buckets differ, and Gloo aborts a process where sizes differ."""
    with pytest.raises(ConfigMismatch, match=r"gradients of sparse layout \(rank 0: table\.weight; rank 1: none\)"):
        sparcomm.attach(wrap(Table(sparse=rank == 0)), Dense(), timeout=TIMEOUT)


def test_a_layout_that_differs_between_ranks_is_everybodys_error() -> None:
    pool(2).run(sparse_on_one_rank)


def with_memory(rank: int, size: int, memory: Any) -> None:
    ddp = wrap(Table())
    state = sparcomm.attach(ddp, SparDL(density=0.1), memory=memory, timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match=r"GradientError.*memory=.*ErrorFeedback"):
        coo_step(ddp, rank, 0)
    state.close()


@pytest.mark.parametrize("memory", [sparcomm.MomentumCorrection(0.9), sparcomm.AdamCorrection(0.999)], ids=repr)
def test_a_memory_by_element_is_refused(memory: Any) -> None:
    pool(2).run(with_memory, memory)


def test_what_cannot_be_summed_says_what_to_do() -> None:
    weight = torch.zeros(4, 3)
    good = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3), check_invariants=True)
    check_sparse(good, [weight], corrects=False, on_nccl=False)
    with pytest.raises(GradientError, match=r"NCCL: the host would have to wait.*process group on Gloo"):
        check_sparse(good, [weight], corrects=False, on_nccl=True)
    for bad, words in (
        (good.to_dense().to_sparse(), "2 sparse and 0 dense dimensions"),
        (good.to(torch.complex64), "complex64"),
        (good.to(torch.int32), "int32"),
    ):
        with pytest.raises(GradientError, match=words):
            check_sparse(bad, [weight], corrects=False, on_nccl=False)


def resumed(rank: int, size: int) -> None:
    """A checkpoint knows the rest of the model as if the table were not there; training goes on bit for bit."""

    def fresh() -> tuple[Any, Any]:
        ddp = wrap(Words(True))
        return ddp, sparcomm.attach(ddp, SparDL(density=0.05), timeout=TIMEOUT)

    def train(ddp: Any, steps: range) -> None:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in steps:
            made = torch.Generator().manual_seed(10 * step + rank)
            optimizer.zero_grad()
            ddp(torch.randint(0, ROWS, (8, 5), generator=made)).square().mean().backward()
            optimizer.step()

    whole, state = fresh()
    train(whole, range(3))
    saved, weights = state.state_dict(), {k: v.clone() for k, v in whole.module.state_dict().items()}
    train(whole, range(3, 6))
    state.close()
    again, state = fresh()
    again.module.load_state_dict(weights)
    state.load_state_dict(saved)
    train(again, range(3, 6))
    state.flush()
    state.close()
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_do_not_mind() -> None:
    pool(2).run(resumed)
