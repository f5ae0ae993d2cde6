"""How long something takes on a device, how fast that device copies, and how much memory it has left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

WARM = 3  # runs before the timed ones on CUDA, where the first ones compile, allocate and raise the clock rate
MEMINFO = Path("/proc/meminfo")


class Time(NamedTuple):
    """Median seconds of a run, and of the host until it went on (on a CPU the same)."""

    seconds: float
    host: float


def timed(run: Callable[[], object], repeat: int, device: torch.device, warm: int | None = None) -> Time:
    """Median of ``repeat`` runs after ``warm`` others: by CUDA events on CUDA, else by the clock on the wall.

    On CUDA the runs are enqueued one after the other with no wait in between, as in a training step: where the host is
    slower than the device, it is the host's time that is found.
    """
    for _ in range((WARM if device.type == "cuda" else 1) if warm is None else warm):
        run()
    if device.type == "cuda":
        return _by_events(run, repeat, device)
    seconds: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    found = max(statistics.median(seconds), 1e-9)
    return Time(found, found)


def _by_events(run: Callable[[], object], repeat: int, device: torch.device) -> Time:
    with torch.cuda.device(device):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        torch.cuda.synchronize(device)
        host: list[float] = []
        for before, after in events:
            start = time.perf_counter()
            before.record()
            run()
            after.record()
            host.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    found = statistics.median(before.elapsed_time(after) for before, after in events) / 1e3
    return Time(max(found, 1e-9), max(statistics.median(host), 1e-9))


def waits(run: Callable[[], object], device: torch.device) -> bool | None:
    """Whether the host waits for the device in a run, as far as PyTorch notices; None where there is none."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def copy_rate(numel: int, repeat: int, device: torch.device) -> float:
    """Bytes per second, read and written, at which ``numel`` float32 are copied within the device's memory."""
    source = torch.zeros(numel, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 8 * numel / timed(lambda: target.copy_(source), repeat, device).seconds


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had; infinity where nothing tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    if MEMINFO.is_file():
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def device_name(device: torch.device) -> str:
    """What to call it in a title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
