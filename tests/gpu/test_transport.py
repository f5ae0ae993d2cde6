"""Transports that carry CUDA tensors: Gloo through page-locked host memory."""

from __future__ import annotations

import pytest
import torch

from sparcomm.transport.torchdist import TorchTransport
from support.devices import conform, start
from support.pool import pool

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [1, 2, 3])
def test_conformance(size: int) -> None:
    pool(size).run(conform, "cuda", timeout=110)


def staged(rank: int, size: int) -> bool:
    """Messages one behind the other through the same host buffers, while the stream is kept busy."""
    device, _ = start("cuda", "gloo")
    t = TorchTransport.from_group(timeout=20)
    work, n = torch.randn(2048, 2048, device=device), 1 << 20
    got = [torch.empty(n, device=device) for _ in range(8)]
    for i, out in enumerate(got):
        for _ in range(5):
            work = (work @ work).clamp_(-1, 1)
        # What is sent is written behind that work, and so is what came.
        mine = torch.full((n,), float(100 * rank + i), device=device) + 0 * work[0, 0]
        t.exchange(mine, (rank + 1) % size, out, (rank - 1) % size)
        mine.fill_(-1)
    pinned = all(b.is_pinned() for b in t._staging.buffers.values())
    want = [100.0 * ((rank - 1) % size) + i for i in range(8)]
    right = [float(x.min()) == float(x.max()) == w for x, w in zip(got, want, strict=True)]
    t.close()
    return pinned and all(right)


def test_messages_that_follow_each_other_do_not_mix() -> None:
    assert all(pool(2).run(staged, timeout=110))
