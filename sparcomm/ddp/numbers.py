"""A few numbers of every rank, told to every rank over the hook's own transport."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm.transport.base import Transport


def gather_numbers(transport: Transport, mine: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """(p, len(mine)) float64 on ``device``, row r from rank r. Collective; only to be called by the hook's worker."""
    x = torch.as_tensor(mine, dtype=torch.float64, device=device).reshape(-1)
    out = torch.empty((transport.size, x.numel()), dtype=torch.float64, device=device)
    transport.all_gather(out, x)
    return out
