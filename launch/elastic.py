#!/usr/bin/env python3
"""The main job, told to lose a worker: what torchrun's restart keeps.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 launch/elastic.py --kill 1@12
        --config configs/digits-spardl.yaml epochs=null steps=20 checkpoint.every=5 output=runs/elastic

Rank 1 ends itself with SIGKILL in step 12, while the others wait for its gradients. torchrun starts all ranks again,
and they go on from their newest checkpoint. Rank 0 prints the sum over all ranks of what they still owe (the residuals)
when a checkpoint is written and when it is taken up, with a hash of its bits, and the weights at the end. Without
``--kill`` (and with another output) it prints what the run would have been.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import sys
from typing import Any

import torch
import train
from torch import Tensor

from jobs.engine import Engine
from jobs.group import Group
from jobs.progress import Display
from sparcomm.errors import ConfigError


class Watched(Engine):
    """An engine that says what is owed, and may die once: rank ``victim`` in step ``last``."""

    victim, last = -1, 0

    def run(self, display: Display) -> dict[str, Any]:
        """Trains, and says what came out."""
        metrics = super().run(display)
        self._say(f"trained {self.step} steps: loss {self.history[-1]['loss']:.6f}, weights {self._weights(metrics)}")
        return metrics

    def train_step(self, index: Tensor, rate: float) -> Tensor:
        """One step, which the victim does not survive in the first life of the job."""
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and self.group.rank == self.victim and self.step + 1 == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(index, rate)

    def save(self) -> None:
        """A checkpoint, and what was owed then."""
        super().save()
        self._tell("checkpoint after")

    def resume(self) -> None:
        """What is owed as soon as a checkpoint has been taken up."""
        super().resume()
        if self.step:
            self._tell("went on after")

    def _tell(self, what: str) -> None:
        total = owed(self.gradients.state_dict(), self.group)
        digest = hashlib.sha256(total.numpy().tobytes()).hexdigest()[:16]
        loss = self.history[-1]["loss"]
        self._say(f"{what} step {self.step}: loss {loss:.6f}, owed {total.sum().item():+.9e}, bits {digest}")

    def _say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    @staticmethod
    def _weights(metrics: dict[str, Any]) -> str:
        summary = metrics["summary"]
        return summary["sha256"][:16] + ("" if summary["identical"] else ", which DIFFER between the ranks")


def owed(gradients: dict[str, Any], group: Group) -> Tensor:
    """The sum over ranks of what they owe, in float64 and in the order of the ranks, all parameters in one vector.

    Collective.
    """
    if gradients["hook"] is None:
        raise ConfigError("algorithm: null leaves nothing to owe: choose one, such as spardl")
    (mine,) = gradients["hook"].values()
    kept = [entry["residuals"][name].flatten() for entry in mine["owed"] for name in sorted(entry["residuals"])]
    every = group.gather(torch.cat(kept).double())
    return torch.stack(every).cumsum(0)[-1]


def victim(text: str) -> tuple[int, int]:
    """RANK@STEP, steps from 1."""
    match = re.fullmatch("([0-9]{1,6})@([1-9][0-9]{0,8})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must look like 1@12, rank 1 in step 12, got {text!r}")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> int:
    """Runs one rank. Returns the exit code, as train.py does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kill", type=victim, metavar="RANK@STEP", help="who dies, and when; the rest is train.py's")
    known, rest = parser.parse_known_args(argv)
    if known.kill:
        Watched.victim, Watched.last = known.kill
    return train.main(rest, Watched)


if __name__ == "__main__":
    sys.exit(main())
