"""What DDP and its users can do to the hook at the edges: odd parameters, two modules, steps that are cut short."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

import sparcomm
from sparcomm import Dense, HookState, SparDL
from sparcomm.algorithms import Algorithm
from sparcomm.ddp.delivery import Delivery
from support.modes import debts, over_ranks
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, net_step, small_net, wrap

TIMEOUT = 30.0


def shared_by_two(rank: int, size: int) -> str:
    """One state registered with two modules: it must not lose what it owes to the first in silence."""
    state = HookState(Halves(), timeout=TIMEOUT)
    nets = [wrap(Fed()), wrap(Fed())]
    for net in nets:
        net.register_comm_hook(state, sparcomm.hook)
    gradient_step(nets[0], integers(SIZES, rank, 0))
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*one HookState serves one DDP module") as caught:
        gradient_step(nets[1], integers(SIZES, rank, 0))
    state.close()
    return str(caught.value)


def test_a_state_for_two_modules_is_an_error() -> None:
    for text in pool(2).run(shared_by_two):
        assert f"{len(SIZES)} parameters that were reduced before are in no bucket of step 1" in text


def nothing_kept(rank: int, size: int) -> None:
    """A finished step keeps no bucket alive: DDP replaces the first one, which is as large as the model."""
    gc.collect()
    earlier = [d for d in gc.get_objects() if type(d) is Delivery]  # kept by what other tests have left
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    for step in range(2):
        gradient_step(ddp, integers(SIZES, rank, step))
        state.stats()  # waits for the worker
        assert len([d for d in gc.get_objects() if type(d) is Delivery]) == len(earlier)
    state.close()


def test_no_bucket_outlives_its_step() -> None:
    pool(1).run(nothing_kept)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64, torch.float32]


def static_at_first(rank: int, size: int, bound: str) -> None:
    """A static graph's first iteration, in which DDP calls every bucket number 0: one step, which counts whole."""
    ddp = wrap(Fed(SIZES, DTYPES), static_graph=bound != "declared late")
    state = HookState(Halves(), ddp.module if bound == "inner" else ddp, timeout=TIMEOUT)
    ddp.register_comm_hook(state, sparcomm.hook)
    state.start()
    if bound == "declared late":
        ddp._set_static_graph()
    fed, means = ([torch.zeros(n) for n in SIZES] for _ in range(2))
    for step in range(4):
        gradients = integers(SIZES, rank, step)
        for i, mean in enumerate(gradient_step(ddp, gradients)):
            fed[i] += gradients[i]
            means[i] += mean.float()
        assert state.stats()["steps"] == state.step == step + 1
    everything, owed = over_ranks(fed), over_ranks(debts(state, SIZES))
    for i in range(len(SIZES)):
        assert torch.equal(everything[i], size * means[i].double() + owed[i]), i
    state.close()


@pytest.mark.parametrize("bound", ["ddp", "inner", "declared late"])
def test_the_first_step_of_a_static_graph_with_several_buckets_is_one_step(bound: str) -> None:
    pool(2).run(static_at_first, bound)


def static_unbound(rank: int, size: int) -> None:
    ddp = wrap(Fed(SIZES, DTYPES), static_graph=True)
    state = HookState(Halves(), timeout=TIMEOUT)
    ddp.register_comm_hook(state, sparcomm.hook)
    with pytest.raises(RuntimeError, match=r"HookError.*static graph.*state\.bind\(ddp\)"):
        gradient_step(ddp, integers(SIZES, rank, 0))
    state.close()


def test_which_bucket_is_the_last_of_a_static_graph_must_be_known() -> None:
    pool(2).run(static_unbound)


EDGES = [(1,), (0,), (0, 3), (5, 0, 0, 700)]


def edges(rank: int, size: int, algorithm: Algorithm) -> None:
    """Tiny and empty parameters, in 32 and 16 bits, and one parameter under two names."""
    for sizes in EDGES:
        for dtype in (torch.float32, torch.bfloat16):
            ddp = wrap(Fed(sizes, [dtype] * len(sizes)))
            state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
            for step in range(3):
                means = gradient_step(ddp, integers(sizes, rank, step))
                assert [m.numel() for m in means] == list(sizes)
            assert state.stats()["steps"] == 3
            state.state_dict()
            state.close()
    net = small_net()
    net[4].weight = net[2].weight
    ddp = wrap(net)
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(3):
        net_step(ddp, optimizer, rank, step)
    assert set(state.stats()["per_parameter"]) == {name for name, _ in net.named_parameters()}
    state.close()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("algorithm", [SparDL(density=0.1), Dense()], ids=repr)
def test_tiny_empty_and_tied_parameters(size: int, algorithm: Algorithm) -> None:
    pool(size).run(edges, algorithm)


def cut_short(rank: int, size: int) -> None:
    """A backward pass that raises on every rank, before any bucket: the next step is a step like any other."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    gradient_step(ddp, integers(SIZES, rank, 0))
    out = ddp(integers(SIZES, rank, 1))
    handle = out.register_hook(_explode)
    with pytest.raises(RuntimeError, match="user's own"):
        out.backward()
    handle.remove()
    state.raise_if_failed()
    assert state.step == 1
    state.close()
    # Where it is the first one that raises, the watch for a hook that is never called goes on, and ends with the next.
    ddp = wrap(Fed(), find_unused_parameters=True)
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    with ddp.no_sync():
        ddp(integers(SIZES, rank, 0)).backward()
    state._watch._synchronised = lambda: True
    handle = ddp.module.p[0].register_post_accumulate_grad_hook(_explode)
    with ddp.no_sync(), pytest.raises(RuntimeError, match="user's own"):
        ddp(integers(SIZES, rank, 0)).backward()
    handle.remove()
    gradient_step(ddp, integers(SIZES, rank, 0))
    assert not state._watch._handles
    state.close()


def _explode(_: Tensor) -> None:
    raise RuntimeError("user's own")


def test_a_backward_pass_that_raises_is_no_failure_of_the_hook() -> None:
    pool(2).run(cut_short)
