"""What ``sparcomm bench kernels`` runs: every kernel on the sizes that it has in a step, and the bytes it cannot avoid.

The bytes of a case are a sum of multiples of its sizes, so that what is counted is what is shown: n elements, k kept
positions, w words of a bitmap over n, e words of an index code, c cells of a table, u entries of a union, s words of a
bag. Every operand counts once, read or written; of a table each of a key's cells is read and written on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.density import quota
from sparcomm.kernels import Kernels
from sparcomm.layout import Layout, dealt, whole
from sparcomm.selectors import Memo, Selector
from sparcomm.selectors.gaussiank import GaussianK
from sparcomm.selectors.topk import TopK
from sparcomm.sparse import Sparse

PEELED = 1.3  # cells per key, of tables that are peeled
ROWS = 3  # of tables whose rows' median is taken, or that are peeled
SEED = 5
SELECTION = "topk"  # the case whose time codes are compared with


class Goal(NamedTuple):
    """What is asked of a case on a GPU: ``what`` of its row at least, or at most, ``bound``."""

    what: Literal["of_copy", "torch_ratio", "of_selection"]
    bound: float
    text: str

    def met(self, found: float | None) -> bool | None:
        """None where nothing was measured."""
        if found is None:
            return None
        return found <= self.bound if self.what == "of_selection" else found >= self.bound


@dataclass(frozen=True)
class Case:
    """One kernel, or what a step does with several, on data of its own.

    Attributes:
        items: what it has to go through.
        sizes, bytes: sizes by letter; how many bytes of each it moves.
        run: with an implementation of the kernels.
        by_torch: what PyTorch has for it; None = nothing.
        goals: what it is to reach on a GPU.
        coded: whether its time is compared with the selection's.
    """

    items: int
    sizes: Mapping[str, int]
    bytes: Mapping[str, float]
    run: Callable[[Kernels], object]
    by_torch: Callable[[], object] | None = None
    goals: tuple[Goal, ...] = ()
    coded: bool = False

    @property
    def moved(self) -> float:
        """Bytes."""
        return sum(count * self.sizes[letter] for letter, count in self.bytes.items())

    @property
    def formula(self) -> str:
        """The same in letters."""
        return " + ".join(f"{count:g}{letter}" for letter, count in self.bytes.items())


class Data:
    """Draws what cases run on: n elements of which k are kept, ``ranks`` ranks."""

    def __init__(self, n: int, density: float, ranks: int, device: torch.device) -> None:
        self.n, self.k, self.ranks, self.device = n, quota(density, n), ranks, device
        self.words, self.codes = wire.bitmap_words(n), wire.elias_fano_words(self.k, n)
        self.layout = whole(n, device)
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, numel: int) -> Tensor:
        """(numel,) float32."""
        return torch.randn(numel, device=self.device, generator=self._generator)

    def index(self) -> Tensor:
        """(k,) int64: one position at random out of each of k equal shares of the vector."""
        start = torch.arange(self.k, device=self.device) * self.n // self.k
        return start + torch.randint(self.n // self.k, (self.k,), device=self.device, generator=self._generator)

    def bits(self, *shape: int) -> Tensor:
        """int32, all bits at random."""
        low, high = -(1 << 31), (1 << 31) - 1
        made = torch.randint(low, high, shape, dtype=torch.int32, device=self.device, generator=self._generator)
        made[..., -1] &= (1 << (self.n % 32 or 32)) - 1 if self.n % 32 else -1
        return made

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """To be written to."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def flags(self) -> Tensor:
        """Raised by nothing yet."""
        return torch.zeros(1, dtype=torch.uint8, device=self.device)


# ---- selection -------------------------------------------------------------------------------------------------------


