"""Error feedback's sum."""

from __future__ import annotations

import torch

from sparcomm.memory import compensated


def test_compensated_adds_in_the_working_dtype() -> None:
    grad, residual = torch.randn(300, dtype=torch.bfloat16), torch.randn(300)
    assert torch.equal(compensated(grad, residual), grad.float() + residual)


def test_compensated_without_residual_is_the_gradient_itself() -> None:
    grad = torch.ones(3)
    assert compensated(grad, None) is grad
