"""Residuals between steps: what is kept of them, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparcomm
from sparcomm import HookState, SparDL
from sparcomm.ddp import checkpoint
from sparcomm.ddp.storage import KINDS, Storage, seed_of
from sparcomm.errors import ConfigError
from sparcomm.workspace import Workspace
from support.kernels import data, same
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, net_step, small_net, wrap

CPU = torch.device("cpu")


TIMEOUT = 30.0


def residual(n: int = 1000, dtype: torch.dtype = torch.float32, space: Workspace | None = None) -> Tensor:
    return (space or Workspace()).take(n, dtype, CPU).copy_(data("normal", n, dtype))


@pytest.mark.parametrize("kind", ["float32", "pinned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_cpu_full_precision_is_the_tensor_itself(kind: str, dtype: torch.dtype) -> None:
    storage, space = Storage(kind), Workspace()
    r = residual(dtype=dtype, space=space)
    assert storage.keep(r, 1, 2, 3, space) is r
    assert storage.adopt(r) is r
    assert storage.use(r, dtype, CPU, space) is r
    assert space.take(1000, dtype, CPU) is not r
    storage.settle()


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_bfloat16_halves_the_memory_and_recycles_both_buffers(n: int) -> None:
    storage, space = Storage("bfloat16"), Workspace()
    r = residual(n, space=space)
    stored = storage.keep(r, 1, 2, 3, space)
    assert stored.dtype == torch.bfloat16
    assert stored.shape == (n,)
    assert space.take(n, torch.float32, CPU) is r
    space.give(r)
    used = storage.use(stored, torch.float32, CPU, space)
    assert used is r
    assert torch.equal(used, stored.to(torch.float32))
    space.give(used, stored)
    assert storage.keep(residual(n, space=space), 2, 2, 3, space) is stored


def test_rounding_is_seeded_by_step_unit_and_rank() -> None:
    storage, r = Storage("bfloat16"), residual()

    def kept(*seed: int) -> Tensor:
        return storage.keep(r.clone(), *seed, Workspace())

    first = kept(7, 1, 0)
    assert torch.equal(kept(7, 1, 0), first)
    others = [kept(8, 1, 0), kept(7, 0, 0), kept(7, 1, 1)]
    assert all(not torch.equal(other, first) for other in others)
    assert len({seed_of(s, u, r) for s in range(20) for u in range(5) for r in range(5)}) == 500
    assert 0 <= seed_of(1 << 40, 0, 0) < 1 << 32


def test_a_small_gradient_is_not_lost_over_many_steps() -> None:
    """Rounded to nearest, 1 + 1e-4 would be 1 for ever."""
    storage, space = Storage("bfloat16"), Workspace()
    n, steps = 4000, 400
    stored = storage.keep(torch.ones(n), 0, 0, 0, space)
    for step in range(1, steps + 1):
        stored = storage.keep(storage.use(stored, torch.float32, CPU, space) + 1e-4, step, 0, 0, space)
    assert stored.to(torch.float64).mean().item() == pytest.approx(1 + steps * 1e-4, abs=1e-3)
    assert float(stored.min()) < 1.04 < float(stored.max())


def test_what_is_not_finite_stays() -> None:
    r = data("special", 500, torch.float32)
    stored = Storage("bfloat16").keep(r.clone(), 1, 1, 1, Workspace())
    assert same(stored[~r.isfinite()], r[~r.isfinite()].to(torch.bfloat16))
    assert stored[r.isfinite()].isfinite().all()


def test_what_comes_from_elsewhere_is_kept_exactly() -> None:
    storage = Storage("bfloat16")
    representable, sums = residual().bfloat16().float(), residual()
    assert storage.adopt(representable).dtype == torch.bfloat16
    assert torch.equal(storage.adopt(representable).float(), representable)
    assert storage.adopt(sums) is sums
    assert storage.use(sums, torch.float32, CPU, Workspace()) is sums


def test_float64_is_refused_where_it_would_be_cut() -> None:
    wide, storage = residual(dtype=torch.float64), Storage("bfloat16")
    for call in (
        lambda: storage.check(torch.float64),
        lambda: storage.keep(wide, 0, 0, 0, Workspace()),
        lambda: storage.adopt(wide),
    ):
        with pytest.raises(ConfigError, match="use storage='float32', which keeps them in float64"):
            call()
    Storage("pinned").check(torch.float64)
    with pytest.raises(ConfigError, match="no use to float64 gradients"):
        HookState(SparDL(density=0.1), nn.Linear(2, 2).double(), storage="bfloat16")
    mixed = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).double())
    HookState(SparDL(density=0.1), mixed, storage="bfloat16", skip="norms")


@pytest.mark.parametrize("kind", ["float16", "", "BFLOAT16"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"storage='{kind}': must be one of 'float32', 'bfloat16', 'pinned'"):
        Storage(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [True, False])
def test_the_device_can_choose_between_old_and_new(kind: str, good: bool) -> None:
    storage, flag = Storage(kind), torch.tensor(good)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    new, old = (data("normal", 100, dtype, seed=s) for s in (1, 2))
    new[0], old[1], nothing = float("inf"), float("nan"), torch.zeros(100, dtype=dtype)
    for a, b in ((new, old), (new, None), (None, old)):
        expected = (a if good else b) if (a if good else b) is not None else nothing
        got = storage.select(flag, None if a is None else a.clone(), None if b is None else b.clone())
        assert got is not None
        assert same(got, expected)
    assert storage.select(flag, new, new) is new
    assert storage.select(flag, None, None) is None
    if kind == "bfloat16":  # just loaded, in more bits
        got = storage.select(flag, new.clone(), old.float())
        assert got is not None
        assert same(got, new if good else old)


# ---- with real ranks -------------------------------------------------------------------------------------------------


def training(rank: int, size: int, kind: str, steps: int) -> tuple[list[float], dict[str, Any], set[torch.dtype]]:
    ddp = wrap(small_net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
    state = sparcomm.attach(ddp, SparDL(density=0.1), storage=kind, timeout=TIMEOUT)
    losses = [net_step(ddp, optimizer, rank, step) for step in range(steps)]
    (entry,) = checkpoint.entries(state.state_dict())
    stats = state.stats()
    state.close()
    return losses, stats, {t.dtype for t in entry["residuals"].values()}


def test_narrow_residuals_train_as_well_in_half_the_memory() -> None:
    full, narrow, pinned = (pool(2).run(training, kind, 60) for kind in ("float32", "bfloat16", "pinned"))
    for (wide, stats, _), (small, fewer, dtypes), (same_as_wide, *_) in zip(full, narrow, pinned, strict=True):
        assert dtypes == {torch.bfloat16}
        assert fewer["memory_bytes"] * 2 == stats["memory_bytes"] > 0
        assert fewer["residual_norm"] == pytest.approx(stats["residual_norm"], rel=0.2)
        assert same_as_wide == wide
        assert small != wide
        assert sum(small[-20:]) == pytest.approx(sum(wide[-20:]), rel=0.05)
        assert sum(small[-20:]) < 0.7 * sum(small[:20])


def flushed(rank: int, size: int, kind: str) -> tuple[list[Tensor], list[Tensor], float, Any]:
    """What was fed, what was delivered with a flush at the end, what is owed then, and a later state_dict."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.05), storage=kind, timeout=TIMEOUT)
    fed, delivered = ([torch.zeros(n, dtype=torch.float64) for n in SIZES] for _ in range(2))
    for step in range(6):
        gradients = integers(SIZES, rank, step, bound=4)
        gradient_step(ddp, gradients)
        if step in (2, 5):
            state.flush()
        for i, p in enumerate(ddp.parameters()):
            assert p.grad is not None
            fed[i] += gradients[i]
            delivered[i] += p.grad
    owed, after = state.stats()["residual_norm"], state.state_dict()
    state.load_state_dict(after)
    gradient_step(ddp, integers(SIZES, rank, 6))
    state.close()
    return fed, delivered, owed, checkpoint.entries(after)[0]["residuals"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_flush_delivers_all_that_is_owed(kind: str) -> None:
    results = pool(2).run(flushed, kind)
    for i in range(len(SIZES)):
        total = sum(fed[i] for fed, *_ in results)
        for _, delivered, owed, residuals in results:
            # Integers this small are exact in bfloat16, too, so that here even narrow residuals lose nothing.
            assert torch.equal(2 * delivered[i], total)
            assert owed == 0
            assert not any(t.any() for t in residuals.values())


def lost_rank(rank: int, size: int) -> tuple[int, Any, Any]:
    """A hook that has failed still gives what was committed, and a new one goes on from there."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT)
    for step in range(3):
        gradient_step(ddp, integers(SIZES, rank, step))
    before = state.state_dict()
    wrong = integers(SIZES, rank, 3)
    state.close()
    with pytest.raises(RuntimeError, match="closed"):
        gradient_step(ddp, wrong)
    after = state.state_dict()
    again = wrap(Fed())
    fresh = sparcomm.attach(again, Halves(), timeout=TIMEOUT)
    fresh.load_state_dict(after)
    gradient_step(again, wrong)
    steps = fresh.step
    fresh.close()
    return steps, before, after


def test_what_a_failed_hook_had_committed_can_be_saved_and_loaded() -> None:
    for steps, before, after in pool(2).run(lost_rank):
        assert steps == 4
        (old,), (new,) = checkpoint.entries(before), checkpoint.entries(after)
        assert all(torch.equal(new["residuals"][name], t) for name, t in old["residuals"].items())
        assert new["step"] == 3


def displaced(rank: int, size: int, options: dict[str, Any], rates: list[float]) -> tuple[Any, ...]:
    """(what weights should have moved by, have moved by, and still will at the last rate), by parameter."""
    ddp = wrap(Fed())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    state = sparcomm.attach(ddp, SparDL(density=0.05), timeout=TIMEOUT, optimizer=optimizer, **options)
    meant = [torch.zeros(n, dtype=torch.float64) for n in SIZES]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        gradients = integers(SIZES, rank, step)
        gradient_step(ddp, gradients)
        optimizer.step()
        for i, g in enumerate(gradients):
            meant[i] += rate * g
    (entry,) = checkpoint.entries(state.state_dict())
    state.close()
    owes = [entry["residuals"].get(f"p.{i}", torch.zeros(n)).double() * rates[-1] for i, n in enumerate(SIZES)]
    moved = [-p.detach().double().view(-1) for p in ddp.parameters()]
    return meant, moved, owes, entry["learning_rates"]


def dense_at_3(step: int) -> float | None:
    return None if step == 3 else 0.05


@pytest.mark.parametrize("options", [{}, {"storage": "bfloat16"}, {"warmup": dense_at_3}])
def test_residuals_that_follow_the_learning_rate_keep_what_weights_are_owed(options: dict[str, Any]) -> None:
    rates = [1.0, 1.0, 1.0, 0.1, 0.1, 0.25, 0.5]
    results = pool(2).run(displaced, {"lr_aware": True} | options, rates)
    gap = imbalance(results)
    assert gap < (1e-2 if "storage" in options else 1e-5)
    assert all(set(learning_rates.values()) == {0.5} for *_, learning_rates in results)
    # Without, what is owed from the steps at rate 1 is delivered at the lower one.
    assert imbalance(pool(2).run(displaced, options, rates)) > 0.3


def imbalance(results: list[tuple[Any, ...]]) -> float:
    """Of what weights should move by in sum, the share that is neither done nor owed."""
    missing, whole = 0.0, 0.0
    for i in range(len(SIZES)):
        meant = sum(meant[i] for meant, *_ in results)
        rest = meant - 2 * results[0][1][i] - sum(owes[i] for _, _, owes, _ in results)
        missing += float(rest.square().sum())
        whole += float(meant.square().sum())
    return (missing / whole) ** 0.5


def test_the_ratio_of_learning_rates_is_limited() -> None:
    rates = [1.0, 1.0, 1.0, 0.01]
    near, far = (imbalance(pool(2).run(displaced, {"lr_aware": limit}, rates)) for limit in (100.0, 10.0))
    assert near < 1e-5
    assert far > 0.1


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize(("new", "old"), [("a", "b"), ("a", None), (None, "b"), (None, None), ("a", "a")])
def test_a_device_chooses_what_is_committed(good: bool, new: str | None, old: str | None) -> None:
    made = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0, 4.0])}
    wanted = new if good else old
    want = torch.zeros(2) if wanted is None else made[wanted].clone()
    chosen = Storage().select(torch.tensor(good), made.get(new or ""), made.get(old or ""))
    assert (torch.zeros(2) if chosen is None else chosen).tolist() == want.tolist()


def test_what_is_committed_may_be_narrower_than_what_was_loaded() -> None:
    for good, want in ((True, 1.5), (False, 1.0)):
        new, old = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-12])
        chosen = Storage("bfloat16").select(torch.tensor(good), new, old)
        assert chosen is new
        assert chosen.item() == want
