"""What optimizers that communicate have in common: steps as transactions, unused parameters, checkpoints, errors."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparcomm import (
    CheckpointError,
    ConfigError,
    ConfigMismatch,
    GradientError,
    MajorityVote,
    NotInitializedError,
)
from sparcomm.optim import DistributedLion, OneBitAdam, SignSGD, Signum
from sparcomm.optim.collective import CollectiveOptimizer
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.optim import Make, assert_same_bits, feed, flat, parameters, train


def adam(params: Any, **settings: Any) -> CollectiveOptimizer:
    return OneBitAdam(params, **{"lr": 0.01, "warmup": 3, **settings})


def signum(params: Any, **settings: Any) -> CollectiveOptimizer:
    return Signum(params, **{"lr": 0.01, **settings})


def voted_with_feedback(params: Any, **settings: Any) -> CollectiveOptimizer:
    algorithm = MajorityVote(scale=True, error_feedback=True, momentum=0.5)
    return SignSGD(params, **{"lr": 0.01, "algorithm": algorithm, **settings})


def lion(params: Any, **settings: Any) -> CollectiveOptimizer:
    return DistributedLion(params, **{"lr": 0.01, **settings})


KINDS = pytest.mark.parametrize("make", [signum, lion, adam, voted_with_feedback])
BEFORE = (torch.float32, torch.bfloat16, torch.float64)


@KINDS
def test_mixed_dtypes_move_alike_on_all_ranks(make: Make) -> None:
    found = train(make, 3, 5, BEFORE)
    assert_same_bits(found)
    assert not torch.equal(found[0], flat(parameters(BEFORE)))


@KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_step_that_is_not_finite_on_one_rank_leaves_no_trace_on_any(make: Make, bad: float, at: int) -> None:
    """Both in Adam's warm-up and after it, and in the second dtype only."""

    def rank(transport: Transport) -> tuple[Tensor, int, int]:
        params = parameters((torch.float32, torch.float64))
        optimizer = make(params, transport=transport)
        for step in range(6):
            if step == at:
                feed(params, transport.rank, 77)
                if transport.rank == 1:
                    assert params[1].grad is not None
                    params[1].grad[2, 1] = bad
                before = [copy.deepcopy(optimizer.state_dict()), flat(params)]
                optimizer.step()
                after = optimizer.state_dict()
                assert torch.equal(before[1], flat(params))
                assert same(before[0]["collective"]["buckets"], after["collective"]["buckets"])
            feed(params, transport.rank, step)
            optimizer.step()
        return flat(params), optimizer.steps, optimizer.skipped_steps

    found = sim.run(2, rank).results
    assert [x[1:] for x in found] == [(6, 1)] * 2
    for weights, undisturbed in zip(
        (x[0] for x in found), train(make, 2, 6, (torch.float32, torch.float64)), strict=True
    ):
        assert torch.equal(weights, undisturbed)


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@KINDS
def test_a_parameter_that_no_rank_has_used_is_left_as_it_is(make: Make) -> None:
    def rank(transport: Transport) -> None:
        params = parameters()
        optimizer = make(params, transport=transport, weight_decay=0.5)
        for step in range(8):
            feed(params, transport.rank, step)
            params[1].grad = None  # unused on all ranks, from the start
            if step >= 4:
                params[3].grad = None  # and this one later on
            before, own = [p.detach().clone() for p in params], saved_views(optimizer, 3)
            optimizer.step()
            moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
            assert moved == [True, False, True, step < 4, False]
            assert step < 4 or same(saved_views(optimizer, 3), own)

    sim.run(3, rank)


def saved_views(optimizer: CollectiveOptimizer, at: int) -> list[Tensor]:
    """One parameter's part of everything that the optimizer keeps."""
    found: list[Tensor] = []
    for bucket, own in zip(optimizer._buckets, optimizer.state_dict()["collective"]["buckets"], strict=True):
        flats = [*own["flat"].values(), *([] if own["residual"] is None else [own["residual"]])]
        found += [bucket.views(x)[at] for x in flats]
    return found


