"""What a hook has cost and what it owes, per unit, per parameter and in sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import field_kinds, get_field
from sparcomm.ddp.units import Unit
from sparcomm.transport.base import Traffic

if TYPE_CHECKING:
    from sparcomm.ddp.engine import Engine


def hook_stats(engine: Engine | None, name_of: Callable[[Tensor], str]) -> dict[str, Any]:
    """See ``HookState.stats``."""
    if engine is not None:
        engine.drain()
    units = engine.partition.units if engine else []
    per_unit = [unit_stats(unit, engine.size, name_of) for unit in units] if engine else []
    traffic = engine.transport.traffic if engine else Traffic()
    return {
        "rank": engine.rank if engine else 0,
        "size": engine.size if engine else 1,
        "steps": engine.completed if engine else 0,
        "skipped": engine.skipped if engine else 0,
        "bytes_sent": traffic.bytes_sent,
        "bytes_received": traffic.bytes_received,
        "rounds": traffic.rounds,
        "messages": traffic.messages,
        "kept": sum(u["kept"] for u in per_unit),
        "seconds": engine.seconds() if engine else {},
        "residual_norm": total_norm([u["residual_norm"] for u in per_unit]),
        "memory_bytes": sum(u["memory_bytes"] for u in per_unit),
        "check": engine.monitor.report() if engine and engine.monitor else {},
        "auto_off": engine.planner.decisions.get("auto_off") if engine else None,
        "per_unit": per_unit,
        "per_parameter": dict(entry for unit in units for entry in parameter_stats(unit, name_of)),
    }


def unit_stats(unit: Unit, size: int, name_of: Callable[[Tensor], str]) -> dict[str, Any]:
    """The entry of one unit in ``HookState.stats()["per_unit"]``."""
    traffic = unit.traffic
    return {
        "names": [name_of(p) for p in unit.params],
        "numel": unit.numel,
        "algorithm": unit.algorithm.name,
        "kept": unit.algorithm.kept(unit.numel, size),
        "bytes_sent": traffic.bytes_sent,
        "bytes_received": traffic.bytes_received,
        "rounds": traffic.rounds,
        "messages": traffic.messages,
        "seconds": dict(unit.state.clock.seconds),
        "residual_norm": _norm(unit.residual),
        "memory_bytes": sum(_memory(t) for t in _held(unit)),
    }


def parameter_stats(unit: Unit, name_of: Callable[[Tensor], str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of one unit's parameters in ``HookState.stats()["per_parameter"]``."""
    for p, span in unit.spans():
        yield (
            name_of(p),
            {
                "numel": p.numel(),
                "residual_norm": _norm(None if unit.residual is None else unit.residual[span]),
                "memory_bytes": sum(_memory(t[span]) for t in _held(unit)),
            },
        )


def total_norm(norms: list[float]) -> float:
    """The norm of a vector from the norms of its parts."""
    return math.sqrt(sum(x * x for x in norms))


def _held(unit: Unit) -> Iterator[Tensor]:
    """The tensors of length n that the hook keeps for a unit."""
    for t in (unit.residual, unit.velocity):
        if t is not None:
            yield t
    for name, kind in field_kinds(unit.state):
        if kind == "per_element":
            yield get_field(unit.state, name)


def _memory(t: Tensor) -> int:
    """Bytes, counted twice: the committed buffer and the one that the next step writes."""
    return 2 * t.numel() * t.element_size()


def _norm(t: Tensor | None) -> float:
    # In float64, since squares of small float32 residuals underflow.
    return 0.0 if t is None else float(torch.linalg.vector_norm(t, dtype=torch.float64))
