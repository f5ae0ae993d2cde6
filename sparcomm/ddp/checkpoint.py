"""Hook state as plain dictionaries that speak in parameter names, and load at another world size.

A rank's dictionary holds what that rank owes. Since only the sum over ranks matters for the mass, p old ranks become q
new ones by adding: new rank i takes the sum of old ranks i, i+q, i+2q, ...
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp.units import Carried
from sparcomm.dtypes import working_dtype
from sparcomm.errors import CheckpointError

VERSION = 1
_KEYS = {
    "version", "algorithm", "step", "rank", "world_size", "parameters", "units", "residuals", "per_element", "shared",
}  # fmt: skip
_log = logging.getLogger("sparcomm")

StateDict = dict[str, Any]


def pack(
    algorithm: Algorithm, carried: Carried, names: Mapping[int, str], params: Mapping[str, Tensor],
    units: list[list[str]] | None, step: int, rank: int, size: int,
) -> StateDict:  # fmt: skip
    """One rank's state_dict; tensors are copies. ``units``: names by unit, or None while they are not final."""

    def by_name(tensors: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {names[key]: t.detach().clone() for key, t in tensors.items()}

    return {
        "version": VERSION,
        "algorithm": {"name": algorithm.name, "fields": {k: _plain(v) for k, v in algorithm.fields().items()}},
        "step": step,
        "rank": rank,
        "world_size": size,
        "parameters": {name: list(p.shape) for name, p in params.items()},
        "units": units,
        "residuals": by_name(carried.residual),
        "per_element": {name: by_name(tensors) for name, tensors in carried.per_element.items()},
        "shared": {
            names[key]: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in fields.items()}
            for key, fields in carried.shared.items()
        },
    }


def choose(saved: StateDict | Sequence[StateDict], rank: int, size: int) -> tuple[StateDict, list[StateDict]]:
    """(the dictionary for what all ranks share, those whose sum is this rank's).

    Raises:
        CheckpointError: no state_dict of this version; one rank's own where this is another rank or world size; a list
            that lacks a rank of its world, or whose ranks stand at different steps.
    """
    if isinstance(saved, Mapping):
        check_complete(saved)
        own = (saved["rank"], saved["world_size"])
        if own != (rank, size):
            raise CheckpointError(
                f"this state_dict is rank {own[0]}'s of {own[1]}, but this is rank {rank} of {size}: "
                "pass the list of all ranks' dictionaries to load them at another world size"
            )
        return saved, [saved]
    for sd in saved:
        check_complete(sd)
    ranks = [sd["rank"] for sd in saved]
    world = saved[0]["world_size"] if saved else 0
    if not saved or sorted(ranks) != list(range(world)) or any(sd["world_size"] != world for sd in saved):
        raise CheckpointError(
            f"the list holds ranks {ranks} of world sizes {sorted({sd['world_size'] for sd in saved})}: "
            "it must hold every rank of one run exactly once"
        )
    by_rank = sorted(saved, key=lambda sd: sd["rank"])
    steps = [sd["step"] for sd in by_rank]
    if len(set(steps)) > 1:
        raise CheckpointError(f"the list mixes steps: {', '.join(f'rank {r} at {s}' for r, s in enumerate(steps))}")
    return by_rank[0], by_rank[rank::size]


def origin(sd: StateDict) -> str:
    """The units of a state_dict as a short text that ranks can compare."""
    if sd["units"] is None:
        return "none yet"
    return f"{len(sd['units'])} units {zlib.crc32(repr(sd['units']).encode()):08x}"


def check_fits(sd: StateDict, algorithm: Algorithm, params: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless ``sd`` is of this algorithm and of exactly these parameters, naming what is not.

    Other settings of the same algorithm (a density raised on the way) are taken, with a line in the log.
    """
    saved = sd["algorithm"]
    if saved["name"] != algorithm.name:
        raise CheckpointError(f"the state_dict is of algorithm {saved['name']!r}, not {algorithm.name!r}")
    now = {k: _plain(v) for k, v in algorithm.fields().items()}
    if saved["fields"] != now:
        _log.warning("hook state was saved with %s(%s), and goes on with %s", saved["name"], saved["fields"], now)
    shapes = {name: list(p.shape) for name, p in params.items()}
    old: dict[str, list[int]] = sd["parameters"]
    both = [n for n in shapes if n in old]
    problems = {
        "unknown here": [n for n in old if n not in shapes],
        "missing in it": [n for n in shapes if n not in old],
        "of another shape": [f"{n} {old[n]} instead of {shapes[n]}" for n in both if old[n] != shapes[n]],
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {_some(found)}" for what, found in problems.items() if found)
        raise CheckpointError(f"the state_dict does not fit the module: parameters {text}")


def unpack(first: StateDict, mine: Sequence[StateDict], params: Mapping[str, Tensor]) -> Carried:
    """The committed state by parameter, summed over ``mine``, on the parameters' devices. ``mine`` may be empty."""
    carried = Carried()
    for sd in mine:
        _add(carried.residual, sd["residuals"], params)
        for name, tensors in sd["per_element"].items():
            _add(carried.per_element.setdefault(name, {}), tensors, params)
    carried.shared = {id(params[name]): dict(fields) for name, fields in first["shared"].items()}
    return carried


def _add(into: dict[int, Tensor], tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, saved in tensors.items():
        p = params[name]
        if saved.numel() != p.numel():
            raise CheckpointError(f"{name}: saved state has {saved.numel()} elements, the parameter {p.numel()}")
        # A module that was cast since (float32 to bfloat16) keeps its working dtype, or changes to the new one.
        t = saved.to(p.device, working_dtype(p.dtype), copy=True) if saved.is_floating_point() else saved.to(p.device)
        into[id(p)] = into[id(p)] + t if id(p) in into else t


def check_complete(sd: Any) -> None:
    """Raises CheckpointError unless ``sd`` is a state_dict of this version."""
    if not isinstance(sd, Mapping):
        raise CheckpointError(f"expected a state_dict of HookState, got a {type(sd).__name__}")
    if sd.get("version") != VERSION:
        raise CheckpointError(f"state_dict version {sd.get('version')!r}, this release reads version {VERSION}")
    missing = sorted(_KEYS - set(sd))
    if missing:
        raise CheckpointError(f"the state_dict lacks {', '.join(missing)}")


def _plain(value: Any) -> Any:
    """A field's value as ``torch.load(weights_only=True)`` takes it and == compares it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
