"""Sparse all-reduce for data-parallel PyTorch: the public names, nothing else.

Names load on first use, so that ``import sparcomm`` costs nothing: neither torch nor a kernel library is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparcomm.errors import (
    CheckpointError,
    CommunicationError,
    ConfigError,
    ConfigMismatch,
    DamagedBag,
    DisagreementError,
    GradientError,
    HookError,
    NotInitializedError,
    PeerError,
    RemoteError,
    SparcommError,
)

if TYPE_CHECKING:
    from sparcomm import launch, optim
    from sparcomm.algorithms.base import Algorithm
    from sparcomm.algorithms.dense import Dense
    from sparcomm.algorithms.hierarchical import Hierarchical
    from sparcomm.algorithms.majority_vote import MajorityVote
    from sparcomm.algorithms.onebit import OneBitAllReduce
    from sparcomm.algorithms.s2 import S2Reducer
    from sparcomm.algorithms.spardl import SparDL
    from sparcomm.algorithms.topk import TopKAllGather
    from sparcomm.config import algorithm_from_config
    from sparcomm.ddp import HookState, attach, hook, keep_local
    from sparcomm.ddp.monitor import Check
    from sparcomm.ddp.schedule import DensityWarmup, Refresh, Schedule
    from sparcomm.ddp.tensorboard import Recorder
    from sparcomm.feedback import AdamCorrection, ErrorFeedback, MomentumCorrection
    from sparcomm.selectors.gaussiank import GaussianK
    from sparcomm.selectors.topk import TopK

__version__ = "0.1.0"

__all__ = [
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

_HOME = {
    "Algorithm": "sparcomm.algorithms.base",
    "Dense": "sparcomm.algorithms.dense",
    "Hierarchical": "sparcomm.algorithms.hierarchical",
    "MajorityVote": "sparcomm.algorithms.majority_vote",
    "OneBitAllReduce": "sparcomm.algorithms.onebit",
    "S2Reducer": "sparcomm.algorithms.s2",
    "SparDL": "sparcomm.algorithms.spardl",
    "TopKAllGather": "sparcomm.algorithms.topk",
    "algorithm_from_config": "sparcomm.config",
    "AdamCorrection": "sparcomm.feedback",
    "Check": "sparcomm.ddp.monitor",
    "DensityWarmup": "sparcomm.ddp.schedule",
    "ErrorFeedback": "sparcomm.feedback",
    "GaussianK": "sparcomm.selectors.gaussiank",
    "HookState": "sparcomm.ddp",
    "MomentumCorrection": "sparcomm.feedback",
    "Recorder": "sparcomm.ddp.tensorboard",
    "Refresh": "sparcomm.ddp.schedule",
    "Schedule": "sparcomm.ddp.schedule",
    "TopK": "sparcomm.selectors.topk",
    "attach": "sparcomm.ddp",
    "hook": "sparcomm.ddp",
    "keep_local": "sparcomm.ddp",
}


def __getattr__(name: str) -> Any:
    if name in ("launch", "optim"):
        return import_module(f"sparcomm.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sparcomm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
