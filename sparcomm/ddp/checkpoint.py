"""Hook state as plain dictionaries that speak in parameter names, and load at another world size.

A rank's dictionary has one key, its label: ``{"rank 3 of 4": {"about": (facts,), "owed": (tensors,)}}``. Checkpoint
libraries that merge the dictionaries of all ranks, as ``torch.distributed.checkpoint`` does, keep one rank's value
where keys are equal, without a word; and they fill in only the keys that are there before loading, with tensors only
of the sizes that are there. Hence the label, and hence the tuples: they count as one value, whatever is inside, so a
fresh hook that owes nothing yet has the same keys as one that has trained for a month.

Since only the sum over ranks matters for the mass, p old ranks become q new ones by adding: new rank i takes the sum
of old ranks i, i+q, i+2q, ...
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp.units import Carried
from sparcomm.dtypes import working_dtype
from sparcomm.errors import CheckpointError
from sparcomm.feedback import AdamCorrection, Correction

VERSION = 2
ABOUT = (
    "version", "algorithm", "step", "rank", "world_size", "parameters", "units", "shared", "decisions",
    "learning_rates",
)  # fmt: skip
OWED = ("residuals", "velocity", "per_element")
LABEL = re.compile(r"rank (\d+) of (\d+)( from global rank \d+)?")
_log = logging.getLogger("sparcomm")

StateDict = dict[str, Any]
Entry = dict[str, Any]  # one rank's facts and tensors, by the names in ABOUT and OWED


def label(rank: int, size: int, first: int = 0) -> str:
    """The key of one rank's state. ``first``: the lowest global rank of its group, so that groups differ, too."""
    return f"rank {rank} of {size}" + (f" from global rank {first}" if first else "")


def pack(
    algorithm: Algorithm, carried: Carried, names: Mapping[int, str], params: Mapping[str, Tensor],
    units: list[list[str]] | None, step: int, rank: int, size: int,
    *, decisions: Mapping[str, Any] | None = None, first: int = 0,
) -> StateDict:  # fmt: skip
    """One rank's state_dict; tensors are copies in host memory.

    Args:
        units: names by unit, or None while they are not final.
        decisions: plain values by name that all ranks have agreed on.
        first: see ``label``.
    """

    def by_name(tensors: Mapping[int, Tensor]) -> dict[str, Tensor]:
        if torch.cuda.is_available() and any(t.is_pinned() for t in tensors.values()):
            torch.cuda.synchronize()  # the copies to page-locked memory may still be under way
        return {names[key]: t.detach().to("cpu", copy=True) for key, t in tensors.items()}

    about = {
        "version": VERSION,
        "algorithm": {"name": algorithm.name, "fields": {k: _plain(v) for k, v in algorithm.fields().items()}},
        "step": step,
        "rank": rank,
        "world_size": size,
        "parameters": {name: list(p.shape) for name, p in params.items()},
        "units": units,
        "shared": {
            names[key]: {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in fields.items()}
            for key, fields in carried.shared.items()
        },
        "decisions": dict(decisions or {}),
        "learning_rates": {names[key]: float(rate) for key, rate in carried.rates.items()},
    }
    owed = {
        "residuals": by_name(carried.residual),
        "velocity": by_name(carried.velocity),
        "per_element": {name: by_name(tensors) for name, tensors in carried.per_element.items()},
    }
    return {label(rank, size, first): {"about": (about,), "owed": (owed,)}}


# ---- reading ---------------------------------------------------------------------------------------------------------


def entries(saved: StateDict | Sequence[StateDict]) -> list[Entry]:
    """Every rank's facts and tensors in one or several state_dicts, which may hold several ranks each.

    Facts without tensors (``read_distributed`` leaves out what this rank does not need) lack the names in OWED.

    Raises:
        CheckpointError: something else, or of another version.
    """
    several = isinstance(saved, (list, tuple))
    return [entry for sd in (saved if several else [saved]) for entry in _entries(sd)]


