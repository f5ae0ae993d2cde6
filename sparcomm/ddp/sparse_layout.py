"""Gradients of sparse layout, as ``nn.Embedding(..., sparse=True)`` has them: in as COO, out as COO, whole.

DDP gives such a parameter a bucket of its own, whose buffer is a COO tensor (rows, width) with one sparse dimension.
It belongs to no unit: whatever the algorithm and the plan of the step, its rows are summed over the union of all ranks'
rows (``collectives/rows.py``), so nothing is selected and nothing is owed. What a cast of the mean back to 16 bits
rounds off is lost, as with any dense all-reduce that has no error feedback.

Which parameters have this layout DDP reads off the modules, so all ranks agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm.algorithms.base import Reduced, State
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.rows import union_all_reduce
from sparcomm.ddp.mean import write_mean
from sparcomm.ddp.plan import Plan
from sparcomm.ddp.reduction import Reducer
from sparcomm.dtypes import GRADIENT_DTYPES, working_dtype
from sparcomm.errors import GradientError
from sparcomm.kernels import kernels_for

FIRST = 0x8000  # messages are numbered from here on, behind those of all units


def check_sparse(buffer: Tensor, params: Sequence[Tensor], *, corrects: bool, on_nccl: bool) -> None:
    """Raises GradientError for a bucket of sparse layout that cannot be summed.

    Args:
        corrects: whether a memory stands in front of the algorithm that keeps something of every element.
        on_nccl: whether the bucket lies on a device whose host must not wait for it.
    """
    dense = "use nn.Embedding(..., sparse=False)"
    if buffer.layout != torch.sparse_coo or (buffer.sparse_dim(), buffer.dense_dim()) != (1, 1) or len(params) != 1:
        kind = f", {buffer.sparse_dim()} sparse and {buffer.dense_dim()} dense dimensions" if buffer.is_sparse else ""
        raise GradientError(
            f"gradient has layout {buffer.layout}, shape {tuple(buffer.shape)}{kind}: of sparse layouts only whole "
            f"rows of one embedding (1 sparse and 1 dense dimension) can be summed; {dense}"
        )
    if buffer.dtype not in GRADIENT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in GRADIENT_DTYPES)
        raise GradientError(f"gradient has dtype {buffer.dtype}, must be one of {allowed}")
    if on_nccl:
        raise GradientError(
            f"gradient has layout {buffer.layout}, and travels over NCCL: the host would have to wait for the device "
            f"to know how many rows there are; {dense}, or a process group on Gloo"
        )
    if corrects:
        raise GradientError(
            f"gradient has layout {buffer.layout}, and memory= keeps something of every element in front of the "
            f"selection, which such a gradient cannot be given; {dense}, or memory=sparcomm.ErrorFeedback()"
        )


def reduce_rows(grad: Tensor, reducer: Reducer, plan: Plan, step: int, number: int) -> tuple[Tensor, Tensor]:
    """The mean over ranks of ``grad``, which is not to be read afterwards. Collective.

    Args:
        grad: (rows, width) COO, coalesced or not; rows differ between ranks.
        step, number: of this step, and of this gradient within it, the same on all ranks.

    Returns:
        The mean, coalesced, whose rows are those that any rank has, NaN if anything was not finite; and that as (),
        whether everything was finite on all ranks.

    Raises:
        DamagedBag: bytes that arrived were not what was sent.
    """
    transport, clock, dtype = reducer.transport, reducer.clock, working_dtype(grad.dtype)
    transport.context = f"step {step}, gradient of sparse layout {number - FIRST}"
    with clock.span("code"):
        mine = grad.to(dtype).coalesce()  # wide first: rows that occur several times are added up
        key, value = mine.indices().view(-1), mine.values().contiguous()
    value = reducer.local_gradient(value.view(-1), plan, grad.numel()).view_as(value)
    reducer.record_norm(number, value)
    bags = Bags(kernels_for(value), number, step, grad.device)
    union, total = union_all_reduce(key, value, grad.shape[0], bags, transport, clock, reducer.workspace)
    mean = torch.empty(total.shape, dtype=grad.dtype, device=grad.device)
    reduced = Reduced(total.view(-1), None, None, State(), bags.ok())
    ok, _ = write_mean(reduced, mean.view(-1), transport.size, plan.scale)
    rows = torch.sparse_coo_tensor(union.view(1, -1), mean, grad.shape, is_coalesced=True, check_invariants=False)
    return rows, ok
