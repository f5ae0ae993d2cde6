"""Optimizers for gradients that come late, and optimizers that communicate themselves."""

from __future__ import annotations

from sparcomm.optim.adamw import AdamW
from sparcomm.optim.lion import DistributedLion
from sparcomm.optim.onebit import OneBitAdam
from sparcomm.optim.signs import SignSGD, Signum

__all__ = ["AdamW", "DistributedLion", "OneBitAdam", "SignSGD", "Signum"]
