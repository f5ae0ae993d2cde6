"""The all-reduce algorithms, one a file. A file put here is found, named in configurations and swept by the tests."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from sparcomm.algorithms.base import Algorithm, Cost, Part, Reduced, State, write_out

__all__ = ["Algorithm", "Cost", "Part", "Reduced", "State", "registry", "write_out"]


def registry() -> dict[str, type[Algorithm]]:
    """Every algorithm by its name, sorted."""
    found: dict[str, type[Algorithm]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Algorithm) and not inspect.isabstract(cls):
                found[cls.name] = cls
    return dict(sorted(found.items()))
