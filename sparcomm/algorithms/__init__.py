"""The all-reduce algorithms, one a file. A file put here is found, named in configurations and swept by the tests."""

from __future__ import annotations

from sparcomm.algorithms.base import Algorithm, Cost, Part, Reduced, State, registry, write_out

__all__ = ["Algorithm", "Cost", "Part", "Reduced", "State", "registry", "write_out"]
