"""Error feedback's sum."""

from __future__ import annotations

import torch

from sparcomm import wire
from sparcomm.layout import dealt
from sparcomm.memory import compensate, compensated


def test_compensate_adds_and_counts() -> None:
    grad, residual = torch.randn(300, dtype=torch.bfloat16), torch.randn(300)
    out, flags = torch.full((300,), float("nan")), torch.zeros(1, dtype=torch.uint8)
    stats = compensate(grad, residual, out, dealt(300, 3), flags)
    assert torch.equal(out, compensated(grad, residual))
    assert torch.equal(out, grad.float() + residual)
    assert stats.shape == (3, wire.BINS)
    assert int(stats.sum()) == 300
    assert not flags.any()


def test_compensated_without_residual_is_the_gradient_itself() -> None:
    grad = torch.ones(3)
    assert compensated(grad, None) is grad