def _selection(data: Data, selector: Selector, layout: Layout, *goals: Goal) -> Case:
    """Gradient + residual, the selection, and the next residual, which is what was not selected."""
    grad, residual, out, flags = data.normal(data.n), data.normal(data.n), data.normal(data.n), data.flags()
    quotas = [max(1, data.k // layout.blocks)] * layout.blocks

    def run(kernels: Kernels) -> None:
        choice = selector.start(kernels, grad, residual, out, layout, quotas[0], flags, Memo())
        for block, k in enumerate(quotas):
            index, value = choice.pick(block, k)
            kernels.deduct(choice.work, block, value)
            kernels.settle(choice.work, block, index)

    def by_torch() -> object:
        acc = grad + residual
        return torch.topk(acc.abs(), data.k)

    return Case(data.n, {"n": data.n}, {"n": 16}, run, by_torch, goals)


def _topk(data: Data) -> Case:
    fast = Goal("torch_ratio", 10, ">= 10x torch")
    return _selection(data, TopK(), data.layout, fast, Goal("of_copy", 1 / 1.5, "<= 1.5x floor"))


def _topk_blocks(data: Data) -> Case:
    return _selection(data, TopK(), dealt(data.n, data.ranks, data.device))


def _gaussiank(data: Data) -> Case:
    return _selection(data, GaussianK(), data.layout, Goal("of_copy", 1 / 1.3, "<= 1.3x floor"))


# ---- signs and bitmaps -----------------------------------------------------------------------------------------------


def _packing(data: Data, *, pack: bool, vote: bool) -> Case:
    x, rows, out, flags = data.normal(data.n), data.bits(data.ranks, data.words), data.empty(data.words), data.flags()

    def run(kernels: Kernels) -> None:
        if pack:
            kernels.pack_signs(x, "positive", 0, 0, rows[0], None, flags)
        if vote:
            kernels.vote(rows, None, "positive", 0, 0, out, None)

    moved: dict[str, float] = {"n": 4.0} if pack else {}
    moved["w"] = 4.0 * ((1 if pack else 0) + (data.ranks + 1 if vote else 0))
    goals = (Goal("of_copy", 0.7, ">= 70 % of copy"),) if pack and vote else ()
    return Case(data.n, {"n": data.n, "w": data.words}, moved, run, None, goals)


def _spread_signs(data: Data) -> Case:
    words, out = data.bits(data.words), data.normal(data.n)
    scale = torch.ones((), device=data.device)
    run = _calls(lambda kernels: kernels.spread_signs(words, None, scale, out))
    return Case(data.n, {"n": data.n, "w": data.words}, {"n": 4, "w": 4}, run)


def _absolute_sum(data: Data) -> Case:
    x = data.normal(data.n)
    return Case(data.n, {"n": data.n}, {"n": 4}, lambda kernels: kernels.absolute_sum(x))


def _unite(data: Data) -> Case:
    rows, out = data.bits(data.ranks, data.words), data.empty(data.words)
    moved = {"w": 4.0 * (data.ranks + 1)}
    return Case(data.words, {"w": data.words}, moved, lambda kernels: kernels.unite(rows, out))


def _prefix(data: Data) -> Case:
    words = data.bits(data.words)
    return Case(data.words, {"w": data.words}, {"w": 12}, lambda kernels: kernels.prefix(words))


def _rank(data: Data) -> Case:
    words, index = data.bits(data.words), data.index()
    before = torch.arange(data.words, device=data.device) * 16  # any numbers do
    return Case(data.k, {"k": data.k}, {"k": 28}, lambda kernels: kernels.rank(words, before, index))


# ---- codes -----------------------------------------------------------------------------------------------------------

QUICK = Goal("of_selection", 0.1, "<= 10 % of topk")


def _elias_fano_encode(data: Data) -> Case:
    index, out = data.index(), data.empty(data.codes)
    run = _calls(lambda kernels: kernels.elias_fano_encode(index, data.n, out))
    return Case(data.k, {"k": data.k, "e": data.codes}, {"k": 8, "e": 4}, run, None, (QUICK,), coded=True)


def _elias_fano_decode(data: Data, kernels: Kernels) -> Case:
    words, flags = data.empty(data.codes), data.flags()
    kernels.elias_fano_encode(data.index(), data.n, words)
    run = _calls(lambda kernels: kernels.elias_fano_decode(words, data.k, data.n, flags))
    return Case(data.k, {"k": data.k, "e": data.codes}, {"k": 8, "e": 4}, run, None, (QUICK,), coded=True)


def _rice_encode(data: Data) -> Case:
    index, out = data.index(), data.empty(wire.rice_words(data.k, data.n))
    run = _calls(lambda kernels: kernels.rice_encode(index, data.n, out))
    return Case(data.k, {"k": data.k, "e": out.numel()}, {"k": 8, "e": 4}, run, coded=True)


def _rice_decode(data: Data, kernels: Kernels) -> Case:
    out, flags = data.empty(wire.rice_words(data.k, data.n)), data.flags()
    words = out[: kernels.rice_encode(data.index(), data.n, out)]
    run = _calls(lambda kernels: kernels.rice_decode(words, data.k, data.n, flags))
    return Case(data.k, {"k": data.k, "e": words.numel()}, {"k": 8, "e": 4}, run, coded=True)


def _checksum(data: Data) -> Case:
    size = wire.HEADER_WORDS + data.codes + data.k
    words = data.bits(size)
    return Case(size, {"s": size}, {"s": 4}, lambda kernels: kernels.checksum(words))


# ---- sketches --------------------------------------------------------------------------------------------------------


def _sketch(data: Data) -> Case:
    key, value, table = data.index(), data.normal(data.k), data.empty(ROWS, data.k, dtype=torch.float32)
    run = _calls(lambda kernels: kernels.sketch(key, value, 1, SEED, table))
    return Case(data.k, {"k": data.k, "c": ROWS * data.k}, {"k": 12 + 8 * ROWS, "c": 4}, run)


def _estimate(data: Data, kernels: Kernels, how: Literal["median", "projection"]) -> Case:
    rows = ROWS if how == "median" else 1
    key, table, counts = data.index(), data.empty(rows, data.k, dtype=torch.float32), None
    kernels.sketch(key, data.normal(data.k), 1, SEED, table)
    if how == "projection":
        counts = data.empty(rows, data.k)
        kernels.occupancy(key, SEED, data.k, counts)
    run = _calls(lambda kernels: kernels.estimate(table, key, 1, SEED, counts, how))
    return Case(data.k, {"k": data.k}, {"k": 12 + 4 * rows * (1 if counts is None else 2)}, run)


def _peel(data: Data, kernels: Kernels) -> Case:
    """With the count of the buckets and with copies of both tables, which peeling uses up."""
    key, columns = data.index(), max(1, int(PEELED * data.k / ROWS))
    table, counts = data.empty(ROWS, columns), data.empty(ROWS, columns)
    kernels.sketch(key, torch.arange(data.k, dtype=torch.int32, device=data.device), 1, SEED, table)

    def run(kernels: Kernels) -> None:
        kernels.occupancy(key, SEED, columns, counts)
        kernels.peel(table.clone(), key, 1, SEED, counts)

    return Case(data.k, {"k": data.k, "c": ROWS * columns}, {"k": 13 + 24 * ROWS, "c": 12}, run)


# ---- values and sums -------------------------------------------------------------------------------------------------


def _quantize(data: Data) -> Case:
    value, scale = data.normal(data.k), data.empty(wire.scales(data.k), dtype=torch.uint8)
    code = data.empty(data.k, dtype=torch.int8)
    run = _calls(lambda kernels: kernels.quantize(value, scale, code, SEED))
    return Case(data.k, {"k": data.k}, {"k": 9 + 1 / wire.GROUP}, run)


def _narrow(data: Data) -> Case:
    value, out = data.normal(data.k), data.empty(data.k, dtype=torch.bfloat16)
    return Case(data.k, {"k": data.k}, {"k": 10}, lambda kernels: kernels.narrow(value, out))


def _gather(data: Data) -> Case:
    x, index = data.normal(data.n), data.index()
    return Case(data.k, {"k": data.k}, {"k": 16}, lambda kernels: kernels.gather(x, index, data.layout, 0))


def _add(data: Data) -> Case:
    x, index, value, flags = data.normal(data.n), data.index(), data.normal(data.k), data.flags()
    run = _calls(lambda kernels: kernels.add(x, index, value, data.layout, 0, flags))
    return Case(data.k, {"k": data.k}, {"k": 20}, run)


def _expand(data: Data) -> Case:
    out, index, value = data.normal(data.n), data.index(), data.normal(data.k)
    run = _calls(lambda kernels: kernels.expand(out, [index], [value], data.layout))
    return Case(data.n, {"n": data.n, "k": data.k}, {"n": 4, "k": 12}, run)


def _merge_sum(data: Data) -> Case:
    a, b = (Sparse(data.index(), data.normal(data.k), data.n) for _ in range(2))
    union = int(torch.cat([a.index, b.index]).unique().numel())
    run = _calls(lambda kernels: kernels.merge_sum(a, b))
    return Case(2 * data.k, {"k": data.k, "u": union}, {"k": 24, "u": 12}, run)


def _round_stochastic(data: Data) -> Case:
    x, out = data.normal(data.n), data.empty(data.n, dtype=torch.bfloat16)
    run = _calls(lambda kernels: kernels.round_stochastic(x, out, SEED))
    return Case(data.n, {"n": data.n}, {"n": 6}, run)


def _calls(run: Callable[[Kernels], Any]) -> Callable[[Kernels], object]:
    """Types the argument of a lambda."""
    return run


class Kind(NamedTuple):
    """How a case is made, and how many bytes of memory each of the n elements takes in it, PyTorch's way included."""

    make: Callable[[Data, Kernels], Case]
    room: int


def _kind(make: Callable[[Data], Case], room: int) -> Kind:
    """Of a case that no kernel prepares."""

    def made(data: Data, _kernels: Kernels) -> Case:
        return make(data)

    return Kind(made, room)


KINDS: Mapping[str, Kind] = {
    SELECTION: _kind(_topk, 40),
    "topk-blocks": _kind(_topk_blocks, 40),
    "gaussiank": _kind(_gaussiank, 40),
    "pack-signs": _kind(partial(_packing, pack=True, vote=False), 8),
    "vote": _kind(partial(_packing, pack=False, vote=True), 8),
    "pack-vote": _kind(partial(_packing, pack=True, vote=True), 8),
    "spread-signs": _kind(_spread_signs, 8),
    "absolute-sum": _kind(_absolute_sum, 8),
    "elias-fano-encode": _kind(_elias_fano_encode, 4),
    "elias-fano-decode": Kind(_elias_fano_decode, 4),
    "rice-encode": _kind(_rice_encode, 4),
    "rice-decode": Kind(_rice_decode, 4),
    "checksum": _kind(_checksum, 4),
    "sketch": _kind(_sketch, 4),
    "estimate-median": Kind(partial(_estimate, how="median"), 4),
    "estimate-projection": Kind(partial(_estimate, how="projection"), 4),
    "peel": Kind(_peel, 4),
    "quantize": _kind(_quantize, 4),
    "narrow": _kind(_narrow, 4),
    "gather": _kind(_gather, 8),
    "add": _kind(_add, 8),
    "expand": _kind(_expand, 8),
    "merge-sum": _kind(_merge_sum, 4),
    "unite": _kind(_unite, 4),
    "prefix": _kind(_prefix, 4),
    "rank": _kind(_rank, 4),
    "round-stochastic": _kind(_round_stochastic, 8),
}


def names() -> Sequence[str]:
    """Of all cases."""
    return tuple(KINDS)
