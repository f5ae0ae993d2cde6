"""How the ranks of an optimizer meet: their group, what they must have in common, and who has which gradients."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparcomm.errors import CheckpointError, ConfigMismatch, NotInitializedError
from sparcomm.transport.alone import Alone
from sparcomm.transport.base import Transport
from sparcomm.transport.common import BaseTransport
from sparcomm.transport.torchdist.choice import choose
from sparcomm.transport.torchdist.groups import find_group

_BITS = 62  # of presence in an int64
_FIELDS = 16  # room for what must be equal: as much for every kind of optimizer, since ranks may have different ones


class Meeting:
    """A transport, and the two things that are told over it beside the vectors themselves.

    Args:
        transport: over the ranks that train together.
        device: where the small tensors live: that of the gradients, which the transport can move.
        owned: whether it ends with this.
    """

    def __init__(self, transport: Transport, device: torch.device, *, owned: bool) -> None:
        self.transport, self._device, self._owned = transport, device, owned

    @classmethod
    def join(
        cls, group: Any, transport: Transport | None, device: torch.device, timeout: dt.timedelta | float
    ) -> Meeting:
        """Over ``transport``, or else a new group over the ranks of ``group``. Collective.

        Without an initialised torch.distributed this rank is alone, unless a launcher says that it is not.

        Raises:
            NotInitializedError: ``group`` was given, or WORLD_SIZE says that there are others.
            ConfigError: this rank is not in ``group``.
        """
        if transport is not None:
            return cls(transport, device, owned=False)
        try:
            return cls(choose("auto", find_group(group), device).make(timeout), device, owned=True)
        except NotInitializedError:
            if group is not None or os.environ.get("WORLD_SIZE", "1") != "1":
                raise
            return cls(Alone(), device, owned=True)

    def agree(self, fields: Mapping[str, str]) -> None:
        """Raises ConfigMismatch, on all ranks, unless ``fields`` are equal everywhere. Collective."""
        mine = [_digest(f"{name}={value}") for name, value in fields.items()]
        rows = self._gather([*mine, *[0] * (_FIELDS - len(mine))])
        wrong = [name for name, column in zip(fields, zip(*rows, strict=True), strict=False) if len(set(column)) > 1]
        if wrong:
            own = "; ".join(f"{name}: {fields[name]}" for name in wrong)
            raise ConfigMismatch(
                f"ranks have different optimizers, in {', '.join(wrong)}; rank {self.transport.rank} has {own}"
            )

    def roll_call(self, step: int, settings: str, present: Sequence[bool]) -> list[int]:
        """Numbers of what is ``present`` on no rank. Collective: one gather of a bit each, and 16 bytes.

        Raises, on all ranks:
            CheckpointError: not all are at this ``step``.
            ConfigMismatch: not all have these ``settings``, with which their replicas would part.
        """
        words = [_pack(present[at : at + _BITS]) for at in range(0, len(present), _BITS)]
        rows = self._gather([step, _digest(settings), *words])
        steps = [row[0] for row in rows]
        if len(set(steps)) > 1:
            raise CheckpointError(f"ranks stand at different steps, {steps} by rank: load checkpoints of one step")
        if len({row[1] for row in rows}) > 1:
            raise ConfigMismatch(
                f"step {step}: ranks have different settings, such as learning rates from a scheduler that looks at a "
                f"rank's own loss; rank {self.transport.rank} has {settings}"
            )
        union = [functools.reduce(operator.or_, column) for column in list(zip(*rows, strict=True))[2:]]
        return [i for i in range(len(present)) if not union[i // _BITS] >> i % _BITS & 1]

    def _gather(self, mine: list[int]) -> list[list[int]]:
        """Everybody's numbers, which are as many on all ranks."""
        if self.transport.size == 1:
            return [mine]
        x = torch.tensor(mine, dtype=torch.int64, device=self._device)
        out: Tensor = x.new_empty((self.transport.size, len(mine)))
        self.transport.all_gather(out, x)
        return out.tolist()

    def abort(self, error: BaseException) -> None:
        """Makes the other ranks' waits fail, if the group is our own."""
        if self._owned and isinstance(self.transport, BaseTransport):
            self.transport.abort(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Ends the group, if it is our own."""
        if self._owned:
            self.transport.close()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _pack(bits: Sequence[bool]) -> int:
    return sum(1 << i for i, bit in enumerate(bits) if bit)