@KINDS
def test_a_missing_gradient_counts_as_zero_where_others_have_one(make: Make) -> None:
    def with_hole(zeros: bool) -> Callable[[Transport], Tensor]:
        def rank(transport: Transport) -> Tensor:
            params = parameters()
            optimizer = make(params, transport=transport)
            for step in range(5):
                feed(params, transport.rank, step)
                hole = params[(step + transport.rank) % 2]
                hole.grad = torch.zeros_like(hole) if zeros else None
                optimizer.step()
            return flat(params)

        return rank

    found = sim.run(3, with_hole(False)).results
    assert_same_bits(found)
    assert torch.equal(found[0], sim.run(3, with_hole(True)).results[0])


@KINDS
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_resumed_run_goes_on_bit_for_bit(make: Make, at: int) -> None:
    """Each rank from its own file; before the first step, in Adam's warm-up, and after it."""

    def rank(transport: Transport) -> Tensor:
        params = parameters(BEFORE)
        optimizer = make(params, transport=transport)
        for step in range(8):
            if step == at:
                file = io.BytesIO()
                torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                params = [nn.Parameter(x) for x in saved["weights"]]
                optimizer = make(params, transport=transport, lr=0.5)
                optimizer.load_state_dict(saved["optimizer"])
                assert optimizer.steps == step
                if at == 5:  # a state that was never taken up is given on
                    optimizer.load_state_dict(optimizer.state_dict())
            feed(params, transport.rank, step)
            optimizer.step()
        return flat(params)

    found, whole = sim.run(3, rank).results, train(make, 3, 8, BEFORE)
    assert_same_bits([*found, *whole])


def test_loaded_into_one_that_has_stepped() -> None:
    def rank(transport: Transport) -> tuple[Tensor, Tensor]:
        params = parameters()
        optimizer = adam(params, transport=transport)
        ends: list[Tensor] = []
        saved: dict[str, Any] = {}
        for _ in range(2):
            for step in range(8):
                if step == 4 and not ends:
                    saved, weights = optimizer.state_dict(), [p.detach().clone() for p in params]
                feed(params, transport.rank, step)
                if not ends or step >= 4:
                    optimizer.step()
            ends.append(flat(params))
            optimizer.load_state_dict(saved)
            for p, w in zip(params, weights, strict=True):
                p.detach().copy_(w)
        return ends[0], ends[1]

    for first, again in sim.run(2, rank).results:
        assert torch.equal(first, again)


@KINDS
def test_at_another_number_of_ranks_momentum_goes_on_and_nothing_is_owed(make: Make) -> None:
    def save(transport: Transport) -> dict[str, Any]:
        params = parameters()
        optimizer = make(params, transport=transport)
        for step in range(5):
            feed(params, transport.rank, step)
            optimizer.step()
        return optimizer.state_dict()

    saved = sim.run(3, save).results

    def load(transport: Transport) -> Tensor:
        params = parameters()
        optimizer = make(params, transport=transport)
        optimizer.load_state_dict(saved[transport.rank])
        optimizer._start()
        assert optimizer.steps == 5
        (now,), (then,) = (
            optimizer.state_dict()["collective"]["buckets"],
            saved[transport.rank]["collective"]["buckets"],
        )
        assert now["residual"] is None
        assert same(now["flat"], then["flat"])
        feed(params, transport.rank, 5)
        optimizer.step()
        return flat(params)

    assert_same_bits(sim.run(2, load).results)


