"""Rules for parameters that always travel dense: biases, norms, by name, by size, or by any callable."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from sparcomm.errors import ConfigError

Rule = str | int | Callable[[str, Tensor], bool]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def as_rules(skip: Any) -> tuple[Rule, ...]:
    """What ``attach`` takes as ``skip``, as a tuple. Raises ConfigError for anything else."""
    rules = tuple(cast("Sequence[Any]", skip)) if isinstance(skip, (list, tuple, set, frozenset)) else (skip,)
    for rule in rules:
        fine = callable(rule) or isinstance(rule, str) or (isinstance(rule, int) and not isinstance(rule, bool))
        if not fine or (isinstance(rule, int) and rule < 0):
            raise ConfigError(
                f"skip={rule!r}: must be 'biases', 'norms', a pattern of parameter names such as '*.embed.*', a number "
                "of elements below which a parameter is skipped, a callable(name, parameter), or several of these"
            )
    return rules


def skipped(rules: Sequence[Rule], params: Mapping[str, Tensor], module: nn.Module | None) -> set[str]:
    """Names of the parameters that any rule names.

    Args:
        rules: from ``as_rules``.
        params: those that are reduced, by name.
        module: whose names these are; tells which parameters are a norm's.

    Raises:
        ConfigError: a pattern that names no parameter at all, most likely a typing error.
    """
    norms = set(_norm_parameters(module))
    found: set[str] = set()
    for rule in rules:
        if rule == "biases":
            found |= {name for name in params if name.rpartition(".")[2] == "bias"}
        elif rule == "norms":
            found |= norms & params.keys()
        elif isinstance(rule, str):
            named = set(fnmatch.filter(params, rule))
            if not named:
                raise ConfigError(f"skip={rule!r} names no parameter; there are {', '.join(list(params)[:8])}, ...")
            found |= named
        elif isinstance(rule, int):
            found |= {name for name, p in params.items() if p.numel() < rule}
        else:
            found |= {name for name, p in params.items() if rule(name, p)}
    return found


def describe(rules: Sequence[Rule]) -> str:
    """As text that is the same in every process."""
    return ", ".join(getattr(r, "__qualname__", type(r).__name__) if callable(r) else repr(r) for r in rules)


def _norm_parameters(module: nn.Module | None) -> list[str]:
    if module is None:
        return []
    names: list[str] = []
    for prefix, child in module.named_modules():
        if isinstance(child, _NORMS) or type(child).__name__.endswith("Norm"):  # RMSNorm, and people's own
            names += [f"{prefix}.{name}".lstrip(".") for name, _ in child.named_parameters(recurse=False)]
    return [name.replace("_orig_mod.", "") for name in names]
