"""A rank of the loopback test: ``python -m sparcomm.doctor.step gloo|nccl|mpi`` prints what came out, as JSON."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from sparcomm.algorithms.base import Algorithm
from sparcomm.config import algorithm_from_config
from sparcomm.launch import init
from sparcomm.transport.base import Transport

STEPS, NUMEL, TIMEOUT = 2, 5000, 60.0


def gradient(rank: int, step: int) -> torch.Tensor:
    """The same on every machine."""
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step + rank))


def reduce(algorithm: Algorithm, transport: Transport, device: torch.device) -> str:
    """Some steps with error feedback. SHA-256 over the sums, which are the same bits on every rank, and by any way."""
    state, residual = algorithm.init(NUMEL, torch.float32, device, transport.size), None
    digest = hashlib.sha256()
    for step in range(STEPS):
        done = algorithm.reduce(gradient(transport.rank, step).to(device), residual, state, step, transport)
        state, residual = done.state, done.residual
        if done.total is not None:
            digest.update(done.total.cpu().numpy().tobytes())
    return digest.hexdigest()


def main(way: str) -> None:
    """One rank: joins the others as a training script would."""
    here = init(
        "mpi4py" if way == "mpi" else way, device="cuda" if way == "nccl" else "cpu", timeout=TIMEOUT, quiet=True
    )
    if way == "mpi":
        from sparcomm.transport.mpi import MpiTransport

        transport: Transport = MpiTransport.world()
    else:
        from sparcomm.transport.torchdist import TorchTransport

        transport = TorchTransport(device=here.device)
    found = reduce(algorithm_from_config({"name": "spardl"}), transport, here.device)
    line = json.dumps({"rank": here.rank, "size": here.size, "launcher": here.launcher, "sha256": found})
    # In one piece with its end, which print writes for itself where torchrun has turned off buffers.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
