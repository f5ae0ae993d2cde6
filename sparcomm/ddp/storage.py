"""Where and how narrow residuals are kept between steps.

A step works in the working dtype on the gradient's device. Between steps a residual may take half the memory
(``"bfloat16"``) or none on the device (``"pinned"``). Rounding is stochastic: a residual that only ever grows by less
than half a unit in its last place would otherwise never grow, and what it owes would be lost for good. So what is owed
is kept in expectation, not bit for bit.
"""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from sparcomm.errors import ConfigError
from sparcomm.kernels import kernels_for
from sparcomm.workspace import Workspace

KINDS = ("float32", "bfloat16", "pinned")


class Storage:
    """How one hook keeps residuals.

    Args:
        kind: ``"float32"``: in the working dtype on the gradient's device (float64 for float64 gradients).
            ``"bfloat16"``: rounded stochastically; float32 residuals only. Non-finite values and the largest finite
            ones survive as ``kernels.round_stochastic`` says. ``"pinned"``: in page-locked host memory where gradients
            lie on a CUDA device; on the CPU, where residuals lie in host memory anyway, the same as ``"float32"``.

    Raises:
        ConfigError: another kind.
    """

    def __init__(self, kind: str = "float32") -> None:
        if kind not in KINDS:
            raise ConfigError(f"storage={kind!r}: must be one of {', '.join(map(repr, KINDS))}")
        self.kind = kind

    def check(self, working: torch.dtype) -> None:
        """Raises ConfigError if residuals of this working dtype cannot be kept so."""
        if self.kind == "bfloat16" and working != torch.float32:
            raise ConfigError(
                "storage='bfloat16' keeps 8 bits of precision, which is no use to float64 gradients: "
                "use storage='float32', which keeps them in float64"
            )

    def keep(self, residual: Tensor, step: int, unit: int, rank: int, workspace: Workspace) -> Tensor:
        """What is stored of ``residual`` (n,) of the working dtype, which passes to the storage and must not be used.

        ``step``, ``unit`` and ``rank`` seed the rounding, so that a repeated or resumed step rounds the same way.
        """
        if self.kind == "bfloat16":
            self.check(residual.dtype)
            stored = workspace.take(residual.numel(), torch.bfloat16, residual.device)
            kernels_for(residual).round_stochastic(residual, stored, seed_of(step, unit, rank))
        elif self.kind == "pinned" and residual.is_cuda:
            # Copies from and to it are in the order of the stream that all steps run on: the host may forget them.
            stored = workspace.take(residual.numel(), residual.dtype, torch.device("cpu"), pinned=True)
            stored.copy_(residual, non_blocking=True)
        else:
            return residual
        workspace.give(residual)
        return stored

    def adopt(self, residual: Tensor) -> Tensor:
        """What is stored of a residual that comes from elsewhere: exactly its values.

        With ``"bfloat16"`` the sum of several ranks' residuals may need more bits; it keeps them until the next step.
        """
        if self.kind == "bfloat16":
            self.check(residual.dtype)
            narrow = residual.to(torch.bfloat16)
            return narrow if torch.equal(narrow.to(residual.dtype), residual) else residual
        if self.kind == "pinned" and residual.is_cuda:
            return residual.cpu().pin_memory()
        return residual

    def use(self, stored: Tensor, dtype: torch.dtype, device: torch.device, workspace: Workspace) -> Tensor:
        """(n,) of the working dtype on ``device``: ``stored`` itself, not to be modified, or a lent buffer."""
        if stored.dtype == dtype and stored.device == device:
            return stored
        return workspace.take(stored.numel(), dtype, device).copy_(stored, non_blocking=True)

    def select(self, good: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
        """``new`` where ``good``, (), else ``old``, None standing for zeros; the host waits for nothing.

        All are stored ones; either may be overwritten. ``good`` lies on the gradient's device.
        """
        kept = [t for t in (new, old) if t is not None]
        if new is old or all(t.device == good.device and t.dtype == kept[0].dtype for t in kept):
            return choose(good, new, old)
        target = kept[0]
        there = [None if t is None else t.to(good.device, target.dtype, non_blocking=True) for t in (new, old)]
        zero = torch.zeros((), dtype=target.dtype, device=good.device)
        chosen = torch.where(good, *(zero if t is None else t for t in there))
        return target.copy_(chosen, non_blocking=True)

    def settle(self) -> None:
        """Returns when the host may read what is stored: copies to page-locked memory do not wait for the device."""
        if self.kind == "pinned" and torch.cuda.is_available():
            torch.cuda.synchronize()


def choose(good: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """``new`` where ``good``, (), else ``old``, None standing for zeros; decided on the device. Overwrites either."""
    if new is old:
        return new
    if new is None:
        return None if old is None else old.masked_fill_(good, 0)
    if old is None:
        return new.masked_fill_(~good, 0)
    return torch.where(good, new, old, out=new)


def seed_of(step: int, unit: int, rank: int) -> int:
    """The seed of one residual's rounding, never counted: a hash, 32 bits."""
    return zlib.crc32(struct.pack("<QII", step, unit, rank))
