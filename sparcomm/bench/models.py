"""Small models to time training steps of, with made-up data: what they learn does not matter, what they cost does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
SYMBOLS, CONTEXT = 96, 64


class Task(NamedTuple):
    """A model, and what to feed it.

    Attributes:
        batch: examples per rank and step, unless asked otherwise.
        data: (generator, examples) to inputs and integer targets.
    """

    model: Callable[[], nn.Module]
    batch: int
    data: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]


def mlp() -> nn.Module:
    """Five layers, 1,024 wide: 4.2 million parameters, few operations for each."""
    body = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(1024, CLASSES))


def conv() -> nn.Module:
    """Six 3x3 convolutions on 32 x 32 pixels: 1.1 million parameters, many operations for each."""
    layers: list[nn.Module] = []
    inside = 3
    for outside, stride in ((32, 1), (64, 2), (128, 2), (128, 1), (256, 2), (256, 1)):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.ReLU()]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, CLASSES))


class CharLM(nn.Module):
    """A causal transformer over characters: 3.2 million parameters."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(SYMBOLS, width), nn.Embedding(CONTEXT, width)
        one = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t) symbols to (b, symbols, t) logits."""
        t = x.shape[1]
        seen = nn.Transformer.generate_square_subsequent_mask(t)
        hidden = self.token(x) + self.position(torch.arange(t))
        return self.head(self.body(hidden, mask=seen, is_causal=True)).transpose(1, 2)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy."""
    return functional.cross_entropy(logits, target)


def numel(name: str) -> int:
    """Parameters of a built-in model."""
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[name].model().parameters())


def _vectors(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1024, generator=generator), torch.randint(CLASSES, (batch,), generator=generator)


def _pictures(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(CLASSES, (batch,), generator=generator)


def _text(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    symbols = torch.randint(SYMBOLS, (batch, CONTEXT + 1), generator=generator)
    return symbols[:, :-1], symbols[:, 1:]


MODELS = {"mlp": Task(mlp, 64, _vectors), "conv": Task(conv, 16, _pictures), "charlm": Task(CharLM, 8, _text)}
