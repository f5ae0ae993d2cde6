"""A row over MPI: measured within the process that mpirun has started, whose children are no ranks of MPI.

So a rank that aborts or hangs in its own code ends the whole bench, and not only its row as elsewhere. What raises, or
waits for others in vain, fails the row: groups that are broken are left behind, and the next row makes new ones.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from sparcomm.bench.child import Job, group, one_line
from sparcomm.kernels import warm_up


def measured(job: Job) -> dict[str, Any]:
    """{"result": sample} or {"error": text}. Collective."""
    torch.set_num_threads(job.options.threads)
    warm_up()
    try:
        with group(job):
            sample = import_module(f"sparcomm.bench.{job.kind}").measure(job, _ignore)
            dist.barrier()
        return {"result": asdict(sample)}
    except Exception as error:  # noqa: BLE001  the row says so, whatever it is
        if dist.is_initialized():
            dist.group.WORLD.abort()  # pyright: ignore[reportOptionalMemberAccess]
            dist.destroy_process_group()
        return {"error": one_line(error)}


def _ignore(_: int) -> None:
    """The number of a step that has ended."""