def test_states_of_something_else_are_refused() -> None:
    params = parameters()
    with pytest.raises(CheckpointError, match="OneBitAdam, and this is Signum"):
        Signum(params).load_state_dict(adam(parameters()).state_dict())
    with pytest.raises(CheckpointError, match="another library"):
        Signum(params).load_state_dict(torch.optim.SGD(params).state_dict())
    stepped = Signum([nn.Parameter(torch.zeros(3))])
    stepped.param_groups[0]["params"][0].grad = torch.ones(3)
    stepped.step()
    other = Signum([nn.Parameter(torch.zeros(4))])
    other.load_state_dict(stepped.state_dict())
    for _ in range(2):  # not forgotten: a second try must not begin anew
        with pytest.raises(CheckpointError, match="3 float32 of 1 parameters, the parameters are 4"):
            other.step()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    params = parameters((torch.float32, torch.float64))
    optimizer, other = signum(params), signum(params[:1], lr=0.5)
    for o in (optimizer, other):
        feed(params, 0, 0)
        o.step()
    before = copy.deepcopy(optimizer.state_dict())
    for saved in (other.state_dict(), wrong_at_the_end(optimizer.state_dict())):
        saved["param_groups"] = before["param_groups"]
        saved["collective"]["steps"] = 7
        with pytest.raises(CheckpointError, match="parameters"):
            optimizer.load_state_dict(saved)
        assert same(optimizer.state_dict(), before)


def wrong_at_the_end(saved: dict[str, Any]) -> dict[str, Any]:
    first, last = saved["collective"]["buckets"]
    first["flat"]["momentum"].fill_(7)
    last["shape"] = "parameters of something else"
    return saved


def test_states_are_copies_even_before_they_are_taken_up() -> None:
    stepped, params = signum(parameters()), parameters()
    for step in range(2):
        feed(stepped.param_groups[0]["params"], 0, step)
        stepped.step()
    saved, again = stepped.state_dict(), signum(params)
    wanted = copy.deepcopy(saved)
    again.load_state_dict(saved)
    for handed in (saved, again.state_dict()):
        handed["collective"]["buckets"][0]["flat"]["momentum"].zero_()
    assert same(again.state_dict()["collective"], wanted["collective"])


def test_closure() -> None:
    params = parameters()
    optimizer = SignSGD(params, lr=1.0)

    def closure() -> float:
        assert torch.is_grad_enabled()
        feed(params, 0, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(flat(params), flat(parameters()))


def test_a_copy_goes_on_as_the_original() -> None:
    params = parameters()
    optimizer = adam(params)
    for step in range(5):
        feed(params, 0, step)
        optimizer.step()
    again_params, again = copy.deepcopy((params, optimizer))
    assert (again.steps, again.warmup) == (5, 3)
    for p, o in ((params, optimizer), (again_params, again)):
        feed(p, 0, 5)
        o.step()
    assert torch.equal(flat(params), flat(again_params))
    with pytest.raises(ConfigError, match="a group of its own"):
        copy.deepcopy(Signum(parameters(), process_group=object()))


def test_parameters_come_before_the_first_step() -> None:
    params = parameters()
    optimizer = Signum(params[:2])
    optimizer.add_param_group({"params": params[2:]})
    feed(params, 0, 0)
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(params[:4], parameters()[:4], strict=True))
    with pytest.raises(ConfigError, match="before the first step"):
        optimizer.add_param_group({"params": parameters()})


def test_what_was_frozen_is_not_sent_and_cannot_be_thawed() -> None:
    params = parameters()
    params[3].requires_grad_(False)
    optimizer = Signum(params)
    feed(params, 0, 0)
    params[3].grad = None
    optimizer.step()
    assert optimizer._buckets[0].numel == 18
    assert torch.equal(params[3], parameters()[3])
    params[3].grad = torch.ones(33)
    with pytest.raises(ConfigError, match=r"shape \(33,\).*thawed"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lr": 0.5}, "settings"),
        ({"algorithm": MajorityVote(tie="positive")}, "algorithm"),
        ({"params": [nn.Parameter(torch.zeros(7))]}, "parameters"),
    ],
)
def test_ranks_that_differ_are_told_so_on_all_of_them(change: dict[str, Any], word: str) -> None:
    def rank(transport: Transport) -> None:
        own = change if transport.rank == 1 else {}
        params = own.get("params", parameters())
        optimizer = Signum(**{"params": params, "transport": transport, **own})
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ConfigMismatch, match=f"in {word}; rank {transport.rank} has {word}"):
            optimizer.step()

    sim.run(3, rank)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("weight_decay", 0.25), ("momentum", 0.5)], ids=["lr", "weight decay", "momentum"]
)
def test_ranks_whose_settings_part_later_are_told_so_on_all_of_them(name: str, value: float) -> None:
    """As with a scheduler that looks at a rank's own loss: replicas would part without a word."""

    def rank(transport: Transport) -> None:
        params = parameters()
        optimizer = Signum(params, lr=0.25, transport=transport)
        for step in range(3):
            feed(params, transport.rank, step)
            if step == 2 and transport.rank == 1:
                optimizer.param_groups[0][name] = value
            if step < 2:
                optimizer.step()
        before = flat(params)
        with pytest.raises(ConfigMismatch, match=f"step 2: ranks have different settings.*rank {transport.rank} has"):
            optimizer.step()
        assert torch.equal(flat(params), before)

    sim.run(3, rank)


