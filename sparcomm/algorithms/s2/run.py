"""One ``reduce`` under way: what this rank has, the round trip, what it decodes to, what stays behind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sparcomm import layout
from sparcomm.algorithms.base import Part, Summed
from sparcomm.algorithms.s2.decoders import capacity, highest, peeled, unit_exponent
from sparcomm.algorithms.s2.plan import COMPACT, DENSE, PEEL, Plan, Planner
from sparcomm.algorithms.s2.state import ENDLESS, NOTHING, S2State
from sparcomm.algorithms.s2.trip import Brought, round_trip
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import ordered_all_reduce
from sparcomm.collectives.rows import spread, sum_compacted
from sparcomm.dtypes import working_dtype
from sparcomm.memory import compensated, nothing_owed
from sparcomm.seeds import mixed
from sparcomm.selectors import Memo
from sparcomm.transport.base import Transport

if TYPE_CHECKING:
    from sparcomm.algorithms.s2 import S2Reducer

SALT = 0x5332
DUST = 256  # units: less than that rounding may have left, while the unit was up to so many times larger


class Run:
    """The keys of this rank, ``key``, and the values of all their lanes, ``value``, of ``x`` = gradient + residual.

    Attributes:
        owed: the next residual, which starts as ``x``; None if there will be none.
    """

    def __init__(
        self, algorithm: S2Reducer, planner: Planner, plan: Plan, grad: Tensor, residual: Tensor | None,
        state: S2State, bags: Bags, transport: Transport,
    ) -> None:  # fmt: skip
        self.algorithm, self.planner, self.plan, self.keys = algorithm, planner, plan, planner.keys
        self.grad, self.residual, self.state = grad, residual, state
        self.bags, self.kernels, self.transport = bags, bags.kernels, transport
        self.clock, self.space = state.clock, state.workspace
        self.dtype = working_dtype(grad.dtype)
        self.one = layout.whole(grad.numel(), grad.device)
        fixed = algorithm.fixed_seed
        self.seed = mixed(bags.step, bags.unit, SALT) if fixed is None else fixed
        self.whole = planner.natural and plan.way in (DENSE, COMPACT)  # so that nothing stays behind

    def reduce(self) -> Summed:
        """All of it."""
        if self.plan.way == DENSE:
            return self._densely()
        with self.clock.span("select"):
            memo = self._find()
        if self.plan.way == COMPACT:
            parts, sent, union, peak = self._compactly()
        elif self.plan.way == PEEL:
            parts, sent, union, peak = self._exactly()
        else:
            parts, sent, union, peak = self._roughly()
        state = replace(self.state, memo=memo, **self.state.after(union, peak))
        return Summed([parts], self._left(), sent, state)

    def _left(self) -> Tensor | None:
        """The residual, once all that left has been taken from ``owed``."""
        if self.whole:
            return nothing_owed(self.grad, self.space)
        if self.algorithm.feedback:
            return self.owed
        self.space.give(self.owed)
        return None

    # ---- what this rank has ----------------------------------------------------------------------------------------

    def _find(self) -> dict[str, Any]:
        """Finds ``key``, ``words`` (their bitmap) and ``value``; what the selector remembers then."""
        keys, kernels, density = self.keys, self.kernels, self.algorithm.density
        self.words = torch.empty(keys.words, dtype=torch.int32, device=self.grad.device)
        memo = Memo.from_state(self.state.memo)
        self.owed: Tensor | None = None
        if density is not None and keys.width == 1:
            self.owed = self.space.take(keys.numel, self.dtype, self.grad.device)
            choice = self.algorithm.chooser.taking().start(
                kernels, self.grad, self.residual, self.owed, self.one, self.planner.quota, self.bags.flags, memo
            )
            self.key, self.value = choice.take(0, self.planner.quota)
            kernels.bitmap_encode(self.key, keys.count, self.words)
            self.index = self.key
            return memo.state()
        x = self._summed()
        if density is None:
            kernels.support(x, keys.width, self.words)
            self.key = kernels.ones(self.words)
        else:
            every, k = layout.whole(keys.count, x.device), self.planner.quota
            chooser = self.algorithm.chooser.taking()
            choice = chooser.start(kernels, self._strengths(x), None, None, every, k, self.bags.flags, memo)
            self.key, _ = choice.take(0, k)
            kernels.bitmap_encode(self.key, keys.count, self.words)
        self.index = self._elements(self.key)
        self.value = kernels.gather(x, self.index, self.one, 0)
        return memo.state()

    def _summed(self) -> Tensor:
        """Gradient + residual; a buffer of its own, ``owed``, unless nothing will stay behind."""
        if self.whole or (self.planner.natural and not self.algorithm.feedback):
            return compensated(self.grad, self.residual)
        self.owed = self.space.take(self.keys.numel, self.dtype, self.grad.device)
        if self.residual is None:
            return self.owed.copy_(self.grad)
        return torch.add(self.residual, self.grad, out=self.owed)

    def _strengths(self, x: Tensor) -> Tensor:
        """(keys,) the largest magnitude of each; NaN where there is one."""
        width = self.keys.width
        split = x.numel() // width * width
        parts = [x[:split].view(-1, width)]
        if split < x.numel():
            parts.append(x[split:].view(1, -1))
        return torch.cat([torch.maximum(part.amax(1), -part.amin(1)) for part in parts])  # much faster than aminmax

    def _elements(self, key: Tensor) -> Tensor:
        """(k * width,) elements of these keys: those at or beyond the vector's end are its last key's padding."""
        width = self.keys.width
        return key if width == 1 else (key.view(-1, 1) * width + torch.arange(width, device=key.device)).view(-1)

    def _inside(self, key: Tensor) -> int:
        """How many elements these keys have without padding."""
        keys, length = self.keys, key.numel() * self.keys.width
        padding = keys.count * keys.width - keys.numel
        return length - padding if padding and key.numel() and int(key[-1]) == keys.count - 1 else length

    # ---- ways ------------------------------------------------------------------------------------------------------

    def _densely(self) -> Summed:
        n, space = self.keys.numel, self.space
        total = space.take(n, self.dtype, self.grad.device)
        fed = compensated(self.grad, self.residual)
        ordered_all_reduce(fed, total, self.bags, self.transport, self.clock, space)
        words = torch.empty(self.keys.words, dtype=torch.int32, device=self.grad.device)
        self.kernels.support(total, self.keys.width, words)
        # Of a sum, not of what the ranks had: the same everywhere, and near enough.
        after = self.state.after(int(self.kernels.popcount(words)), self._peak(total))
        return Summed(total, nothing_owed(self.grad, space), None, replace(self.state, **after))

    def _compactly(self) -> tuple[Part, Tensor | None, int, int | None]:
        """The union first, then its values densely."""
        brought = self._travel(None, self._peak(self.value))
        union = self._united(brought)
        part = self._added_up(union)
        if self.owed is not None:
            self.kernels.subtract(self.owed, self.index, self.value, self.one, 0)
        return part, self._sent(self.value), union.numel(), brought.peak

    def _roughly(self) -> tuple[Part, Tensor | None, int, int | None]:
        """By a count-sketch, whose error on all of the union stays behind."""
        plan, width, kernels = self.plan, self.keys.width, self.kernels
        own = self.value.new_empty(plan.rows, plan.columns * width)
        with self.clock.span("code"):
            kernels.sketch(self.key, self.value, width, self.seed, own)
        brought = self._travel(own, NOTHING)
        union = self._united(brought)
        assert brought.table is not None
        with self.clock.span("code"):
            counts = None
            if plan.way == "projection":
                counts = torch.empty(plan.rows, plan.columns, dtype=torch.int32, device=own.device)
                kernels.occupancy(union, self.seed, plan.columns, counts)
            told = brought.table.view_as(own)
            total = kernels.estimate(told, union, width, self.seed, counts, plan.way)  # type: ignore[arg-type]
            self.bags.note_nonfinite(total)
            if self.algorithm.feedback and self.owed is not None:
                index = self._elements(union)
                left = kernels.gather(self.owed, index, self.one, 0)
                left -= kernels.estimate(own, union, width, self.seed, counts, plan.way)  # type: ignore[arg-type]
                # Nobody else could know that a difference of finite numbers was too large.
                top = torch.finfo(left.dtype).max
                kernels.scatter(self.owed, index, left.clamp_(-top, top), self.one, 0)
        return self._part(union, total), self._sent(None), union.numel(), None

    def _exactly(self) -> tuple[Part, Tensor | None, int, int | None]:
        """By a table of integers, which is peeled; what does not peel, or has outgrown them, goes by itself."""
        plan, width, kernels, size = self.plan, self.keys.width, self.kernels, self.transport.size
        assert self.state.peak is not None
        exponent, bits = unit_exponent(self.state.peak, size, self.dtype), capacity(size).bit_length() - 1
        peak = self._peak(self.value)  # of all: were it of what is sent, it would stay where nothing can be
        with self.clock.span("code"):
            fixed = self._fixed(exponent, capacity(size))
            own = torch.empty((plan.rows, plan.columns * width), dtype=torch.int32, device=fixed.device)
            kernels.sketch(self.key, fixed, width, self.seed, own)
        brought = self._travel(own, peak)
        union = self._united(brought)
        assert brought.table is not None
        if brought.peak > min(exponent + bits, highest(self.dtype)):
            part, decoded = self._added_up(union), self.value
        else:
            total = peeled(self, union, brought.table.view_as(own), fixed)
            with self.clock.span("code"):
                part = self._part(union, kernels.from_fixed(total, exponent, self.dtype))
                self.bags.note_nonfinite(part.value)
                decoded = kernels.from_fixed(fixed, exponent, self.dtype)
        if self.owed is not None:
            kernels.subtract(self.owed, self.index, decoded, self.one, 0)
        return part, self._sent(decoded), union.numel(), brought.peak

    # ---- their parts -----------------------------------------------------------------------------------------------

    def _fixed(self, exponent: int, limit: int) -> Tensor:
        """``value`` as integers. Keys that become nothing are left out where no selector has chosen them.

        So are those that only owe what rounding has left: as magnitudes fall the unit does, too, and all keys that ever
        had a gradient would travel for the dust on them. They wait for their next gradient.
        """
        fixed = torch.empty(self.value.shape, dtype=torch.int32, device=self.value.device)
        self.kernels.to_fixed(self.value, exponent, limit, fixed)
        if not self.planner.natural or self.residual is None:
            return fixed
        width = self.keys.width
        grad = self.grad[self.index.clamp(max=self.keys.numel - 1)]  # padding is of the last key, as the last element
        least = torch.where((grad != 0).view(-1, width).any(1), 1, DUST)
        kept = (fixed.view(-1, width).abs().amax(1) >= least) | ~self.value.view(-1, width).isfinite().all(1)
        self.key, self.value = self.key[kept], self.value.view(-1, width)[kept].view(-1)
        self.index = self._elements(self.key)
        self.kernels.bitmap_encode(self.key, self.keys.count, self.words)
        return fixed.view(-1, width)[kept].view(-1)

    def _travel(self, table: Tensor | None, peak: int) -> Brought:
        flat = None if table is None else table.view(-1)
        trip = self.planner.trip(self.plan)
        return round_trip(trip, flat, self.words, peak, self.bags, self.transport, self.clock)

    def _united(self, brought: Brought) -> Tensor:
        """The keys that any rank has; their bitmap becomes ``words``."""
        self.words = brought.words
        with self.clock.span("code"):
            return self.kernels.ones(self.words)

    def _peak(self, x: Tensor) -> int:
        """All magnitudes are below two to the power of it."""
        if not self.algorithm.counts_bits or not x.numel():
            return NOTHING
        low, high = (float(v) for v in x.aminmax())
        top = max(-low, high)
        if not math.isfinite(low) or not math.isfinite(high):
            return ENDLESS
        return math.frexp(top)[1] if top else NOTHING

    def spread(self, value: Tensor, union: Tensor) -> Tensor:
        """(u * width,): ``value``, of this rank's keys, at their places in ``union``; zeros elsewhere."""
        rows = value.view(-1, self.keys.width)
        return spread(self.key, rows, self.words, union.numel(), self.kernels).view(-1)

    def add_up(self, mine: Tensor, key: Tensor) -> Tensor:
        """(k * width,) the sum over ranks, in their order, of ``mine``: values of ``key``, which all ranks have."""
        inside = self._inside(key)
        total = sum_compacted(mine[:inside], self.bags, self.transport, self.clock)
        return functional.pad(total, (0, mine.numel() - inside))

    def _added_up(self, union: Tensor) -> Part:
        """The sum of the values themselves."""
        with self.clock.span("code"):
            mine = self.spread(self.value, union)
        return self._part(union, self.add_up(mine, union))

    def _part(self, union: Tensor, value: Tensor) -> Part:
        inside = self._inside(union)
        return Part(self._elements(union)[:inside], value[:inside], self.one, 0)

    def _sent(self, value: Tensor | None) -> Tensor | None:
        """``Reduced.sent``: where ``value`` of this rank's keys is not zero; None: all lanes of them."""
        if not self.state.wants_sent or self.whole:
            return None
        inside = self._inside(self.key)
        index = self.index[:inside]
        return index if value is None else index[value[:inside] != 0]
