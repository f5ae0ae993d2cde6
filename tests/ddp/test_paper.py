"""A whole step on a device without a host synchronisation, checked where there is no device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.futures import Future

from sparcomm import AdamCorrection, Dense, MajorityVote, MomentumCorrection, OneBitAllReduce, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from sparcomm.ddp.clip import NormBound
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.options import Options
from sparcomm.ddp.plan import Mode, Plan
from sparcomm.ddp.reduction import Reducer
from sparcomm.ddp.step import Step
from sparcomm.ddp.units import Carried, Partition
from sparcomm.kernels import chosen
from sparcomm.kernels.cuda.launch import launchers
from support.paper import PAPER, HostWaits, NeverWaits, PaperTransport, vectors

ALGORITHMS: list[Algorithm] = [
    Dense(),
    Dense(native=True),
    TopKAllGather(0.01),
    TopKAllGather(0.01, values="int8", rounding="stochastic"),
    SparDL(0.01),
    SparDL(0.01, values="bfloat16", rounding="stochastic"),
    SparDL(0.1, schedule="direct", layout="contiguous", values="float16"),
    SparDL(0.01, residuals="local"),
    MajorityVote(),
    MajorityVote(mask=True, momentum=0.5),
    MajorityVote(scale=True, error_feedback=True),
    OneBitAllReduce(),
    OneBitAllReduce(mask=True),
]


class Idle:
    """Starts nothing: what runs on a GPU beside the host is CUDA text, and its host code is all there is to check."""

    def multiprocessors(self, device: torch.device) -> int:
        return 16

    def launch(self, *what: object) -> None:
        pass


@pytest.fixture(params=["reference", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a device gets without CuPy and with it."""
    made = importlib.import_module(f"sparcomm.kernels.{request.param}")
    monkeypatch.setitem(chosen, PAPER, made)
    monkeypatch.setitem(launchers, PAPER.type, Idle())
    return made


def steps(algorithm: Algorithm, size: int, dtype: torch.dtype, options: Options, plan: Plan, count: int = 2) -> None:
    """Some steps of two units, of which the first also comes in two buckets."""
    reducer = Reducer(options, PaperTransport(size // 2, size), numel=5000)
    norms = NormBound(reducer)
    norms._asked = True
    params = [nn.Parameter(t) for t in vectors((3000, 300, 200), dtype)]
    partition = Partition(final=True, storage=reducer.storage)
    wants_sent = options.correction is not None and options.correction.masking
    for unit in (params[:2], params[2:]):
        partition.add(unit, dtype, PAPER, algorithm, size, Carried(), wants_sent=wants_sent)
    skipped: Tensor | int = 0
    for number in range(count):
        buckets = [params] if number == 0 else [params[:1], params[1:]] if number == 1 else [params[:2], params[2:]]
        with NeverWaits():
            step = Step(number, partition, reducer, plan, on_host=False)
            for bucket in buckets:
                (buffer,) = vectors([sum(p.numel() for p in bucket)], dtype)
                for unit in step.place(bucket, buffer, Delivery(buffer, Future())):
                    step.reduce(unit)
            step.check_complete()
            norms.after_step(number)
            skipped = skipped + (~step.commit()).long()
    assert isinstance(skipped, Tensor)
    assert skipped.device == PAPER


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_no_algorithm_for_nccl_makes_the_host_wait(algorithm: Algorithm, size: int) -> None:
    steps(algorithm, size, torch.float32, Options(), Plan("sparse", getattr(algorithm, "density", 1.0)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nor_does_any_dtype(dtype: torch.dtype) -> None:
    for algorithm in (SparDL(0.01), TopKAllGather(0.01), MajorityVote(scale=True, error_feedback=True)):
        steps(algorithm, 3, dtype, Options(), Plan("sparse", 0.01))


def test_nor_does_momentum_that_is_masked_where_something_was_sent() -> None:
    for algorithm in (SparDL(0.01), TopKAllGather(0.01), MajorityVote(scale=True, error_feedback=True), Dense()):
        steps(algorithm, 3, torch.float32, Options(memory=MomentumCorrection(0.9)), Plan("sparse"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", ["sparse", "dense", "flush"])
def test_nor_do_loss_scales_limits_corrections_narrow_residuals_and_joined_ranks(mode: Mode) -> None:
    (scale,) = vectors([1])
    options = Options(memory=AdamCorrection(), storage="bfloat16", local_clip=1.0)
    for joined in (False, True):
        plan = Plan(mode, 0.01, joined=joined, scale=scale.view(()))
        steps(SparDL(0.05), 3, torch.bfloat16, options, plan)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "bool": lambda x: bool(x.any()),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "mask set": lambda x: x.__setitem__(x > 0, x[:1]),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "from the host": lambda x: torch.ones(3).to(PAPER),
    "copy": lambda x: x[:3].copy_(torch.ones(3)),
    "number": lambda x: x.__setitem__(0, 5),
    "tensor": lambda x: torch.tensor([1, 2], device=PAPER),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "index on the host": lambda x: x[torch.arange(2)],
    "list": lambda x: x[[0, 1]],
}


@pytest.mark.parametrize("way", WAITS)
def test_paper_finds_what_makes_a_host_wait(way: str) -> None:
    (x,) = vectors([4])
    with pytest.raises((HostWaits, RuntimeError, TypeError)), NeverWaits():
        WAITS[way](x)


def test_paper_allows_what_does_not() -> None:
    (x,) = vectors([4])
    with NeverWaits():
        x[1].fill_(5)
        x[:2] = 0
        x[1:] = x[:3] + 1
        torch.where(x > 0, x, 0).masked_fill_(x.isnan().any(), 1.0)
        torch.tensor([1, 2]).to(torch.float32)
