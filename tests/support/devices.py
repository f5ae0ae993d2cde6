"""Jobs that ranks run on a given device and backend: tests/gpu runs them on GPUs, tests/ddp on the CPU.

Nothing here needs more than torch, CuPy, Numba and pytest. A rank of a pool has a default group on Gloo; NCCL, which
refuses two ranks on one GPU, gets a group of this rank alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparcomm
from sparcomm import Dense, HookState, MajorityVote, OneBitAllReduce, SparDL, TopKAllGather
from sparcomm.algorithms import Algorithm
from sparcomm.kernels import prepare
from sparcomm.transport.torchdist import TorchTransport
from support.conformance import CHECKS
from support.modes import debts, over_ranks, owed
from support.training import SIZES, Breaking, Fed, integers, small_net, wrap

TIMEOUT = 60.0
ALGORITHMS: dict[str, Algorithm] = {
    "dense": Dense(),
    "topk": TopKAllGather(0.05),
    "topk, int8": TopKAllGather(0.05, values="int8"),
    "spardl": SparDL(0.05),
    "spardl, bfloat16": SparDL(0.05, values="bfloat16", rounding="stochastic"),
    "vote": MajorityVote(mask=True, tie="negative"),
    "vote, error feedback": MajorityVote(scale=True, error_feedback=True),
    "onebit": OneBitAllReduce(),
}


@contextlib.contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """It is an error that the host waits for the device, on any thread, as far as PyTorch finds out."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def start(name: str, backend: str) -> tuple[torch.device, dist.ProcessGroup | None]:
    """The device, with its kernels loaded, and the group to train in."""
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        warnings.simplefilter("default")  # no errors: PyTorch's own on a GPU, and that CuPy is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare([device])
    return device, dist.new_group([dist.get_rank()], backend="nccl") if backend == "nccl" else None


def end(state: HookState, group: dist.ProcessGroup | None) -> None:
    """Closes what ``start`` and ``attach`` have made."""
    state.close()
    if group is not None:
        dist.destroy_process_group(group)


def replicas_agree(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """All ranks that train together have the same bits."""
    mine = torch.cat([t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
    if group is None:
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(mine, other) for other in everyone), "replicas differ"


class Fedback(NamedTuple):
    """What a run on given gradients delivered: means by step and parameter, this rank's debts, all on the host."""

    means: list[list[Tensor]]
    debts: list[Tensor]
    lost: float
    stats: dict[str, Any]


def fed(
    rank: int, size: int, name: str, backend: str, algorithm: str, steps: int = 7, momentum: float = 0.0
) -> Fedback:
    """Steps with small integers as gradients, which are exact on every device; steady ones must not wait on NCCL.

    ``Fedback.lost``: the largest difference, over all positions, between what went in and what came out or is owed.
    """
    device, group = start(name, backend)
    ddp = wrap(Fed().to(device), process_group=group)
    memory = sparcomm.MomentumCorrection(momentum) if momentum else None
    state = sparcomm.attach(ddp, ALGORITHMS[algorithm], timeout=TIMEOUT, memory=memory)
    size = size if group is None else 1
    given = [[g.to(device) for g in integers(SIZES, rank, step)] for step in range(steps)]
    means: list[list[Tensor]] = []
    for step in range(steps):
        steady = step >= 3 and backend == "nccl"
        with no_sync(device) if steady else contextlib.nullcontext():
            ddp.zero_grad()
            ddp(given[step]).backward()
            means.append([p.grad.detach().clone() for p in ddp.parameters() if p.grad is not None])
    state.raise_if_failed()
    means = [[m.cpu() for m in step] for step in means]
    replicas_agree(means[-1], group)
    left, sent = debts(state, SIZES), [sum(g[i].cpu().double() for g in given) for i in range(len(SIZES))]
    came = [size * sum(step[i].double() for step in means) for i in range(len(SIZES))]
    (owing, put) = (left, sent) if group is not None else (over_ranks(left), over_ranks(sent))
    lost = max(float((a - b - c).abs().max()) for a, b, c in zip(put, came, owing, strict=True))
    stats = state.stats()
    end(state, group)
    return Fedback(means, left, lost, {k: stats[k] for k in ("steps", "skipped", "bytes_sent")})


def pinned(rank: int, size: int, name: str, backend: str) -> tuple[list[Tensor], set[str], set[bool]]:
    """Debts after some steps with residuals in page-locked memory, where these lie, and whether they are pinned."""
    device, group = start(name, backend)
    ddp = wrap(Fed().to(device), process_group=group)
    state = sparcomm.attach(ddp, SparDL(0.05), timeout=TIMEOUT, storage="pinned")
    for step in range(6):
        given = [g.to(device) for g in integers(SIZES, rank, step)]
        ddp.zero_grad()
        with no_sync(device) if backend == "nccl" and step >= 3 else contextlib.nullcontext():
            ddp(given).backward()
    left = debts(state, SIZES)
    assert state._engine is not None
    kept = [u.residual for u in state._engine.partition.units if u.residual is not None]
    end(state, group)
    return left, {r.device.type for r in kept}, {r.is_pinned() for r in kept}


class Trained(NamedTuple):
    """Weights after training, losses by step, and the loss scale at the end, on the host."""

    weights: Tensor
    losses: list[float]
    scale: float


def net(rank: int, size: int, name: str, backend: str, algorithm: str, steps: int = 12) -> Trained:
    """A small network learns, with clipping; steady steps, the optimizer's too, must not wait on NCCL."""
    device, group = start(name, backend)
    ddp = wrap(small_net(48).to(device), process_group=group, bucket_cap_mb=0.005)
    state = sparcomm.attach(ddp, ALGORITHMS[algorithm], timeout=TIMEOUT)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)).to(device)
    losses: list[Tensor] = []
    for step in range(steps):
        with no_sync(device) if step >= 4 and backend == "nccl" else contextlib.nullcontext():
            optimizer.zero_grad()
            loss = (ddp(x) - x[:, :4]).square().mean()
            loss.backward()
            state.clip_grad_norm_(10.0)
            optimizer.step()
            losses.append(loss.detach())
    state.raise_if_failed()
    weights = torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]).cpu()
    replicas_agree([weights], group)
    end(state, group)
    return Trained(weights, [float(loss) for loss in losses], 1.0)


