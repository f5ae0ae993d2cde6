"""The transaction: all units of a synchronised step, whose new residuals and states count together or not at all.

A step opens with bucket 0 and closes with the bucket that ``is_last``. Until then what the algorithm returns is
pending. It is committed by swapping buffers, once all units have been reduced and nothing was non-finite on any rank: a
gradient scaler skips whole steps, not buckets, so a step in which one bucket overflowed must leave no trace in others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparcomm.algorithms.base import State, field_kinds, get_field, set_field
from sparcomm.clock import Range
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.lane import hold
from sparcomm.ddp.plan import Plan
from sparcomm.ddp.reduction import Pending, Reducer
from sparcomm.ddp.sparse_layout import FIRST, reduce_rows
from sparcomm.ddp.storage import choose
from sparcomm.ddp.units import Partition, Unit
from sparcomm.errors import HookError


@dataclass(eq=False)
class Arrival:
    """What has come of one unit's gradient in this step.

    Attributes:
        grad: (numel,) the bucket's own buffer where the unit is the bucket, else gathered from buckets.
        missing: parameters still to come.
        returns: (bucket buffer, its slice, the unit's slice) to copy the mean back to.
        deliveries: the buckets that wait for this unit.
        used: whether this rank has used a parameter, by its id; None where DDP does not throw means away.
    """

    grad: Tensor
    missing: int
    returns: list[tuple[Tensor, slice, slice]] = field(default_factory=list[tuple[Tensor, slice, slice]])
    deliveries: list[Delivery] = field(default_factory=list[Delivery])
    used: dict[int, bool] | None = None


class Step:
    """One synchronised step over the units of ``partition``.

    Args:
        number: of this step, the same on all ranks; seeds and message headers hold it.
        reducer: reduces one unit.
        plan: what this step does, the same on all ranks.
        on_host: whether the host waits for results anyway. Else nothing here does, and the device decides the commit.
    """

    def __init__(self, number: int, partition: Partition, reducer: Reducer, plan: Plan, on_host: bool) -> None:
        self.number, self.partition, self.plan = number, partition, plan
        self._reducer, self._on_host = reducer, on_host
        self._arrivals: dict[Unit, Arrival] = {}
        self._pending: list[Pending] = []
        self._rows = 0  # buckets of sparse layout that have come
        self._rows_ok: list[Tensor] = []
        reducer.norms.clear()

    # ---- gradients come in (the hook's thread) -------------------------------------------------------------------

    def place(
        self, params: Sequence[Tensor], buffer: Tensor, delivery: Delivery, used: dict[int, bool] | None = None
    ) -> list[Unit]:
        """Takes in a bucket; returns the units that are complete with it, in the order in which to reduce them.

        The order depends on the order of buckets only, which is the same on all ranks. ``used``: see ``Arrival``.
        """
        unit = self.partition.whole(params)
        if unit is not None and unit not in self._arrivals:
            self._arrivals[unit] = Arrival(buffer, 0, deliveries=[delivery], used=used)
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
            if used is not None:
                arrival.used = (arrival.used or {}) | used
            if unit not in touched:
                touched[unit] = None
                arrival.deliveries.append(delivery)
        delivery.expect(len(touched))
        return sorted((u for u in touched if not self._arrivals[u].missing), key=lambda u: u.number)

    def place_rows(self, buffer: Tensor, delivery: Delivery) -> Callable[[], None]:
        """Takes in a bucket of sparse layout, which is no unit's; returns the job that reduces and delivers it."""
        number = FIRST + self._rows
        self._rows += 1
        delivery.expect(1)

        def job() -> None:
            with Range("rows"):
                delivery.buffer, ok = reduce_rows(buffer, self._reducer, self.plan, self.number, number)
            self._rows_ok.append(ok)
            delivery.arrive()

        return job

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
        arrival = self._arrivals[unit]
        used = None if arrival.used is None else [arrival.used[id(p)] for p in unit.params]
        hold(unit.residual, unit.velocity, *unit.tensors())
        with Range(f"unit {unit.number} {self.plan.algorithm(unit.algorithm).name}"):
            self._pending.append(self._reducer.run(unit, arrival.grad, self.plan, self.number, used))
        for buffer, source, target in arrival.returns:
            buffer[source] = arrival.grad[target]
        arrival.returns.clear()
        for delivery in arrival.deliveries:
            delivery.arrive()

    def commit(self) -> Tensor:
        """Makes what is pending count if every unit was finite on every rank, else drops it; returns that flag, ()."""
        oks = [*(p.ok for p in self._pending), *self._rows_ok]
        if self._on_host:
            good = all(bool(ok) for ok in oks)
            if good:
                self._swap()
            else:
                self.drop()
            return torch.tensor(good, device="cpu")
        good = _all(oks)
        for p in self._pending:
            here = good.to(p.unit.device, non_blocking=True)
            p.residual = self._reducer.storage.select(here, p.residual, p.unit.residual)
            p.velocity = choose(here, p.velocity, p.unit.velocity)
            p.state = _select_state(here, p.state, p.unit.state)
        self._swap()
        return good

    def drop(self) -> None:
        """Forgets what is pending; what was committed before stays."""
        for p in self._pending:
            space = self.partition.workspace
            space.give(p.residual if p.residual is not p.unit.residual else None)
            space.give(p.velocity if p.velocity is not p.unit.velocity else None)
            p.unit.plain = False
        self._pending.clear()
        self._arrivals.clear()

    def _swap(self) -> None:
        for p in self._pending:
            unit, space = p.unit, self.partition.workspace
            space.give(unit.residual if unit.residual is not p.residual else None)
            space.give(unit.velocity if unit.velocity is not p.velocity else None)
            unit.residual, unit.velocity, unit.state, unit.plain = p.residual, p.velocity, p.state, p.plain
            if self.plan.rates and self.plan.mode != "dense":  # dense steps leave what is owed at its own rate
                unit.rates = {id(q): self.plan.rates[id(q)] for q in unit.params if id(q) in self.plan.rates}
        self._pending.clear()
        self._arrivals.clear()


def _all(oks: list[Tensor]) -> Tensor:
    """() bool on the first flag's device, without waiting for it."""
    if not oks:
        return torch.tensor(True, device="cpu")
    return torch.stack([ok.to(oks[0].device, non_blocking=True) for ok in oks]).all()


def _select_state(good: Tensor, new: State, old: State) -> State:
    """The state to keep. Fields that are no tensors cannot be chosen on the device: if one differs, the host waits."""
    if new is old:
        return new
    kinds = [(name, kind) for name, kind in field_kinds(new) if kind != "derived"]
    pairs = [(get_field(new, name), get_field(old, name)) for name, _ in kinds]
    if any(not isinstance(a, Tensor) and a != b for a, b in pairs):
        return new if bool(good) else old
    for (name, _), (a, b) in zip(kinds, pairs, strict=True):
        if isinstance(a, Tensor):
            set_field(new, name, choose(good, a, b))
    return new
