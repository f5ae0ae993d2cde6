"""Bitmaps read and written one bit at a time, and kernels cut in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import threads, wire
from sparcomm.kernels.cpu import _parts

WORD = st.one_of(st.sampled_from([0, -1, 1, -(1 << 31)]), st.integers(-(1 << 31), (1 << 31) - 1))
WIDE = (1 << 33) + 5  # as the place of a first word: beyond 32 bits


def poisoned(count: int) -> Tensor:
    """(count,) int32 that no kernel may leave as they are."""
    return torch.full((count,), 0x5A5A5A5A, dtype=torch.int32)


def bitmap_for(m: int) -> Tensor:
    """Room for a bitmap over m positions."""
    return poisoned(wire.bitmap_words(m))


def bits_of(words: Tensor) -> list[int]:
    """All bits, unused ones included."""
    return [(w >> i) & 1 for w in words.tolist() for i in range(32)]


def words_of(bits: list[int]) -> Tensor:
    """Bits as words, zeros behind them."""
    padded = [*bits, *[0] * (-len(bits) % 32)]
    values = [sum(b << i for i, b in enumerate(padded[at : at + 32])) for at in range(0, len(padded), 32)]
    return torch.from_numpy(np.array(values, np.uint32).view(np.int32))


def random_words(*shape: int, seed: int = 0) -> Tensor:
    """Any bits at all."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, generator=made)


def as_payloads(rows: Tensor) -> Tensor:
    """The same rows, with words between them, as those of bags."""
    apart = poisoned(rows.shape[0] * (rows.shape[1] + wire.HEADER_WORDS)).view(rows.shape[0], -1)
    apart[:, wire.HEADER_WORDS :] = rows
    return apart[:, wire.HEADER_WORDS :]


@contextmanager
def in_parts(monkeypatch: pytest.MonkeyPatch, parts: int) -> Iterator[None]:
    """Within it every vector is cut into so many parts, however short."""
    with monkeypatch.context() as patch:
        patch.setattr(_parts, "LARGE", 1)
        patch.setattr(_parts, "PIECE", 64)
        patch.setattr(threads, "allowed", lambda: parts)
        yield


def in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch, call: Callable[[], list[Tensor]]) -> None:
    """Holds that what ``call`` gives does not depend on threads."""
    with threads.serial():
        expected = call()
    for parts in (2, 3, 7):
        with in_parts(monkeypatch, parts):
            found = call()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
