"""The CUDA text of ``csrc/``: where it lies, and for which dtypes each part is compiled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from sparcomm.dtypes import WIRE_DTYPES

Types = Mapping[str, torch.dtype]  # macro of the text -> dtype

_SINGLE, _DOUBLE = torch.float32, torch.float64
_WORKING = (_SINGLE, _DOUBLE)
_GRADIENTS = ((_SINGLE, _SINGLE), (torch.float16, _SINGLE), (torch.bfloat16, _SINGLE), (_DOUBLE, _DOUBLE))

# By text all combinations of dtypes that it is compiled for.
TEXTS: dict[str, list[Types]] = {
    "bitmap": [{}],
    "code": [{}],
    "compensate": [{"GRAD": grad, "WORK": work} for grad, work in _GRADIENTS],
    "gauss": [{"WORK": work} for work in _WORKING],
    "narrow": [{"WORK": work, "WIRE": short} for work in _WORKING for short in WIRE_DTYPES.values()],
    "quantize": [{"WORK": work} for work in _WORKING],
    "scatter": [{"OUT": grad, "WORK": work} for grad, work in _GRADIENTS],
    "select": [{"WORK": work} for work in _WORKING],
    "signs": [{"GRAD": grad, "WORK": work} for grad, work in _GRADIENTS],
    "sketch": [{"VALUE": value} for value in _WORKING],
    "sparse": [{"WORK": work} for work in _WORKING],
    "sums": [{"WORK": work} for work in _WORKING],
    "support": [{"GRAD": grad} for grad, _ in _GRADIENTS],
    "vote": [{}],
}
C_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "half16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int",
}
# Results equal those of other devices to the bit: no contraction of a * b + c, no flushing of subnormals.
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")


@functools.cache
def folder() -> Path:
    """Where the texts lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


@functools.cache
def source(text: str) -> str:
    """One text with what it includes, so that a compiler needs no file beside it."""
    included = '#include "common.cuh"\n'
    common, own = ((folder() / name).read_text(encoding="utf-8") for name in ("common.cuh", f"{text}.cu"))
    return own.replace(included, common.replace("#pragma once\n", ""))


def macros(types: Types) -> tuple[str, ...]:
    """Compiler options that make a text one for these dtypes."""
    return tuple(f"-D{name}={C_NAMES[dtype]}" for name, dtype in sorted(types.items()))


def variants() -> list[tuple[str, Types]]:
    """All texts with all combinations of dtypes."""
    return list(itertools.chain.from_iterable([(text, types) for types in every] for text, every in TEXTS.items()))
