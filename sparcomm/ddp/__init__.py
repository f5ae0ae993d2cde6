"""The DDP communication hook: one line that turns a DistributedDataParallel job into one that sends less."""

from __future__ import annotations

from sparcomm.ddp.attach import attach
from sparcomm.ddp.distcp import load_distributed
from sparcomm.ddp.hook import hook
from sparcomm.ddp.local import keep_local
from sparcomm.ddp.state import HookState

__all__ = ["HookState", "attach", "hook", "keep_local", "load_distributed"]
