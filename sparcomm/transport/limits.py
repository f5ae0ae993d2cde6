"""How long a wait may take."""

from __future__ import annotations

from datetime import timedelta

from sparcomm.errors import ConfigError

SHORTEST, LONGEST = 0.001, 365 * 86400  # seconds: backends count whole milliseconds, and overflow at infinity


def as_timedelta(timeout: object) -> timedelta:
    """Seconds or timedelta; raises ConfigError unless it is a time that every backend can count."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not SHORTEST <= seconds <= LONGEST:
        raise ConfigError(f"timeout={timeout!r}: must be a timedelta or seconds, from {SHORTEST} to {LONGEST}")
    return timedelta(seconds=seconds)
