"""One row of ``sparcomm bench --model``: training steps in DDP, with an algorithm or a hook of PyTorch's."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from sparcomm.bench import entries, torch_hooks
from sparcomm.bench.child import Job
from sparcomm.bench.models import MODELS, loss
from sparcomm.bench.options import Options
from sparcomm.bench.sample import Counted, Progress, Sample, Stopwatch
from sparcomm.ddp.attach import attach
from sparcomm.transport.base import Traffic

SETTLING = 3  # DDP cuts its buckets anew in the second step, and PowerSGD compresses from the third
PLAIN = "dense"  # DDP without a hook: the backend's own all-reduce, overlapped with the backward pass


def measure(job: Job, progress: Progress) -> Sample:
    """The rank's part of a row: zero_grad, forward, backward with its synchronisation, optimizer step. Collective."""
    options = job.options
    assert isinstance(options, Options)
    assert options.model is not None
    entry = entries.parse(job.typed, options.density, options.values, options.schedule)
    task = MODELS[options.model]
    torch.manual_seed(options.seed)
    model = task.model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=options.bucket_mb)
    numel = sum(p.numel() for p in model.parameters())
    traffic, state = Traffic(), None
    if entry.algorithm is None:
        torch_hooks.register(ddp, entry)
    elif job.typed != PLAIN:
        state = attach(ddp, entry.algorithm, timeout=job.patience)
        traffic = state.traffic
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3, momentum=0.9)
    data = task.data(torch.Generator().manual_seed(options.seed * job.size + job.rank), options.batch or task.batch)
    watch, counted, warmup = Stopwatch(progress), Counted(traffic), max(options.warmup, SETTLING)
    last = torch.zeros(())
    with torch_hooks.counting(traffic):
        for step in range(warmup + options.steps):
            if step == warmup:
                counted = Counted(traffic)
                watch.start()
            optimizer.zero_grad()
            last = loss(ddp(data[0]), data[1])
            last.backward()
            if job.typed == PLAIN:  # the reducer's own all-reduce is in C++
                sent = 2 * (job.size - 1) * 4 * numel // job.size
                traffic.book(2 * (job.size - 1), 2 * (job.size - 1), sent, sent)
            optimizer.step()
            watch.tick()
    sample = Sample(watch.seconds, watch.cpu_seconds, **counted.per_step(options.steps))
    sample.kept = numel
    sample.extra = {"model": options.model, "loss": float(last.detach())}
    if state is not None:
        sample.kept = state.stats()["kept"]
        state.close()
    return sample
