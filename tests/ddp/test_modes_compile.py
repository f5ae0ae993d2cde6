"""torch.compile around DDP and inside it, with each of its DDP optimisers, and other ways to wrap a model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import sparcomm
from sparcomm import ConfigError, HookState, SparDL
from support.modes import WAYS, assert_replicas, flat, loss_of, net, sgd, simply, wrapped
from support.pool import pool
from support.training import wrap

TIMEOUT = 30.0
# Importing the compiler takes seconds of every process: one of pytest's workers does it.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("torch.compile")]


def as_eager(rank: int, size: int, where: str, optimize: Any, backend: str) -> None:
    """Compiled and hooked against neither."""
    import torch._dynamo

    torch._dynamo.reset()
    plain = wrapped(WAYS["plain"])
    simply(plain, rank, 5)
    start = float(loss_of(plain.module).detach())
    with torch._dynamo.config.patch(optimize_ddp=optimize), warnings.catch_warnings():
        # Dynamo itself looks at .grad of whatever it traces.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        for density in (1.0, 0.01):
            if where == "around":
                model = torch.compile(wrap(net(), bucket_cap_mb=1), backend=backend)
            else:
                model = wrap(torch.compile(net(), backend=backend), bucket_cap_mb=1)
            state = sparcomm.attach(model, SparDL(density=density), timeout=TIMEOUT)
            assert list(state.stats()["per_parameter"]) == []
            simply(model, rank, 5 if density == 1 else 60)
            assert state.step == (5 if density == 1 else 60)
            # A checkpoint must not know about compilation.
            assert set(state.stats()["per_parameter"]) == {name for name, _ in net().named_parameters()}
            state.close()
            assert_replicas(model.parameters())
            if density == 1:
                assert torch.allclose(flat(plain), flat(model), atol=1e-5)
            else:
                assert float(loss_of(model).detach()) < 0.2 * start


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize(("optimize", "backend"), [(True, "aot_eager"), (False, "eager"), ("ddp_optimizer", "eager")])
def test_a_compiled_model_trains_as_an_eager_one(where: str, optimize: Any, backend: str) -> None:
    pool(2).run(as_eager, where, optimize, backend, timeout=110)


def python_reducer(rank: int, size: int) -> None:
    import torch._dynamo

    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        ddp = wrap(net(), bucket_cap_mb=1)
    with pytest.raises(ConfigError, match=r'optimize_ddp = "python_reducer".*use the default, optimize_ddp = True'):
        sparcomm.attach(ddp, SparDL(density=0.1), timeout=TIMEOUT)
    state = HookState(SparDL(density=0.1), timeout=TIMEOUT)
    ddp.register_comm_hook(state, sparcomm.hook)
    with pytest.raises(ConfigError, match=r'optimize_ddp = "python_reducer".*use the default, optimize_ddp = True'):
        loss_of(ddp, rank=rank).backward()
    state.close()


def test_the_python_reducer_is_refused() -> None:
    pool(2).run(python_reducer, timeout=110)


def replicated(rank: int, size: int) -> None:
    from torch.distributed._composable.replicate import replicate

    plain = wrapped(WAYS["plain"])
    simply(plain, rank, 5)
    module = replicate(net(), bucket_cap_mb=0.01)
    state = HookState(SparDL(density=1.0), module, timeout=TIMEOUT)
    module.register_comm_hook(state, sparcomm.hook)
    simply(module, rank, 5)
    assert state.step == 5
    assert set(state.stats()["per_parameter"]) == {name for name, _ in net().named_parameters()}
    assert torch.allclose(flat(plain), flat(module), atol=1e-5)
    assert_replicas(module.parameters())
    state.close()


def test_composable_replicate_takes_the_hook() -> None:
    pool(2).run(replicated, timeout=110)


def moving_average(rank: int, size: int) -> None:
    """An averaged copy of the module inside, and a copy of the wrapper that is only evaluated, disturb nothing."""
    plain, ours = wrapped(WAYS["plain"]), wrapped(WAYS["plain"])
    simply(plain, rank, 6)
    state = sparcomm.attach(ours, SparDL(density=1.0), timeout=TIMEOUT)
    average = torch.optim.swa_utils.AveragedModel(ours.module)
    optimizer = sgd(ours)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(ours, rank=rank, step=step).backward()
        optimizer.step()
        average.update_parameters(ours.module)
        twin = copy.deepcopy(ours)
        with torch.no_grad():
            assert torch.equal(loss_of(twin, rank=rank), loss_of(ours, rank=rank))
        del twin
    assert state.step == 6
    assert torch.allclose(flat(plain), flat(ours), atol=1e-5)
    assert_replicas(average.module.parameters())
    state.close()


def test_averaged_and_deep_copies_beside_the_hooked_module() -> None:
    pool(2).run(moving_average)
