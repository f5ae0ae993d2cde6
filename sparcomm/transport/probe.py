"""How fast a link is: what a few messages take, so that an algorithm can choose its schedule by it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

PROBES = 5  # messages of each size
SMALL, LARGE = 64, 1 << 20  # their bytes


def probe(exchange: Callable[[Tensor, Tensor], None], device: torch.device) -> tuple[float, float]:
    """(seconds of a short message, further seconds per byte), medians.

    Args:
        exchange: sends its first argument to one peer while receiving its second from another.
        device: where to make the messages.
    """
    short, long = (_seconds(exchange, size, device) for size in (SMALL, LARGE))
    return short, max(long - short, 1e-9) / (LARGE - SMALL)


def _seconds(exchange: Callable[[Tensor, Tensor], None], size: int, device: torch.device) -> float:
    send, recv = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds: list[float] = []
    for _ in range(PROBES + 1):  # the first one makes the connection
        start = time.perf_counter()
        exchange(send, recv)
        recv[:1].cpu()  # on a device, until it has arrived
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
