"""What is measured, from what was typed: ``spardl:schedule=direct``, ``torch:powersgd:rank=2``, ``my.module.Class``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from sparcomm.algorithms import Algorithm, registry
from sparcomm.algorithms.dense import Dense
from sparcomm.codecs.packet import check_values
from sparcomm.config import algorithm_from_config, algorithm_suggestion, settings, suggestion, word
from sparcomm.errors import ConfigError

TORCH = ("dense", "fp16", "bf16", "powersgd")
SHARED = ("density", "values", "schedule")


@dataclass(frozen=True)
class Entry:
    """One row of the bench.

    Attributes:
        typed: as the user wrote it.
        algorithm: ours, or None.
        hook: the name of PyTorch's own hook, or "".
        rank: PowerSGD's.
    """

    typed: str
    algorithm: Algorithm | None = None
    hook: str = ""
    rank: int = 1


def parse(typed: str, density: float, values: str | None, schedule: str | None) -> Entry:
    """The entry of one name with its options. Raises ConfigError, listing what there is.

    Args:
        typed: ``NAME[:FIELD=VALUE]...``.
        density, values, schedule: given to algorithms that have such a field, unless ``typed`` sets it; None = theirs.
    """
    name, *rest = typed.split(":")
    if name == "torch":
        return _hook(typed, rest)
    options = _options(typed, rest)
    if name == "dense":
        return Entry(typed, algorithm_from_config({"name": "dense", "native": True, **options}))
    if name == "ordered":
        if options:
            raise ConfigError(f"{typed!r}: 'ordered' has no options")
        return Entry(typed, Dense())
    shared = {"density": density, "values": values, "schedule": schedule}
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        return Entry(typed, _imported(name, options, shared))
    if name not in registry():
        others = ["ordered", *(f"torch:{hook}" for hook in TORCH)]
        hint = "; options follow a colon, as in spardl:values=bfloat16"
        hint = hint if set(name) & set("=( ") else algorithm_suggestion(name, others)
        known = ", ".join(map(repr, [*registry(), *others]))
        raise ConfigError(f"unknown algorithm {name!r}{hint}: must be one of {known}")
    return Entry(typed, algorithm_from_config({"name": name, **_fitting(registry()[name], shared), **options}))


def split(typed: str) -> list[str]:
    """The entries of a list that commas separate, other than those within parentheses."""
    found, depth = [""], 0
    for letter in typed:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += letter
    return [entry.strip() for entry in found]


def check_shared(values: str | None, schedule: str | None) -> None:
    """Raises ConfigError for a value that no algorithm takes, whichever algorithms are measured."""
    if values is not None:
        check_values(values)
    allowed = {a for cls in registry().values() for s in settings(cls) if s.name == "schedule" for a in s.allowed}
    if schedule is not None and schedule not in allowed:
        listed = ", ".join(map(repr, sorted(allowed)))
        raise ConfigError(f"--schedule {schedule!r}{suggestion(schedule, allowed)}: must be one of {listed}")


def _options(typed: str, parts: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"{typed!r}: {part!r} must be FIELD=VALUE")
        if key in options:
            raise ConfigError(f"{typed!r}: {key!r} is given twice")
        options[key] = word(text)
    return options


def _fitting(cls: type[Algorithm], shared: dict[str, Any]) -> dict[str, Any]:
    """Those of the shared options that the class has a field for, or the algorithms that are its fields."""
    found: dict[str, Any] = {}
    for s in settings(cls):
        if s.name in shared and shared[s.name] is not None:
            found[s.name] = shared[s.name]
        elif isinstance(s.default, Algorithm) and (inside := _fitting(type(s.default), shared)):
            found[s.name] = dataclasses.replace(s.default, **inside)
    return found


def _hook(typed: str, rest: list[str]) -> Entry:
    name = rest[0] if rest else ""
    if name not in TORCH:
        known = [f"torch:{hook}" for hook in TORCH]
        raise ConfigError(f"{typed!r}{suggestion(typed, known)}: must be one of {', '.join(map(repr, known))}")
    options = _options(typed, rest[1:])
    if set(options) - ({"rank"} if name == "powersgd" else set()):
        raise ConfigError(f"{typed!r}: torch:powersgd takes rank=R, the other torch hooks take no options")
    rank = options.get("rank", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{typed!r}: rank={rank!r} must be an integer of at least 1")
    return Entry(typed, hook=name, rank=rank)


def _imported(name: str, options: dict[str, Any], shared: dict[str, Any]) -> Algorithm:
    """An algorithm from outside the package."""
    module, _, attribute = name.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Algorithm) and not inspect.isabstract(cls)):
        raise ConfigError(f"{name!r} must be a subclass of sparcomm.algorithms.Algorithm")
    known = [s.name for s in settings(cls)]
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{suggestion(key, known)} for {name!r}: it takes {known}")
    try:
        return cls(**{**_fitting(cls, shared), **options})
    except TypeError as error:
        raise ConfigError(f"{name!r}: {error}") from error
