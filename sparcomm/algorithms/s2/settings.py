"""What an ``S2Reducer`` may be configured to do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparcomm.density import check_density
from sparcomm.errors import ConfigError

if TYPE_CHECKING:
    from sparcomm.algorithms.s2 import S2Reducer

DECODERS = ("auto", "compact", "peel", "projection", "mean", "median")
EXACT = ("auto", "compact", "peel")


def check(s: S2Reducer) -> None:
    """Raises ConfigError for a setting, or several together, that cannot be."""
    if s.decoder not in DECODERS:
        raise ConfigError(f"decoder={s.decoder!r}: must be one of {', '.join(map(repr, DECODERS))}")
    if s.density is not None:
        try:
            check_density(s.density)
        except ConfigError as error:
            raise ConfigError(f"{error}, or None for all that is not zero") from error
    elif s.selector != "topk":
        raise ConfigError(f"selector={s.selector!r}: chooses nothing without a density")
    _check_whole("granularity", s.granularity)
    for name in ("adaptive", "allow_sync"):
        _check_bool(name, getattr(s, name))
    if s.error_feedback is not None:
        _check_bool("error_feedback", s.error_feedback)
    seed: Any = s.fixed_seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32):
        raise ConfigError(f"fixed_seed={seed!r}: must be None or from 0 to 4294967295")
    _check_table(s)
    _check_union(s)
    _check_link(s)
    if s.decoder == "median" and s.table_rows > 1 and s.error_feedback:
        raise ConfigError(
            f"error_feedback=True with decoder='median' and rows={s.rows}: a median of several rows is not linear, so "
            "that what ranks keep would not be what is missing; use 'projection', 'mean' or rows=1"
        )


def _check_table(s: S2Reducer) -> None:
    if s.rows is not None:
        _check_whole("rows", s.rows)
        if s.decoder in EXACT and (s.decoder, s.rows) != ("peel", 3):
            raise ConfigError(f"rows={s.rows}: with decoder={s.decoder!r} there is no choice; leave it out")
    if s.ratio is not None:
        _check_number("ratio", s.ratio)
        if s.decoder == "compact":
            raise ConfigError(f"ratio={s.ratio!r}: decoder='compact' has no table")


def _check_union(s: S2Reducer) -> None:
    if s.adaptive:
        if s.union is not None:
            raise ConfigError(f"union={s.union!r}: is only looked at with adaptive=False")
        return
    if s.decoder in ("auto", "compact"):
        raise ConfigError(f"adaptive=False: decoder={s.decoder!r} follows the union whatever it is; leave it out")
    if s.union is not None:
        _check_number("union", s.union)
        if s.union > 1:
            raise ConfigError(f"union={s.union!r}: a share of all keys, must be above 0 and at most 1")
    elif s.density is None:
        raise ConfigError("adaptive=False without a density: say by union=... how many keys the table is for")


def _check_link(s: S2Reducer) -> None:
    for name in ("latency", "bandwidth"):
        given: Any = getattr(s, name)
        if given is None:
            continue
        if s.decoder != "auto":
            raise ConfigError(f"{name}={given!r}: is only looked at with decoder='auto'")
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
            raise ConfigError(f"{name}={given!r}: must be a number of at least 0")
    if (s.latency is None) != (s.bandwidth is None) or s.bandwidth == 0:
        raise ConfigError(f"latency={s.latency!r}, bandwidth={s.bandwidth!r}: give both (above 0 bytes/s) or none")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True or False")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r}: must be a finite number above 0")
