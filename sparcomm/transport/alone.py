"""A group of one rank, without torch.distributed: what is made for many ranks then also runs by itself."""

from __future__ import annotations

from torch import Tensor

from sparcomm.transport.base import Op
from sparcomm.transport.common import BaseTransport


class Alone(BaseTransport):
    """The only rank: every verb is a local copy. Its calls are checked and counted as everywhere."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        """Never called: there is no other rank to name."""

    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        """Never called: a row for oneself is copied."""

    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        """Never called: there is nothing to add."""

    def _make_split(self, members: list[int], color: int) -> Alone:
        made = Alone()
        made._shared = self._shared
        return made

    def _die(self) -> None:
        """Nobody waits."""
