"""Optimizers for gradients that do not come as DDP's own mean."""

from __future__ import annotations

from sparcomm.optim.adamw import AdamW

__all__ = ["AdamW"]
