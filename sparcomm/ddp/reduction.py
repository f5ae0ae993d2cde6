"""One unit's way through one step: unscale, clip, feed the algorithm, write the mean, and what is owed afterwards.

Nothing here is committed: what comes back is pending until the whole step has succeeded (step.py).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparcomm.algorithms.base import State
from sparcomm.clock import Clock, Range
from sparcomm.ddp.mean import write_mean
from sparcomm.ddp.monitor import Monitor
from sparcomm.ddp.options import Options
from sparcomm.ddp.plan import Plan
from sparcomm.ddp.storage import Storage
from sparcomm.ddp.units import Unit
from sparcomm.dtypes import working_dtype
from sparcomm.transport.base import Traffic, Transport
from sparcomm.workspace import Workspace


@dataclass(eq=False)
class Pending:
    """What a unit will hold if the step is committed. ``plain``: the mean was the gradients' own, nothing else's."""

    unit: Unit
    residual: Tensor | None
    velocity: Tensor | None
    state: State
    ok: Tensor
    plain: bool


class Reducer:
    """Reduces units with the options of one hook.

    Attributes:
        numel: elements of the whole model, as far as known; a local limit of norm is shared out by it.
        norms: squares of this rank's norms by unit number, of the step under way: what the algorithm was fed.
        records_norms: whether they are wanted; measuring them is a pass over the gradient.
        clock, workspace: of what belongs to no unit (``sparse_layout.py``).
    """

    def __init__(self, options: Options, transport: Transport, monitor: Monitor | None = None, numel: int = 0) -> None:
        self.options, self.transport, self.monitor, self.numel = options, transport, monitor, numel
        self.storage = Storage(options.storage)
        self.norms: dict[int, Tensor] = {}
        self.records_norms = True
        self.clock, self.workspace = Clock(), Workspace()

    def run(self, unit: Unit, grad: Tensor, plan: Plan, number: int, used: Sequence[bool] | None = None) -> Pending:
        """Overwrites ``grad`` (n,) with the mean over ranks; returns what is then pending.

        Args:
            used: whether this rank has used each of the unit's parameters; None: DDP throws no mean away.
        """
        transport, space = self.transport, unit.state.workspace
        transport.context = f"step {number}, unit {unit.number}"
        counted = vars(transport.traffic).copy()
        work = self.local_gradient(grad, plan, grad.numel(), space)
        fed, velocity = self._fed(work, unit, plan, space, number)
        self.record_norm(unit.number, fed)
        idle = [] if used is None else self._idle(unit, used)
        before = None if plan.mode == "dense" else self.owed(unit, plan.rates, space)
        owed = self._hide(before, idle, fed, velocity, plan, space)
        algorithm = plan.algorithm(unit.algorithm)
        monitor = None if plan.mode != "sparse" or unit.skipped else self.monitor
        if monitor is not None:
            monitor.before(unit, fed, owed, joined=plan.joined)
        reduced = algorithm.reduce(fed, owed, unit.state, number, transport)
        if velocity is not None and reduced.sent is not None:
            mask = reduced.sent.dtype == torch.bool
            _ = velocity.masked_fill_(reduced.sent, 0) if mask else velocity.index_fill_(0, reduced.sent, 0)
        residual = self._unhide(unit, before, idle, velocity, reduced.residual, plan)
        with Range("mean"):
            ok, lost = write_mean(reduced, grad, transport.size, plan.scale)
        if monitor is not None:
            monitor.after(unit, algorithm, grad, residual, plan.scale)
        residual = self._residual(unit, residual, lost, plan, number)
        whole = plan.mode == "dense" or algorithm.delivers_all(unit.numel, fed.dtype, transport.size)
        plain = owed is None and not idle and whole
        kept = (grad, unit.residual, unit.velocity, residual, velocity)
        space.give(*(t for t in (work, fed, before, owed, reduced.total) if all(t is not k for k in kept)))
        _book(unit.traffic, counted, transport.traffic)
        return Pending(unit, residual, velocity if velocity is not None else unit.velocity, reduced.state, ok, plain)

    # ---- before --------------------------------------------------------------------------------------------------

    def record_norm(self, number: int, fed: Tensor) -> None:
        """Keeps the square of the norm of what was fed under ``number``, if norms are wanted."""
        if self.records_norms:
            self.norms[number] = torch.linalg.vector_norm(fed, dtype=working_dtype(fed.dtype)).double().square()

    def local_gradient(self, grad: Tensor, plan: Plan, numel: int, space: Workspace | None = None) -> Tensor:
        """The gradient without its loss scale and within its norm. ``grad`` itself may be changed: it is a bucket.

        Args:
            numel: elements of the parameters, whose share of the limit it has.
            space: lends the buffer that 16-bit gradients need.
        """
        limit = self.options.local_clip
        if plan.joined or (plan.scale is None and limit is None):
            return grad
        work, working = grad, working_dtype(grad.dtype)
        if plan.scale is not None:
            if grad.dtype != working:  # unscaled values may be below what 16 bits hold
                work = (space or Workspace()).take(grad.numel(), working, grad.device).copy_(grad)
            work.div_(plan.scale.to(grad.device, non_blocking=True))
        if limit is not None:
            # Not by the partition's own count: it may still be growing while its first unit is reduced.
            bound = limit * math.sqrt(numel / max(self.numel, 1))
            norm = torch.linalg.vector_norm(work, dtype=working_dtype(work.dtype))
            factor = (bound / norm).clamp_(max=1.0)  # NaN or inf / inf stays not finite, and is found as such
            if grad.device.type != "cpu" or float(factor) != 1.0:
                work.mul_(factor)
        return work

    def _fed(self, work: Tensor, unit: Unit, plan: Plan, space: Workspace, number: int) -> tuple[Tensor, Tensor | None]:
        """(what the algorithm gets, the next velocity if it is a new one)."""
        correction = self.options.correction
        if correction is None or plan.joined:
            return work, None
        return correction.feed(work, unit.velocity, space, number, (span for _, span in unit.spans()))

    def owed(self, unit: Unit, rates: Mapping[int, float], space: Workspace) -> Tensor | None:
        """What this rank owes in the working dtype, in units of the learning ``rates``; a buffer or the residual."""
        if unit.residual is None:
            return None
        owed = self.storage.use(unit.residual, working_dtype(unit.dtype), unit.device, space)
        ratios = self._ratios(unit, rates)
        if ratios:
            if owed is unit.residual:  # committed: not to be changed
                owed = space.take(unit.numel, owed.dtype, owed.device).copy_(owed)
            for p, span in unit.spans():
                owed[span].mul_(ratios.get(id(p), 1.0))
        return owed

    def _idle(self, unit: Unit, used: Sequence[bool]) -> list[slice]:
        """The places of parameters that no rank has used: their mean would be thrown away. Collective."""
        flags = torch.tensor(used, dtype=torch.int32, device=unit.device)
        self.transport.all_reduce(flags, "max")
        return [span for (_, span), anyone in zip(unit.spans(), flags.tolist(), strict=True) if not anyone]

    @staticmethod
    def _hide(
        before: Tensor | None, idle: list[slice], fed: Tensor, velocity: Tensor | None, plan: Plan, space: Workspace
    ) -> Tensor | None:
        """What may be sent of ``before``: nothing by a rank that has joined, nothing for ``idle`` parameters."""
        if velocity is not None:  # without momentum the gradient is zero there anyway
            for span in idle:
                fed[span].zero_()
        if before is None or plan.joined:
            return None
        if not idle:
            return before
        shown = space.take(before.numel(), before.dtype, before.device).copy_(before)
        for span in idle:
            shown[span].zero_()
        return shown

    @staticmethod
    def _unhide(
        unit: Unit, before: Tensor | None, idle: list[slice], velocity: Tensor | None, residual: Tensor | None,
        plan: Plan,
    ) -> Tensor | None:  # fmt: skip
        """The residual, with what was hidden: nothing has happened to it, so it still is owed."""
        for span in idle:
            if velocity is not None:
                velocity[span].zero_() if unit.velocity is None else velocity[span].copy_(unit.velocity[span])
        hidden = [slice(0, unit.numel)] if plan.joined else idle
        if before is None or not hidden:
            return residual
        if residual is None:
            residual = unit.state.workspace.take(unit.numel, before.dtype, before.device).zero_()
        elif residual is before or residual is unit.residual:
            residual = residual.clone()
        for span in hidden:
            residual[span].add_(before[span])
        return residual

    def _ratios(self, unit: Unit, rates: Mapping[int, float]) -> dict[int, float]:
        """Old learning rate over new by id of parameter, where they differ: what was owed was owed at the old one."""
        clamp = self.options.lr_clamp
        if clamp is None:
            return {}
        ratios: dict[int, float] = {}
        for p in unit.params:
            old, new = unit.rates.get(id(p)), rates.get(id(p))
            if old is not None and new is not None and old != new:
                ratio = old / new if new > 0 else clamp
                ratios[id(p)] = min(max(ratio, 1 / clamp), clamp)
        return ratios

    # ---- after ---------------------------------------------------------------------------------------------------

    def _residual(
        self, unit: Unit, residual: Tensor | None, lost: Tensor | None, plan: Plan, number: int
    ) -> Tensor | None:
        """What this rank will owe, as it is stored."""
        space, size, rank = unit.state.workspace, self.transport.size, self.transport.rank
        if plan.mode == "dense":
            return unit.residual
        if residual is not None and residual is unit.residual:
            residual = residual.clone()  # what is committed must not change before the commit
        owes = unit.algorithm.conserves and (residual is not None or unit.algorithm.sparse)
        if lost is not None and owes and keeper(number, unit.number, size) == rank:
            if residual is None:
                residual = space.take(unit.numel, lost.dtype, lost.device).zero_()
            residual.add_(lost)
        if residual is None:
            return None
        return self.storage.keep(residual, number, unit.number, rank, space)


def keeper(step: int, unit: int, size: int) -> int:
    """The rank that keeps what all ranks have lost alike in a step: by a hash, so that each gets its share."""
    return zlib.crc32(step.to_bytes(8, "little") + unit.to_bytes(4, "little")) % size


def _book(traffic: Traffic, before: dict[str, int], after: Traffic) -> None:
    """Adds to a unit's counters what the transport's have grown by."""
    traffic.book(
        after.rounds - before["rounds"],
        after.messages - before["messages"],
        after.bytes_sent - before["bytes_sent"],
        after.bytes_received - before["bytes_received"],
    )
