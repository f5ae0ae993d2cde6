"""What a hook does, as curves: for TensorBoard, or for anything else with ``add_scalar(tag, value, step)``.

    record = Recorder(state, SummaryWriter("runs/1"))       # on rank 0; on the others it does nothing
    for batch in loader:
        ...
        if step % 50 == 0:
            record()

Rates are means over the steps since the last record. Nothing is imported from TensorBoard: the writer is the user's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from sparcomm.collectives.dense import dense_traffic

PREFIX = "sparcomm/"
_FLOAT32 = 4


class ScalarWriter(Protocol):
    """What is needed of a ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any:
        """Adds one point to the curve ``tag``."""
        ...


class HasStats(Protocol):
    """A HookState, seen from here."""

    def stats(self) -> dict[str, Any]:
        """See ``HookState.stats``."""
        ...


class Recorder:
    """Writes a hook's curves each time it is called.

    Args:
        state: the HookState.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or the like.
        prefix: of every tag.
        per_unit: curves for each compression unit, too.
        every_rank: write on all ranks, each with a writer of its own, and not on rank 0 only.
    """

    def __init__(
        self, state: HasStats, writer: ScalarWriter, prefix: str = PREFIX, *,
        per_unit: bool = False, every_rank: bool = False,
    ) -> None:  # fmt: skip
        self._state, self._writer, self._prefix = state, writer, prefix
        self._per_unit, self._every_rank = per_unit, every_rank
        self._last: Mapping[str, Any] | None = None

    def __call__(self, step: int | None = None) -> None:
        """Writes all curves at ``step``, by default the hook's own count. Waits for running jobs, as ``stats`` does."""
        if self._every_rank or not getattr(self._state, "rank", 0):
            kwargs: dict[str, Any] = {"prefix": self._prefix, "since": self._last, "per_unit": self._per_unit}
            self._last = write(self._state, self._writer, step, **kwargs)


def write(
    source: HasStats | Mapping[str, Any], writer: ScalarWriter, step: int | None = None, *,
    prefix: str = PREFIX, since: Mapping[str, Any] | None = None, per_unit: bool = False,
) -> Mapping[str, Any]:  # fmt: skip
    """Writes one point of every curve, and returns the statistics, to be given as ``since`` the next time.

    Args:
        source: a HookState, or what its ``stats()`` gave.
        writer: anything with ``add_scalar(tag, value, step)``.
        step: default: the hook's own count of steps.
        prefix: of every tag.
        since: statistics of an earlier time, from which on rates are taken; default: from the start of training.
        per_unit: the curves of each compression unit, too.
    """
    stats = source if isinstance(source, Mapping) else source.stats()
    at = stats["steps"] if step is None else step
    for tag, value in scalars(stats, since, per_unit=per_unit):
        writer.add_scalar(prefix + tag, value, at)
    return stats


def scalars(
    stats: Mapping[str, Any], since: Mapping[str, Any] | None = None, *, per_unit: bool = False
) -> Iterator[tuple[str, float]]:
    """(tag, value) of every curve, without prefix. Rates only if there were steps ``since`` then."""
    old: Mapping[str, Any] = since or {}
    steps = stats["steps"] - old.get("steps", 0)
    yield from (("kept", stats["kept"]), ("residual_norm", stats["residual_norm"]), ("skipped", stats["skipped"]))
    if steps > 0:
        yield from _rates(stats, old, steps)
        yield from _ratio(stats, old, steps)
    for name, value in (stats.get("check") or {}).items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield f"check/{name}", value
    if not per_unit:
        return
    before = old.get("per_unit", [])
    for number, unit in enumerate(stats["per_unit"]):
        # DDP rebuilds its buckets once: a unit of that number may have been another one.
        same = number < len(before) and before[number]["names"] == unit["names"]
        yield f"unit {number}/residual_norm", unit["residual_norm"]
        if steps > 0 and (same or not before):
            for tag, value in _rates(unit, before[number] if same else {}, steps):
                yield f"unit {number}/{tag}", value


def _rates(new: Mapping[str, Any], old: Mapping[str, Any], steps: int) -> Iterator[tuple[str, float]]:
    """Bytes and seconds a step."""
    yield "bytes_per_step", (new["bytes_sent"] - old.get("bytes_sent", 0)) / steps
    before = old.get("seconds", {})
    for phase, seconds in new["seconds"].items():
        yield f"seconds_per_step/{phase}", (seconds - before.get(phase, 0.0)) / steps


def _ratio(new: Mapping[str, Any], old: Mapping[str, Any], steps: int) -> Iterator[tuple[str, float]]:
    """How many times fewer bytes than a dense all-reduce of 32-bit gradients: nothing where nothing was sent."""
    sent = (new["bytes_sent"] - old.get("bytes_sent", 0)) / steps
    if sent and "size" in new:
        yield "ratio", sum(dense_traffic(u["numel"], _FLOAT32, new["size"])[2] for u in new["per_unit"]) / sent
