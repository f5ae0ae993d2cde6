"""The transaction: all units of a synchronised step, whose new residuals and states count together or not at all.

A step opens with bucket 0 and closes with the bucket that ``is_last``. Until then what the algorithm returns is
pending. It is committed by swapping buffers, once all units have been reduced and nothing was non-finite on any rank: a
gradient scaler skips whole steps, not buckets, so a step in which one bucket overflowed must leave no trace in others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Reduced, State
from sparcomm.collectives.bags import all_finite
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.units import Partition, Unit, field_kinds
from sparcomm.errors import HookError
from sparcomm.transport.base import Traffic, Transport


@dataclass(eq=False)
class Arrival:
    """What has come of one unit's gradient in this step.

    Attributes:
        grad: (numel,) the bucket's own buffer where the unit is the bucket, else gathered from buckets.
        missing: parameters still to come.
        returns: (bucket buffer, its slice, the unit's slice) to copy the mean back to.
        deliveries: the buckets that wait for this unit.
    """

    grad: Tensor
    missing: int
    returns: list[tuple[Tensor, slice, slice]] = field(default_factory=list[tuple[Tensor, slice, slice]])
    deliveries: list[Delivery] = field(default_factory=list[Delivery])


@dataclass(eq=False)
class _Pending:
    unit: Unit
    residual: Tensor | None
    state: State
    ok: Tensor


class Step:
    """One synchronised step over the units of ``partition``.

    Args:
        number: of this step, the same on all ranks; seeds and message headers hold it.
        on_host: whether the host waits for results anyway. Else nothing here does, and the device decides the commit.
    """

    def __init__(
        self, number: int, partition: Partition, algorithm: Algorithm, transport: Transport, on_host: bool
    ) -> None:
        self.number, self.partition = number, partition
        self._algorithm, self._transport, self._on_host = algorithm, transport, on_host
        self._arrivals: dict[Unit, Arrival] = {}
        self._pending: list[_Pending] = []

    # ---- gradients come in (the hook's thread) -------------------------------------------------------------------

    def place(self, params: Sequence[Tensor], buffer: Tensor, delivery: Delivery) -> list[Unit]:
        """Takes in a bucket; returns the units that are complete with it, in the order in which to reduce them.

        The order depends on the order of buckets only, which is the same on all ranks.
        """
        unit = self.partition.whole(params)
        if unit is not None and unit not in self._arrivals:
            self._arrivals[unit] = Arrival(buffer, 0, deliveries=[delivery])
            delivery.expect(1)
            return [unit]
        touched: dict[Unit, None] = {}
        for unit, source, target in self.partition.pieces(params):
            arrival = self._arrivals.get(unit)
            if arrival is None:
                grad = torch.empty(unit.numel, dtype=unit.dtype, device=unit.device)
                arrival = self._arrivals[unit] = Arrival(grad, len(unit.params))
            if arrival.missing == 0:
                raise HookError(f"step {self.number}: a parameter of unit {unit.number} came twice")
            arrival.grad[target] = buffer[source]
            arrival.returns.append((buffer, source, target))
            arrival.missing -= 1
            if unit not in touched:
                touched[unit] = None
                arrival.deliveries.append(delivery)
        delivery.expect(len(touched))
        return sorted((u for u in touched if not self._arrivals[u].missing), key=lambda u: u.number)

    def check_complete(self) -> None:
        """Raises HookError if the last bucket has come and a unit still misses parameters."""
        for unit in self.partition.units:
            arrival = self._arrivals.get(unit)
            missing = len(unit.params) if arrival is None else arrival.missing
            if missing:
                raise HookError(
                    f"step {self.number}: the last bucket has come, but {missing} of {len(unit.params)} parameters of "
                    f"unit {unit.number} have not: the module's parameters differ from those the units were made of"
                )

    # ---- gradients are reduced (the worker) ----------------------------------------------------------------------

    def reduce(self, unit: Unit) -> None:
        """Reduces one unit, writes the mean into its buckets, and keeps what is new pending."""
        arrival, transport = self._arrivals[unit], self._transport
        transport.context = f"step {self.number}, unit {unit.number}"
        counted = vars(transport.traffic).copy()
        reduced = self._algorithm.reduce(arrival.grad, unit.residual, unit.state, self.number, transport)
        _book(unit.traffic, counted, transport.traffic)
        keeper = _keeper(self.number, unit.number, transport.size) == transport.rank
        residual = reduced.residual
        if residual is not None and residual is unit.residual:
            residual = residual.clone()  # what is committed must not change before the commit
        ok = _write_mean(reduced, residual if self._algorithm.conserves else None, arrival.grad, transport.size, keeper)
        self._pending.append(_Pending(unit, residual, reduced.state, ok))
        self.partition.workspace.give(reduced.total)
        for buffer, source, target in arrival.returns:
            buffer[source] = arrival.grad[target]
        arrival.returns.clear()
        for delivery in arrival.deliveries:
            delivery.arrive()

    def commit(self) -> Tensor:
        """Makes what is pending count if every unit was finite on every rank, else drops it; returns that flag, ()."""
        if self._on_host:
            good = all(bool(p.ok) for p in self._pending)
            if good:
                self._swap()
            else:
                self.drop()
            return torch.tensor(good)
        good = _all([p.ok for p in self._pending])
        for p in self._pending:
            here = good.to(p.unit.device, non_blocking=True)
            p.residual = _select(here, p.residual, p.unit.residual)
            p.state = _select_state(here, p.state, p.unit.state)
        self._swap()
        return good

    def drop(self) -> None:
        """Forgets what is pending; what was committed before stays."""
        for p in self._pending:
            self.partition.workspace.give(p.residual)
        self._pending.clear()
        self._arrivals.clear()

    def _swap(self) -> None:
        for p in self._pending:
            if p.unit.residual is not p.residual:
                self.partition.workspace.give(p.unit.residual)
            p.unit.residual, p.unit.state = p.residual, p.state
        self._pending.clear()
        self._arrivals.clear()


def _keeper(step: int, unit: int, size: int) -> int:
    """The rank that keeps a step's casting error of a unit: by a hash, so that every rank gets its share over time."""
    return zlib.crc32(step.to_bytes(8, "little") + unit.to_bytes(4, "little")) % size


def _write_mean(reduced: Reduced, residual: Tensor | None, out: Tensor, size: int, keeper: bool) -> Tensor:
    """Writes total / size into ``out``, NaN where the sum was not finite; returns () bool: this unit may be committed.

    Where ``out`` is narrower than the sum, a finite sum may overflow, which counts as non-finite (all ranks cast the
    same bits, so all see it), and the keeper's pending ``residual`` takes over what the cast lost. An algorithm that
    keeps no residual (``Dense``) has nowhere to put it: there the cast error is lost, as it is in PyTorch's own hooks.
    """
    total, ok = reduced.total, reduced.ok
    divisor = total.new_full((), size).masked_fill_(~ok, torch.nan)
    torch.div(total, divisor, out=out)
    if out.dtype == total.dtype:
        return ok
    ok = ok & all_finite(out)
    if residual is not None and keeper:
        residual.add_(total.sub_(out.to(total.dtype), alpha=size))
    out.masked_fill_(~ok, torch.nan)
    return ok


def _all(oks: list[Tensor]) -> Tensor:
    """() bool on the first flag's device, without waiting for it."""
    if not oks:
        return torch.tensor(True)
    return torch.stack([ok.to(oks[0].device, non_blocking=True) for ok in oks]).all()


def _select(good: Tensor, new: Any, old: Any) -> Any:
    """``new`` where ``good`` else ``old``, for tensors and None (= zeros), decided on the device. Overwrites either."""
    if new is old:
        return new
    if new is None:
        return old.masked_fill_(good, 0)
    if old is None:
        return new.masked_fill_(~good, 0)
    return torch.where(good, new, old, out=new)


def _select_state(good: Tensor, new: State, old: State) -> State:
    """The state to keep. Fields that are no tensors cannot be chosen on the device: if one differs, the host waits."""
    if new is old:
        return new
    kinds = [(name, kind) for name, kind in field_kinds(new) if kind != "derived"]
    pairs = [(getattr(new, name), getattr(old, name)) for name, _ in kinds]
    if any(not isinstance(a, Tensor) and a != b for a, b in pairs):
        return new if bool(good) else old
    for (name, _), (a, b) in zip(kinds, pairs, strict=True):
        if isinstance(a, Tensor):
            setattr(new, name, _select(good, a, b))
    return new


def _book(traffic: Traffic, before: dict[str, int], after: Traffic) -> None:
    """Adds to a unit's counters what the transport's have grown by."""
    traffic.book(
        after.rounds - before["rounds"],
        after.messages - before["messages"],
        after.bytes_sent - before["bytes_sent"],
        after.bytes_received - before["bytes_received"],
    )