def test_ranks_with_different_kinds_of_optimizers_are_told_so() -> None:
    def rank(transport: Transport) -> None:
        params = parameters()
        optimizer = (adam if transport.rank == 1 else signum)(params, transport=transport)
        feed(params, 0, 0)
        with pytest.raises(ConfigMismatch, match="in optimizer, "):
            optimizer.step()

    sim.run(3, rank)


def test_ranks_at_different_steps_are_told_so() -> None:
    def rank(transport: Transport) -> None:
        params = parameters()
        optimizer = Signum(params, transport=transport)
        saved = optimizer.state_dict()
        saved["collective"]["steps"] = 4 + transport.rank
        optimizer.load_state_dict(saved)
        feed(params, 0, 0)
        with pytest.raises(CheckpointError, match=r"different steps, \[4, 5\]"):
            optimizer.step()

    sim.run(2, rank)


def test_gradients_and_parameters_that_cannot_be_sent() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(GradientError, match="sparse=False"):
        SignSGD([p]).step()
    with pytest.raises(GradientError, match="complex64"):
        SignSGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]).step()
    with pytest.raises(ConfigError, match="nothing to train"):
        SignSGD([nn.Parameter(torch.zeros(2), requires_grad=False)]).step()


def test_alone_but_for_a_launcher_that_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    feed(params, 0, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotInitializedError):
        SignSGD(params).step()
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = SignSGD(params)
    assert alone.traffic.bytes_sent == 0
    alone.step()
    assert alone.traffic.bytes_sent == 0
    alone.close()


def test_a_scaler_s_overflow_is_everybody_s_and_scales_are_each_rank_s_own() -> None:
    def rank(transport: Transport, scaled: bool) -> tuple[Tensor, int]:
        params = parameters()
        optimizer = adam(params, transport=transport)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + transport.rank), enabled=scaled)
        for step in range(6):
            feed(params, transport.rank, step)
            scale = scaler.scale(torch.ones(()))
            for p in params:
                assert p.grad is not None
                p.grad.mul_(scale)
            if step == 3:
                if not scaled:
                    continue
                if transport.rank == 0:
                    params[0].grad = torch.full((5,), math.inf)
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert not scaled or scaler.get_scale() == (8.0 if transport.rank == 0 else 32.0)
        return flat(params), optimizer.skipped_steps

    found, plain = (sim.run(2, lambda t, s=s: rank(t, s)).results for s in (True, False))
    assert [skipped for _, skipped in found] == [1, 1]
    assert_same_bits([weights for weights, _ in (*found, *plain)])


def test_bytes_are_the_votes_and_a_roll_call() -> None:
    n, size = 4096, 4

    def rank(transport: Transport) -> int:
        p = nn.Parameter(torch.zeros(n))
        optimizer = Signum([p], transport=transport)
        sent: list[int] = []
        for _ in range(2):
            p.grad = torch.full((n,), 1.0 + transport.rank)
            before = optimizer.traffic.bytes_sent
            optimizer.step()
            sent.append(optimizer.traffic.bytes_sent - before)
        return sent[1]

    votes, roll_call = MajorityVote().cost(n, torch.float32, size).bytes_sent, 3 * 8 * (size - 1)
    assert sim.run(size, rank).results == [votes + roll_call] * size
