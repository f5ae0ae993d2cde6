"""From the sum over ranks to the mean in DDP's bucket, written once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.algorithms.base import Reduced, write_out
from sparcomm.collectives.bags import all_finite


def write_mean(reduced: Reduced, out: Tensor, size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Writes sum / size into ``out``, times ``scale`` if given, and NaN everywhere if the sum was not finite.

    Args:
        reduced: its ``total`` is overwritten, or the values of its ``parts``.
        out: (n,) of the gradient's dtype, overwritten.
        size: number of ranks.
        scale: () loss scale that the gradients carried.

    Returns:
        () bool, the same on all ranks: the mean is finite, in ``out``'s dtype, too. And (n,) what the cast to a
        narrower dtype has lost of the sum; None if there was none.
    """
    ok = reduced.ok
    divisor = torch.full((), float(size), dtype=torch.float64, device=out.device)
    if scale is not None:
        divisor /= scale.to(out.device, torch.float64, non_blocking=True)
    if reduced.total is None:
        return _write_parts(reduced, out, divisor, scale is not None), None
    total = reduced.total
    divisor = divisor.to(total.dtype).masked_fill_(~ok, torch.nan)
    torch.div(total, divisor, out=out)
    if out.dtype == total.dtype:
        return (ok if scale is None else ok & all_finite(out)), None
    ok = ok & all_finite(out)
    lost = total.sub_(out.to(total.dtype).mul_(divisor))
    out.masked_fill_(~ok, torch.nan)
    return ok, lost


def _write_parts(reduced: Reduced, out: Tensor, divisor: Tensor, scaled: bool) -> Tensor:
    """Zeros and k entries, instead of a pass over n that mostly divides zeros."""
    ok, parts = reduced.ok, reduced.parts or ()
    for part in parts:
        part.value.div_(divisor)
        if scaled:
            ok = ok & all_finite(part.value)
    if out.device.type != "cpu":
        write_out(parts, out).masked_fill_(~ok, torch.nan)
    elif bool(ok):
        write_out(parts, out)
    else:
        out.fill_(torch.nan)
    return ok
