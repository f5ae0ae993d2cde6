"""``sparcomm doctor``: what this machine has, what is missing for what, and whether the parts work together."""

from __future__ import annotations

from sparcomm.doctor.facts import facts
from sparcomm.doctor.missing import missing
from sparcomm.doctor.selftest import Check, self_tests

__all__ = ["Check", "facts", "missing", "self_tests"]
