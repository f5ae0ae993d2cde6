"""One row of ``sparcomm bench``: a gradient is synchronised again and again, by an algorithm or a hook of PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.algorithms import Algorithm, Cost
from sparcomm.bench import entries, torch_hooks
from sparcomm.bench.child import Job, one_line
from sparcomm.bench.gradient import captured, exact_sum, gradient
from sparcomm.bench.options import Options
from sparcomm.bench.sample import Counted, Progress, Sample, Stopwatch
from sparcomm.ddp.mean import write_mean
from sparcomm.density import quota
from sparcomm.errors import CommunicationError
from sparcomm.transport.base import Transport


def measure(job: Job, progress: Progress) -> Sample:
    """The rank's part of a row. Collective."""
    options = job.options
    assert isinstance(options, Options)
    entry = entries.parse(job.typed, options.density, options.values, options.schedule)
    grad = gradient(options.numel, job.rank, options.seed)
    if entry.algorithm is None:
        sample, first = torch_hooks.synchronise(entry, grad, options, progress)
        k = options.numel
    else:
        transport = job.transport()
        try:
            sample, first = synchronise(entry.algorithm, grad, transport, options, progress)
        except Exception as error:
            transport.abort(one_line(error))
            raise
        transport.close()
        k = selected(entry.algorithm, options.numel, job.size)
    sample.kept = int(torch.count_nonzero(first))
    if job.rank == 0:
        sample.energy = captured(exact_sum(options.numel, job.size, options.seed), first.mul_(job.size), k)
    return sample


def synchronise(
    algorithm: Algorithm, grad: Tensor, transport: Transport, options: Options, progress: Progress
) -> tuple[Sample, Tensor]:
    """Reduces ``grad`` with error feedback, step after step, the mean written as the DDP hook writes it.

    Into a buffer beside the gradient, so that this stays as it is and steps follow one another without a gap: to refill
    it in between would make ranks wait for each other's refilling within the time that is measured.

    Returns:
        The sample, and the mean of the first step.
    """
    n, size = grad.numel(), transport.size
    algorithm.check_size(size)
    state, residual = algorithm.init(n, grad.dtype, grad.device, size), None
    state.wants_sent = state.wants_total = False
    mean, first = torch.empty_like(grad), torch.empty(0)
    watch, counted = Stopwatch(progress), Counted(transport.traffic)
    costs: list[Cost] = []
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            counted = Counted(transport.traffic)
            watch.start()
        costs.append(algorithm.cost(n, grad.dtype, size, state))
        reduced = algorithm.reduce(grad, residual, state, step, transport)
        ok, _ = write_mean(reduced, mean, size)
        if not bool(ok):
            raise CommunicationError(f"step {step}: the sum is not finite")
        state.workspace.give(reduced.total, None if residual is reduced.residual else residual)
        residual, state = reduced.residual, reduced.state
        if step == 0:
            first = mean.clone()
        watch.tick()
    # What a first step finds out, and what adapts, is in the state: the mean of the steps that were timed.
    cost = [round(sum(of) / options.steps) for of in zip(*costs[options.warmup :], strict=True)]
    sample = Sample(
        watch.seconds, watch.cpu_seconds, **counted.per_step(options.steps), cost=cost, bound=not algorithm.static
    )
    return sample, first


def selected(algorithm: Algorithm, n: int, size: int) -> int:
    """The k whose global top-k a step is compared with: the density's, or n where everything travels."""
    density = getattr(algorithm, "density", None)
    return n if density is None or algorithm.kept(n, size) == n else quota(density, n)
