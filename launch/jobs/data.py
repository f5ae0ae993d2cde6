"""The data sets, all already on the machine, and the sampler that deals them to the ranks."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sparcomm.errors import ConfigError

VOCABULARY = "\n\t" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(VOCABULARY)  # every other byte
VALIDATION_EVERY = 10  # one file in ten
# Names and words, numbers, line ends with the indentation behind them, and any other character by itself.
_TOKEN = re.compile(rb"[A-Za-z_]\w*|\d+|\n *|[^\w\s]")
_MULTIPLIER = -7046029254386353131  # odd, with bits all over: 2^64 / golden ratio, as int64 holds it


class Samples(Protocol):
    """A finite, indexable set of samples."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples at ``index`` ((b,) int64)."""
        ...


class Split(NamedTuple):
    """Training and held-out samples; no sample is in both."""

    train: Samples
    test: Samples


class Table:
    """Samples that are rows of two tensors."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both."""
        return self.x[index], self.y[index]


class Windows:
    """Windows of ``context`` characters that do not overlap, cut from one long text; targets are one further on."""

    def __init__(self, text: Tensor, context: int, limit: int | None = None) -> None:
        self.text, self.context = text, context
        count = max(0, (len(text) - 1) // context)
        self.count = count if limit is None else min(count, limit)
        # A limited set is spread over the whole text, so that it does not come from a single file.
        self.stride = context if self.count == count else (len(text) - 1 - context) // max(1, self.count - 1)

    def __len__(self) -> int:
        return self.count

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(b, context) int64 symbols and their successors."""
        at = index[:, None] * self.stride + torch.arange(self.context + 1)[None, :]
        window = self.text[at].long()
        return window[:, :-1], window[:, 1:]


class Grams:
    """Places in a text of tokens, each with the hashed n-grams in front of it and the class of the token there.

    Args:
        tokens: (length,) hashes of the tokens, int64 below 2^32.
        classes: (length,) int64, -1 for tokens that are in no class; those are context only.
        context: how many tokens in front are taken one by one; those two and three together are behind them.
        rows: numbers of n-grams are below this.
        limit: so many places at most, spread over the whole text.
    """

    def __init__(self, tokens: Tensor, classes: Tensor, context: int, rows: int, limit: int | None = None) -> None:
        self.tokens, self.classes, self.context, self.rows = tokens, classes, context, rows
        self.places = context + (classes[context:] >= 0).nonzero().view(-1)
        if limit is not None and limit < len(self.places):
            self.places = self.places[torch.arange(limit) * len(self.places) // limit]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(b, context + 2) int64 numbers of n-grams, nearest tokens first, and (b,) classes."""
        at = self.places[index]
        before = self.tokens[at[:, None] - torch.arange(1, self.context + 1)]
        pair = _mixed(before[:, 0]) ^ before[:, 1]
        grams = torch.cat([before, pair[:, None], (_mixed(pair) ^ before[:, 2])[:, None]], 1)
        return _mixed(grams) % self.rows, self.classes[at]


def _mixed(x: Tensor) -> Tensor:
    """int64 hashes of int64 values, non-negative."""
    x = x * _MULTIPLIER
    return ((x ^ x >> 29) * _MULTIPLIER >> 16) & (1 << 47) - 1


def digits() -> Split:
    """scikit-learn's 1,797 images, standardised, every third held out: (b, 1, 8, 8) float32 and (b,) int64."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    held = torch.arange(len(x)) % 3 == 2
    mean, std = x[~held].mean(), x[~held].std()
    x = (x - mean) / std
    return Split(Table(x[~held], y[~held]), Table(x[held], y[held]))


def charlm(context: int, validation_windows: int, root: Path | None = None) -> Split:
    """The standard library's source text, split by file. ``root``: another folder of ``*.py`` files."""
    root = root or Path(sysconfig.get_path("stdlib"))
    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    for path in source_files(root):
        (test if is_held_out(path.relative_to(root)) else train).append(encode(path.read_bytes()))
    if not train or not test:
        raise ConfigError(f"{root} holds too few *.py files to split: {len(train)} to train on, {len(test)} held out")
    texts = [torch.from_numpy(np.concatenate(files)) for files in (train, test)]
    return Split(Windows(texts[0], context), Windows(texts[1], context, validation_windows))


def tokens(context: int, rows: int, classes: int, validation_samples: int, root: Path | None = None) -> Split:
    """The standard library's tokens, split by file as ``charlm``'s; what is to be told is one of the most frequent.

    Args:
        context, rows: see ``Grams``.
        classes: how many of the training text's tokens are told apart, from the most frequent on.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names: dict[bytes, int] = {}
    texts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for path in source_files(root):
        found = [names.setdefault(token, len(names)) for token in _TOKEN.findall(path.read_bytes())]
        texts[is_held_out(path.relative_to(root))].append(np.array(found, dtype=np.int64))
    if not all(texts):
        raise ConfigError(f"{root} holds too few *.py files to split: {len(texts[0])} to train on")
    train, test = (torch.from_numpy(np.concatenate(files)) for files in texts)
    frequent = torch.bincount(train, minlength=len(names)).argsort(descending=True, stable=True)[:classes]
    number = torch.full((len(names),), -1)
    number[frequent] = torch.arange(len(frequent))
    hashed = torch.tensor([zlib.crc32(name) for name in names], dtype=torch.int64)
    made = [
        Grams(hashed[text], number[text], context, rows, limit)
        for text, limit in ((train, None), (test, validation_samples))
    ]
    return Split(made[0], made[1])


def source_files(root: Path) -> list[Path]:
    """The Python files below ``root`` without tests and installed packages, in an order that is always the same."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = set(inside) - skipped
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(relative: Path) -> bool:
    """Whether the file belongs to the held-out text: a hash of its path, so new files never move old ones."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "little") % VALIDATION_EVERY == 0


def encode(text: bytes) -> np.ndarray:
    """uint8 symbols in [0, UNKNOWN], one a byte."""
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[np.frombuffer(VOCABULARY.encode("ascii"), dtype=np.uint8)] = np.arange(len(VOCABULARY), dtype=np.uint8)
    return table[np.frombuffer(text, dtype=np.uint8)]


class Sampler:
    """Deals each epoch's permutation to the ranks: batch b of rank r is the r-th part of the b-th ``batch`` samples.

    The permutation is a function of (seed, epoch) alone, so any position can be resumed. Every batch is full:
    the fewer than ``batch`` samples left at the end of an epoch wait for another permutation.
    """

    def __init__(self, length: int, batch: int, rank: int, size: int, seed: int) -> None:
        if batch % size:
            raise ConfigError(f"batch={batch} must be a multiple of the {size} ranks")
        if length < batch:
            raise ConfigError(f"batch={batch} is larger than the {length} samples there are")
        self.length, self.batch, self.rank, self.size, self.seed = length, batch, rank, size, seed

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.length // self.batch

    def indices(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """This rank's (batch/size,) int64 indices of every batch of ``epoch`` from batch ``start`` on."""
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        order = torch.randperm(self.length, generator=generator)
        share = self.batch // self.size
        for number in range(start, len(self)):
            begin = number * self.batch + self.rank * share
            yield order[begin : begin + share]
