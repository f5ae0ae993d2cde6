"""Densities: how many entries of n are kept."""

from __future__ import annotations

from sparcomm.errors import ConfigError


def check_density(density: object) -> None:
    """Raises ConfigError unless ``density`` is a number in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density={density!r}: must be a number above 0 and at most 1 (0.01 keeps one entry in 100)")


def quota(density: float, n: int) -> int:
    """k: entries kept of n >= 1, at least one: max(1, round(density n)), halves to even."""
    return min(n, max(1, round(density * n)))


def block_quota(density: float, n: int, blocks: int, length: int) -> int:
    """k_b: entries that each of ``blocks`` blocks of ``length`` positions keeps; the whole block at density 1."""
    if density == 1:
        return length
    return min(length, max(1, round(quota(density, n) / blocks)))
