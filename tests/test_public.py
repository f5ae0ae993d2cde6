"""The public surface: a name that appears or goes is a decision, and shows up here."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import sparcomm
from sparcomm import errors

PUBLIC = [
    "AdamCorrection",
    "Algorithm",
    "Check",
    "CheckpointError",
    "CommunicationError",
    "ConfigError",
    "ConfigMismatch",
    "DamagedBag",
    "Dense",
    "DensityWarmup",
    "DisagreementError",
    "ErrorFeedback",
    "GaussianK",
    "GradientError",
    "Hierarchical",
    "HookError",
    "HookState",
    "MajorityVote",
    "MomentumCorrection",
    "NotInitializedError",
    "OneBitAllReduce",
    "PeerError",
    "Recorder",
    "Refresh",
    "RemoteError",
    "S2Reducer",
    "Schedule",
    "SparDL",
    "SparcommError",
    "TopK",
    "TopKAllGather",
    "__version__",
    "algorithm_from_config",
    "attach",
    "hook",
    "keep_local",
    "launch",
    "optim",
]


def test_all_is_exactly_this() -> None:
    assert sorted(PUBLIC) == sorted(sparcomm.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_loads_and_is_documented(name: str) -> None:
    value = getattr(sparcomm, name)
    assert name in dir(sparcomm)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_every_error_is_public() -> None:
    tree = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.SparcommError)}
    assert tree <= set(sparcomm.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="spardll"):
        _ = sparcomm.spardll


def test_hook_is_a_function_and_not_the_module_that_holds_it() -> None:
    assert inspect.isfunction(sparcomm.hook)
    assert inspect.isfunction(sparcomm.attach)


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, sparcomm; print(*({'torch', 'numpy', 'numba', 'cupy', 'mpi4py', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