def _entries(sd: Any) -> Iterator[Entry]:
    if not isinstance(sd, Mapping):
        raise CheckpointError(f"expected a state_dict of HookState, got a {type(sd).__name__}")
    if "version" in sd:  # before version 2 there were no labels
        raise CheckpointError(f"state_dict version {sd['version']!r}, this release reads version {VERSION}")
    if not sd:
        raise CheckpointError("the state_dict is empty: it holds no rank's state")
    for key, value in sd.items():
        if not (LABEL.fullmatch(str(key)) and isinstance(value, Mapping) and "about" in value):
            raise CheckpointError(f"{key!r} is no key of a HookState's state_dict, such as {label(0, 4)!r}")
        about = _inside(key, value, "about")
        if about.get("version") != VERSION:
            raise CheckpointError(f"state_dict version {about.get('version')!r}, this release reads version {VERSION}")
        entry = {**about, **(_inside(key, value, "owed") if "owed" in value else {})}
        missing = sorted({*ABOUT, *(OWED if "owed" in value else ())} - entry.keys())
        if missing:
            raise CheckpointError(f"the state_dict of {key} lacks {', '.join(missing)}")
        yield entry


def _inside(key: Any, value: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The one mapping in a tuple of one."""
    found = value[part]
    if not (isinstance(found, (tuple, list)) and len(found) == 1 and isinstance(found[0], Mapping)):
        raise CheckpointError(f"the state_dict of {key}: {part!r} must be a tuple of one dictionary")
    return found[0]


def choose(saved: StateDict | Sequence[StateDict], rank: int, size: int) -> tuple[Entry, list[Entry]]:
    """(the entry for what all ranks share, those whose sum is this rank's).

    Raises:
        CheckpointError: no state_dict of this version; one rank's own where this is another rank or world size; ranks
            that are missing, come twice, are of different worlds, or stand at different steps.
    """
    found = entries(saved)
    if len(found) == 1 and (found[0]["rank"], found[0]["world_size"]) == (rank, size):
        return found[0], found
    ordered = _whole_world(found, rank, size)
    mine = ordered[rank::size]
    for entry in mine:
        if "residuals" not in entry:
            raise CheckpointError(
                f"what rank {entry['rank']} of {entry['world_size']} owes was left out, as it was read for another "
                f"rank than {rank} of {size}: read the checkpoint on the rank that loads it"
            )
    return ordered[0], mine


def _whole_world(found: list[Entry], rank: int, size: int) -> list[Entry]:
    """The entries by rank. Raises CheckpointError unless they are all ranks of one run at one step."""
    if len(found) == 1 and found[0]["world_size"] > 1:
        raise CheckpointError(
            f"this state_dict is rank {found[0]['rank']}'s of {found[0]['world_size']}, but this is rank {rank} of "
            f"{size}: pass the list of all ranks' dictionaries to load them at another world size"
        )
    must = "it must hold every rank of one run exactly once"
    if not found:
        raise CheckpointError(f"the list of state_dicts is empty: {must}")
    worlds = sorted({entry["world_size"] for entry in found})
    if len(worlds) > 1:
        raise CheckpointError(f"the list mixes world sizes {worlds}: {must}")
    ranks = sorted(entry["rank"] for entry in found)
    twice = sorted({r for r in ranks if ranks.count(r) > 1})
    missing = [r for r in range(worlds[0]) if r not in ranks]
    if twice or missing:
        problems = [f"{what} rank {', '.join(map(str, which))} of {worlds[0]}" + more for what, which, more in (
            ("holds", twice, " more than once"), ("lacks", missing, "")) if which]  # fmt: skip
        raise CheckpointError(f"the list {' and '.join(problems)}: {must}")
    ordered = sorted(found, key=lambda entry: entry["rank"])
    steps = [entry["step"] for entry in ordered]
    if len(set(steps)) > 1:
        raise CheckpointError(f"the list mixes steps: {', '.join(f'rank {r} at {s}' for r, s in enumerate(steps))}")
    if len({origin(entry) for entry in ordered}) > 1:
        units = ", ".join(f"rank {r}: {origin(entry)}" for r, entry in enumerate(ordered))
        raise CheckpointError(f"the list mixes runs whose parameters were grouped differently: {units}")
    return ordered


def origin(entry: Entry) -> str:
    """The units of a checkpoint as a short text that ranks can compare."""
    if entry["units"] is None:
        return "none yet"
    return f"{len(entry['units'])} units {zlib.crc32(repr(entry['units']).encode()):08x}"


def check_fits(saved: StateDict | Sequence[StateDict], algorithm: Algorithm, params: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless all of ``saved`` is of this algorithm and of exactly these parameters.

    Other settings of the same algorithm (a density raised on the way) are taken, with a line in the log.
    """
    changed: set[str] = set()
    now = {k: _plain(v) for k, v in algorithm.fields().items()}
    for entry in entries(saved):
        was = entry["algorithm"]
        if was["name"] != algorithm.name:
            raise CheckpointError(f"the state_dict is of algorithm {was['name']!r}, not {algorithm.name!r}")
        if was["fields"] != now:
            changed.add(f"{was['name']}({was['fields']})")
        _check_parameters(entry["parameters"], params)
    for text in sorted(changed):
        _log.warning("hook state was saved with %s, and goes on with %s", text, now)


def _check_parameters(old: Mapping[str, list[int]], params: Mapping[str, Tensor]) -> None:
    shapes = {name: list(p.shape) for name, p in params.items()}
    both = [n for n in shapes if n in old]
    problems = {
        "unknown here": [n for n in old if n not in shapes],
        "missing in it": [n for n in shapes if n not in old],
        "of another shape": [f"{n} {old[n]} instead of {shapes[n]}" for n in both if old[n] != shapes[n]],
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {_some(found)}" for what, found in problems.items() if found)
        raise CheckpointError(f"the state_dict does not fit the module: parameters {text}")


def unpack(
    first: Entry, mine: Sequence[Entry], params: Mapping[str, Tensor], correction: Correction | None, size: int
) -> Carried:
    """The committed state by parameter for one of ``size`` ranks, summed over ``mine`` (if any), in host memory."""
    carried = Carried()
    for entry in mine:
        _add(carried.residual, entry["residuals"], params)
        _add(carried.velocity, entry["velocity"], params)
        for name, tensors in entry["per_element"].items():
            _add(carried.per_element.setdefault(name, {}), tensors, params)
    _fit_velocity(carried, first, len(mine), correction)
    # Small fields may be a rank's own, so as many ranks go on with just what they had.
    own = mine[0] if mine and mine[0]["world_size"] == size else first
    carried.shared = {id(params[name]): dict(fields) for name, fields in own["shared"].items()}
    carried.rates = {id(params[name]): rate for name, rate in first["learning_rates"].items()}
    return carried


def velocity_of(correction: Correction | None) -> dict[str, str]:
    """What the saved velocities are, as an entry of the decisions."""
    return {} if correction is None else {"velocity_of": type(correction).__name__}


def _fit_velocity(carried: Carried, first: Entry, ranks: int, correction: Correction | None) -> None:
    """Makes what ``correction`` takes of the velocities that have been added up over ``ranks`` old ranks.

    Momenta add up, since only their sum counts; second moments are averaged. Those of another memory are dropped.
    """
    was = first["decisions"].get("velocity_of", "MomentumCorrection")
    if carried.velocity and was != velocity_of(correction).get("velocity_of"):
        _log.warning("hook state was saved with memory=%s(...), whose velocities mean nothing to this one's", was)
        carried.velocity.clear()
    if isinstance(correction, AdamCorrection):
        for second in carried.velocity.values():
            second.div_(ranks)


def _add(into: dict[int, Tensor], tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, saved in tensors.items():
        p = params[name]
        if saved.numel() != p.numel():
            raise CheckpointError(f"{name}: saved state has {saved.numel()} elements, the parameter {p.numel()}")
        # Narrow storage widens exactly; a module that was cast since (to float64, say) changes to its working dtype.
        t = saved.to("cpu", working_dtype(p.dtype) if saved.is_floating_point() else saved.dtype, copy=True)
        into[id(p)] = into[id(p)].add_(t) if id(p) in into else t


def _plain(value: Any) -> Any:
    """A field's value as ``torch.load(weights_only=True)`` takes it and == compares it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
