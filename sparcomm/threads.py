"""How many threads a loop over a large vector may use: torch's number, or one where ranks are threads themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Here(threading.local):
    serial = False


_here = _Here()


@contextmanager
def serial() -> Iterator[None]:
    """Within it, loops that this thread runs use no other threads: its neighbours keep the other cores busy."""
    before, _here.serial = _here.serial, True
    try:
        yield
    finally:
        _here.serial = before


def allowed() -> int:
    """Threads that a loop may use, the calling one included: ``torch.get_num_threads()``, or 1 within ``serial``."""
    return 1 if _here.serial else torch.get_num_threads()