def amp(rank: int, size: int, name: str, backend: str, kind: str, overflow: int | None = None) -> Trained:
    """Autocast and a loss scale. In step ``overflow`` the last rank's loss is infinite, which must leave no trace."""
    device, group = start(name, backend)
    ddp = wrap(small_net(48).to(device), process_group=group, bucket_cap_mb=0.005)
    optimizer, dtype = torch.optim.SGD(ddp.parameters(), lr=0.1), getattr(torch, kind)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=1000)
    state = sparcomm.attach(ddp, SparDL(0.1), timeout=TIMEOUT, scaler=scaler)
    losses: list[float] = []
    for step in range(8):
        before = {k: v.clone() for k, v in owed(state).items()} if step else {}
        weights = [p.detach().clone() for p in ddp.parameters()]
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)).to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            loss = (ddp(x).float() - x[:, :4]).square().mean()
        spoilt = step == overflow and rank == size - 1
        with no_sync(device) if step >= 3 and backend == "nccl" else contextlib.nullcontext():
            scaler.scale(loss * torch.full((), float("inf"), device=device) if spoilt else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        if step == overflow:
            assert all(torch.equal(a, b) for a, b in zip(weights, ddp.parameters(), strict=True)), "the step was taken"
            after = owed(state)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before), "what is owed has changed"
    replicas_agree(list(ddp.parameters()), group)
    assert state.stats()["skipped"] == (overflow is not None)
    weights = torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]).cpu()
    end(state, group)
    return Trained(weights, losses, float(scaler.get_scale()))


def failing(rank: int, size: int, name: str) -> tuple[int, str, str]:
    """Where rank 1 fails in step 3: in which step ``backward`` raised, with which text, and the original's type."""
    device, _ = start(name, "gloo")
    ddp = wrap(Fed().to(device))
    state = sparcomm.attach(ddp, Breaking(), timeout=TIMEOUT)
    ended: list[int] = []

    def train() -> None:
        for step in range(5):
            ddp.zero_grad()
            ddp([g.to(device) for g in integers(SIZES, rank, step)]).backward()
            ended.append(step)

    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError") as raised:
        train()
    with pytest.raises(Exception, match="no luck") as original:
        state.raise_if_failed()
    state.close()
    return len(ended), str(raised.value), type(original.value).__name__


def conform(rank: int, size: int, name: str) -> None:
    """The conformance suite with tensors on the device."""
    device, _ = start(name, "gloo")
    for check in CHECKS.values():
        t = TorchTransport.from_group(timeout=20)
        try:
            with torch.device(device):
                check(t)
        finally:
            t.close()


def traced(rank: int, size: int, backend: str, path: str) -> None:
    """Writes a profile of two steps of a network whose backward pass keeps a GPU busy."""
    from torch.profiler import ProfilerActivity, profile

    device, group = start("cuda", backend)
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).to(device)
    ddp = wrap(model, process_group=group, bucket_cap_mb=16)
    state = sparcomm.attach(ddp, SparDL(0.01), timeout=TIMEOUT)
    x = torch.randn(8192, 2048, device=device)

    def step() -> None:
        ddp.zero_grad()
        ddp(x).square().mean().backward()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        step()
        torch.cuda.synchronize()
    seen.export_chrome_trace(path)
    end(state, group)


class Overlap(NamedTuple):
    """Of a profile: microseconds that kernels of the hook's streams took, how many of these ran beside kernels of
    other streams, and the ranges seen around them."""

    busy: float
    beside: float
    ranges: set[str]


def overlap(events: Sequence[dict[str, Any]]) -> Overlap:
    """Reads Kineto's ``traceEvents``: ranges on a device have the stream as their thread."""
    marks = [e for e in events if e.get("cat") == "gpu_user_annotation" and e["name"].startswith("sparcomm::")]
    ours = {(e["pid"], e["tid"]) for e in marks if e["name"].startswith("sparcomm::unit")}
    kernels = [e for e in events if e.get("cat") == "kernel"]
    spans = {mine: [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in kernels
                    if ((e["pid"], e["tid"]) in ours) == mine] for mine in (True, False)}  # fmt: skip
    others = _merged(spans[False])
    beside = sum(max(0.0, min(b, d) - max(a, c)) for a, b in _merged(spans[True]) for c, d in others)
    return Overlap(sum(b - a for a, b in spans[True]), beside, {e["name"] for e in marks})


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint intervals that cover the same."""
    found: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found
