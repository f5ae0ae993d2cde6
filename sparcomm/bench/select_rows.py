"""What one row of the selection benchmark measures: time, entries, energy, and passes over the vector."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sparcomm.kernels import Kernels, kernels_for
from sparcomm.kernels.interface import Working
from sparcomm.layout import whole
from sparcomm.selectors import Memo, Selector
from sparcomm.selectors.gaussiank import GaussianK

TORCH = "torch"


class Row(NamedTuple):
    """One selector on one vector.

    Attributes:
        selector: its text, or TORCH for ``torch.abs(x, out=buffer)`` + ``torch.topk(buffer, k)``.
        distribution, numel, density, k: what it was asked for, of what.
        seconds: CPU time of the fastest run; ``ratio``: torch's over it.
        passes: how often it went through all n elements; None = unknown (torch).
        count: entries picked.
        energy: sum of their squares over that of the k largest; None where that is not finite.
        identical: whether they are exactly the k largest, ties to the lowest position.
    """

    selector: str
    distribution: str
    numel: int
    density: float
    k: int
    seconds: float
    ratio: float
    passes: int | None
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    energy: float | None
    identical: bool


class Vector:
    """A vector to select from, and what is right: its order by magnitude.

    Args:
        name: of the distribution.
        x: (n,) float32.
        earlier: another one of the same kind, of an earlier step, from which a threshold is reused; may be ``x``.
    """

    def __init__(self, name: str, x: Tensor, earlier: Tensor) -> None:
        self.name, self.x, self.earlier = name, x, earlier
        self.buffer = torch.empty_like(x)
        # torch.topk leaves ties open, a stable sort does not. NaN comes first, as in the kernels.
        self.order = x.abs().sort(descending=True, stable=True).indices

    def torch_row(self, density: float, repeat: int) -> Row:
        """The row of torch itself."""
        x, k = self.x, quota(density, self.x.numel())
        found: list[Tensor] = []

        def run() -> None:
            found[:] = [torch.topk(torch.abs(x, out=self.buffer), k).indices]

        seconds = best(repeat, run)
        return self._row(TORCH, density, k, seconds, seconds, None, found[0].sort().values)

    def row(self, selector: Selector, density: float, repeat: int, baseline: Row) -> Row:
        """A selector, beside torch's row at the same density."""
        x, k, memo = self.x, baseline.k, Memo()
        selector(self.earlier, k, memo)
        before = Memo.from_state(memo.state())
        picked = selector(x, k, memo)
        passes = count_passes(selector, x, k, before)
        seconds = best(repeat, lambda: selector(x, k, memo))
        return self._row(str(selector), density, k, seconds, baseline.seconds, passes, picked.index)

    def _row(
        self, name: str, density: float, k: int, seconds: float, baseline: float, passes: int | None, index: Tensor
    ) -> Row:
        top = self.order[:k].sort().values
        least, got = (float(self.x[i].double().square().sum()) for i in (top, index))
        energy = None if not math.isfinite(least) else got / least if least else 1.0
        ratio = baseline / max(seconds, 1e-9)
        return Row(
            name, self.name, self.x.numel(), density, k, seconds, ratio, passes, index.numel(), energy,
            torch.equal(index, top),
        )  # fmt: skip


def quota(density: float, n: int) -> int:
    """How many of n: k."""
    return max(1, round(density * n))


def best(repeat: int, run: Callable[[], object]) -> float:
    """CPU seconds of this thread in the fastest of ``repeat`` runs, after one that is not counted."""
    run()
    seconds: list[float] = []
    for _ in range(repeat):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def count_passes(selector: Selector, x: Tensor, k: int, memo: Memo) -> int:
    """How often picking k of x goes through all of its elements; ``memo`` is changed.

    Counted are: the pass that makes the list of what may be picked; a look for NaN and infinities where so many reach
    the floor that there is no list; a count or a selection below the list's floor, whose answer is not in the list (the
    k largest take two passes: a histogram, and what lies in its upper bins); and torch's mean and deviation.
    """
    counted, one = _Counted(kernels_for(x)), whole(x.numel())
    flags = torch.zeros(1, dtype=torch.uint8)
    again = isinstance(selector, GaussianK) and memo.fits(one, k, selector.reestimate_every)
    selector.start(cast(Kernels, counted), x, None, None, one, k, flags, memo).pick(0, k)
    moments = isinstance(selector, GaussianK) and not selector.guard and not again
    return counted.passes + moments


class _Counted:
    """The CPU kernels, counting passes of what selectors call; one block."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, self.passes = kernels, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def survey(self, *arguments: Any) -> Working:
        work: Any = self._kernels.survey(*arguments)
        self.passes += 1 + int(work.floor[0] == np.iinfo(work.floor.dtype).max)
        return work

    def count_above(self, work: Any, block: int, threshold: float) -> int:
        self.passes += not _is_listed(work, threshold)
        return self._kernels.count_above(work, block, threshold)

    def above(self, work: Any, block: int, threshold: float, k: int) -> tuple[Tensor, Tensor]:
        self.passes += not _is_listed(work, threshold)
        return self._kernels.above(work, block, threshold, k)

    def select(self, work: Any, block: int, k: int) -> tuple[Tensor, Tensor]:
        magnitude = work.blocks[block].value.view(work.floor.dtype) & np.iinfo(work.floor.dtype).max
        listed = int((magnitude >= work.floor[block]).sum()) >= k or work.floor[block] <= 1
        self.passes += 0 if listed or k >= work.layout.numel else 2
        return self._kernels.select(work, block, k)


def _is_listed(work: Any, threshold: float) -> bool:
    """Whether all that exceeds a threshold is in the list."""
    return bool(work.floor[0] <= np.array(threshold, work.x.dtype).view(work.floor.dtype) + 1)
