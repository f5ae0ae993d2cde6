"""One call that starts a job's process group under whatever launcher has started its ranks."""

from __future__ import annotations

from sparcomm.launch.choose import BACKENDS, Plan, plan
from sparcomm.launch.environment import Found, detect
from sparcomm.launch.start import TIMEOUT, Launch, init

__all__ = ["BACKENDS", "TIMEOUT", "Found", "Launch", "Plan", "detect", "init", "plan"]
