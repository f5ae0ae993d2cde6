"""The logger "sparcomm": every record says which rank wrote it, and what all ranks know is said once.

Records carry ``rank`` and ``size`` for formatters and filters, and ``[rank 2/8]`` in front of the text. What is the
same on all ranks goes through ``tell``: rank 0 says it at the level given, the others at DEBUG, so that a job of 512
ranks starts with three lines and not with 1,500. Handlers and levels are the application's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparcomm import __version__
from sparcomm.algorithms.base import Algorithm
from sparcomm.collectives.dense import dense_traffic
from sparcomm.ddp.units import Unit
from sparcomm.dtypes import working_dtype

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


LOOKS = (10, 1000)  # steps after which ``committed`` looks at how gradients have travelled

# Frames of logging's own count as callers before Python 3.11.
_BEYOND_TELL = 2 if sys.version_info >= (3, 11) else 3


class RankLogger(_Adapter):
    """The logger "sparcomm" for one rank of a group of ``size``."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(logging.getLogger("sparcomm"), {"rank": rank, "size": size})
        self.rank, self.size = rank, size

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Puts the rank in front of the text, and beside it."""
        kwargs["extra"] = {"rank": self.rank, "size": self.size, **(kwargs.get("extra") or {})}
        return f"[rank {self.rank}/{self.size}] {msg}", kwargs

    def tell(self, level: int, msg: str, *args: Any) -> None:
        """Logs what every rank knows: at ``level`` on rank 0, at DEBUG elsewhere."""
        self.log(level if self.rank == 0 else logging.DEBUG, msg, *args, stacklevel=_BEYOND_TELL)


def get_logger(rank: int, size: int) -> RankLogger:
    """The logger of one rank."""
    return RankLogger(rank, size)


def started(log: RankLogger, algorithm: Algorithm, parameters: Sequence[torch.Tensor]) -> None:
    """Says what will be done: algorithm, ranks, and how much there is to reduce, as far as it is known."""
    n = sum(p.numel() for p in parameters)
    what = f"{n:,} elements in {len(parameters)} parameters" if parameters else "parameters not known yet"
    log.tell(logging.INFO, "sparcomm %s: %r over %d ranks, %s", __version__, algorithm, log.size, what)


def units_made(log: RankLogger, step: int, units: Iterable[Unit]) -> None:
    """Says how the gradient was cut, and what a step will send: once the units are final."""
    made = [u for u in units if u.numel]
    sizes = [u.numel for u in made]
    ours = sum(u.algorithm.cost(u.numel, u.dtype, log.size, u.state).bytes_sent for u in made)
    dense = sum(dense_traffic(u.numel, u.dtype.itemsize, log.size)[2] for u in made)
    log.tell(
        logging.INFO,
        "step %d: %d units of %s elements; a step sends at most %s a rank, %.1fx less than dense",
        step, len(made), _span(sizes), _human(ours), dense / ours if ours else 1.0,
    )  # fmt: skip


def committed(log: RankLogger, step: int, units: Iterable[Unit]) -> None:
    """Warns, in two steps of a run, where an algorithm that leaves out zeros finds too few of them in most elements."""
    if step not in LOOKS:
        return
    natural = [u for u in units if u.numel and getattr(u.algorithm, "density", 0) is None]
    full = [u for u in natural if u.algorithm.cost(u.numel, u.dtype, log.size, u.state) == _dense(u, log.size)]
    much = sum(u.numel for u in full)
    if 2 * much > sum(u.numel for u in natural):
        log.tell(
            logging.WARNING,
            "step %d: %s elements travel densely: %s without a density leaves out zeros only, and too few of these are "
            "zero; give it a density, or use another algorithm",
            step, f"{much:,}", full[0].algorithm.name,
        )  # fmt: skip


def warmed_up(log: RankLogger, step: int, density: float | None = None) -> None:
    """Says that the warm-up has ended."""
    now = "" if density is None else f", at density {density:g}"
    log.tell(logging.INFO, "step %d: the warm-up is over, gradients travel compressed from here%s", step, now)


def switched(log: RankLogger, step: int, compressed: float, dense: float, *, off: bool) -> None:
    """Says what ``auto_off`` has found (seconds a step, both ways) and decided."""
    verdict = "compression does not pay on this link: dense from here" if off else "compression pays, and stays on"
    text = "step %d: %s (%.2f ms a step compressed, %.2f ms dense)"
    # A warning if it is off: whoever has configured compression wants to know, whatever the level.
    log.tell(logging.WARNING if off else logging.INFO, text, step, verdict, 1e3 * compressed, 1e3 * dense)


def _dense(unit: Unit, size: int) -> tuple[int, int, int]:
    """What the dense all-reduce of a unit costs."""
    return dense_traffic(unit.numel, working_dtype(unit.dtype).itemsize, size)


def _span(sizes: Sequence[int]) -> str:
    if not sizes:
        return "no"
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _human(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
