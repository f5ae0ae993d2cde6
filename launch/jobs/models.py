"""The models: small enough for a laptop, large enough that sending their gradients dense is a waste."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.data import UNKNOWN


def norm(channels: int) -> nn.Module:
    """Group norm: unlike batch norm it has no buffers that DDP would broadcast behind the hook's back."""
    return nn.GroupNorm(min(8, channels), channels)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a stride of 2 halves the image."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norm(outside), norm(outside)
        straight = inside == outside and stride == 1
        self.shortcut = nn.Identity() if straight else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inside, h, w) to (b, outside, h/stride, w/stride)."""
        y = functional.relu(self.norm1(self.first(x)))
        return functional.relu(self.norm2(self.second(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 images: width, 2·width and 4·width channels at 8x8, 4x4 and 2x2."""

    def __init__(self, width: int, blocks: int, dropout: float, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.stem_norm = norm(width)
        layers: list[nn.Module] = []
        inside = width
        for stage in range(3):
            outside = width << stage
            for block in range(1 if stage == 0 else blocks):
                layers.append(Residual(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1, 8, 8) to (b, classes) logits."""
        x = self.body(functional.relu(self.stem_norm(self.stem(x))))
        return self.head(self.dropout(x.mean((2, 3))))


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, width) to the same shape; position t sees no later one."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(b, t, width)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class CharGPT(nn.Module):
    """A GPT over characters."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        symbols = UNKNOWN + 1
        self.token, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t) int64 symbols to (b, t, symbols) logits."""
        where = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(where))))


class GramNet(nn.Module):
    """A table of n-grams and a small network on top: nearly all parameters are the table's, of which a batch uses few.

    Args:
        grams: how many rows of the table make one input.
        sparse: the layout of the table's gradient.
    """

    def __init__(self, rows: int, width: int, grams: int, hidden: int, classes: int, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width, sparse=sparse)
        self.inside, self.head = nn.Linear(grams * width, hidden), nn.Linear(hidden, classes)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, grams) int64 numbers of rows to (b, classes) logits."""
        return self.head(functional.relu(self.inside(self.table(x).flatten(1))))


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats over all leading dimensions."""
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten())
