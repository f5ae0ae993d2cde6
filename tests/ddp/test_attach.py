"""Finding the DDP module, and what stands in the way."""

from __future__ import annotations

import copy
import datetime as dt
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import sparcomm
from sparcomm import ConfigError, Dense, HookState, NotInitializedError, SparDL
from sparcomm.ddp.attach import find_ddp
from support.pool import pool, spawn
from support.training import SIZES, Fed, gradient_step, integers, wrap


class Compiled(nn.Module):
    """What torch.compile returns, without the seconds it takes to import the compiler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Unattached(nn.Module):
    """As a LightningModule that has no trainer yet."""

    @property
    def trainer(self) -> Any:
        raise RuntimeError("not attached to a Trainer")


def wrapped(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    compiled = Compiled(ddp)
    holders = [
        ddp,
        nn.Sequential(ddp),
        compiled,
        SimpleNamespace(model=ddp),
        SimpleNamespace(model=nn.Linear(1, 1), model_wrapped=ddp),
        SimpleNamespace(strategy=SimpleNamespace(model=ddp)),
        SimpleNamespace(trainer=SimpleNamespace(strategy=SimpleNamespace(model=compiled))),
    ]
    assert all(find_ddp(h) is ddp for h in holders)
    for nothing in (Fed(), Unattached(), SimpleNamespace(model=3), None, "ddp"):
        with pytest.raises(ConfigError, match=r"holds none; wrap the model first: DistributedDataParallel\(model\)"):
            sparcomm.attach(nothing, Dense())
    with pytest.raises(ConfigError, match="holds 2 of them: attach to each by itself"):
        sparcomm.attach(nn.ModuleList([ddp, wrap(Fed())]), Dense())
    state = sparcomm.attach(SimpleNamespace(strategy=SimpleNamespace(model=compiled)), Dense(), timeout=30)
    gradient_step(ddp, integers(SIZES, rank, 0))
    assert state.step == 1
    state.close()


def test_the_module_is_found_inside_wrappers() -> None:
    pool(1).run(wrapped)


def taken(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=30)
    with pytest.raises(ConfigError, match=r"communication hook already \(hook\), and can have only one"):
        sparcomm.attach(ddp, SparDL(density=0.1), timeout=30)
    for step in range(2):  # the first hook is none the worse
        gradient_step(ddp, integers(SIZES, rank, step))
    assert state.step == 2
    state.close()
    mixed = DistributedDataParallel(
        nn.Linear(2, 2), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    )
    with pytest.raises(ConfigError, match="without mixed_precision="):
        sparcomm.attach(mixed, Dense(), timeout=30)


def test_a_slot_that_is_taken_is_an_error() -> None:
    pool(2).run(taken)


@pytest.mark.parametrize("algorithm", [SparDL, "spardl", None, 0.01])
def test_an_algorithm_is_an_instance(algorithm: object) -> None:
    with pytest.raises(ConfigError, match=r"must be an instance, such as sparcomm\.SparDL\(density=0\.01\)"):
        HookState(algorithm)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "timeout", [0, -1.0, 1e-9, float("nan"), float("inf"), 1e300, True, "30", None, dt.timedelta(0)], ids=repr
)
def test_a_timeout_is_a_time(timeout: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout=.*: must be a timedelta or seconds, from 0\.001 to 31536000"):
        HookState(Dense(), timeout=timeout)


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    with pytest.raises(NotInitializedError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        HookState(Dense(), nn.Linear(2, 2)).start()
    with pytest.raises(NotInitializedError, match="has not started"):
        HookState(Dense(), nn.Linear(2, 2)).state_dict()


def hash_store(rank: int, size: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=30)  # alone, it may be one
    gradient_step(ddp, integers(SIZES, rank, 0))
    state.close()
    dist.destroy_process_group()
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  (registers the "fake" backend)

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    with pytest.raises(ConfigError, match="HashStore, which other processes cannot see"):
        HookState(Dense(), nn.Linear(2, 2)).start()


@pytest.mark.slow
def test_a_hash_store_is_refused_where_there_are_peers() -> None:
    spawn(1, hash_store)


def test_names_are_those_of_the_module_inside_ddp_and_compile() -> None:
    net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    net[0].bias.requires_grad_(False)
    state = HookState(Dense(), net)
    assert list(state._module.params) == ["0.weight", "1.weight", "1.bias"]


def test_a_copied_or_pickled_state_is_a_new_one() -> None:
    state = HookState(SparDL(density=0.5), nn.Linear(2, 2), timeout=7)
    twin = copy.deepcopy(state)
    assert twin.is_copy
    assert (twin.algorithm, twin.timeout, twin.step) == (state.algorithm, 7, 0)
    with pytest.warns(UserWarning, match=r"save state\.state_dict\(\)"):
        data = pickle.dumps(state)
    again = pickle.loads(data)
    assert (again.algorithm, again.timeout) == (state.algorithm, 7)
