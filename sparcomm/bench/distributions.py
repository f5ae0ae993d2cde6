"""What the selection benchmark selects from: bell-shaped and heavy-tailed values, hard cases, recorded gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparcomm.errors import ConfigError

Draw = Callable[[int, int], Tensor]


def known() -> dict[str, Draw]:
    """By name, a function of (n, seed) that gives (n,) float32."""
    return {
        "normal": _normal,
        "laplace": lambda n, seed: _uniform(n, seed).log_().neg_() * _sign(n, seed),
        "student3": _student3,
        "lognormal": lambda n, seed: _normal(n, seed).mul_(1.5).exp_() * _sign(n, seed),
        "constant": lambda n, _: torch.ones(n),
        "spike": _spike,
        "zeros": lambda n, _: torch.zeros(n),
        "denormal": lambda n, seed: (_normal(n, seed).double() * 1e-42).float(),
        "nan": _nan,
    }


def recorded(folder: Path) -> dict[str, Draw]:
    """The gradients that a run recorded, by the name of their file; their length is their own, whatever n.

    Raises:
        ConfigError: no such folder, no gradients in it, or a file that holds something else.
    """
    found: dict[str, Draw] = {}
    for path in sorted(folder.glob("*.pt")):
        try:
            value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the unpickler met
            raise ConfigError(f"--recorded: {path} cannot be read ({type(error).__name__}: {error})") from error
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() != 1 or not value.numel():
            raise ConfigError(f"--recorded: {path} must hold a flat float32 tensor of at least one element")
        found[path.stem] = functools.partial(_recorded, value)
    if not found:
        raise ConfigError(f"--recorded {folder}: must be a folder with *.pt files, as record_gradients writes them")
    return found


def _recorded(value: Tensor, _n: int, _seed: int) -> Tensor:
    return value


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 8) + stream)


def _normal(n: int, seed: int, stream: int = 0) -> Tensor:
    return torch.randn(n, generator=_generator(seed, stream))


def _uniform(n: int, seed: int) -> Tensor:
    """In (0, 1]."""
    return 1 - torch.rand(n, generator=_generator(seed, 0))


def _sign(n: int, seed: int) -> Tensor:
    return _normal(n, seed, 4).sign_()


def _student3(n: int, seed: int) -> Tensor:
    """Student's t with three degrees of freedom: its fourth moment is infinite."""
    square = sum((_normal(n, seed, stream).square_() for stream in (1, 2, 3)), torch.zeros(n))
    return _normal(n, seed).div_(square.div_(3).sqrt_())


def _spike(n: int, seed: int) -> Tensor:
    """Normal, with one element so large that deviation says nothing of the others."""
    x = _normal(n, seed)
    x[n // 2] = 1e6
    return x


def _nan(n: int, seed: int) -> Tensor:
    """Normal, with one NaN in a thousand."""
    x = _normal(n, seed)
    x[::1000] = torch.nan
    return x
