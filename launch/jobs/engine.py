"""The training loop: ordinary DDP, with the gradients' way chosen by the configuration."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs import checkpoint, data, models
from jobs.group import Group, fingerprint, seed_everything
from jobs.progress import Display
from jobs.settings import (
    SGD,
    CharLM,
    Digits,
    Embedding,
    HeldAdamW,
    Lion,
    OneBitAdam,
    RMSprop,
    Schedule,
    Settings,
    Signum,
)  # fmt: skip
from jobs.traffic import Gradients, trainable
from sparcomm import optim
from sparcomm.errors import ConfigError

Record = dict[str, float]


class Engine:
    """One rank of a run."""

    def __init__(self, settings: Settings, group: Group) -> None:
        seed_everything(settings.seed)
        self.settings, self.group = settings, group
        self.split = load_data(settings.task)
        self.sampler = data.Sampler(len(self.split.train), settings.batch, group.rank, group.size, settings.seed)
        self.total = settings.steps or (settings.epochs or 0) * len(self.sampler)
        check_recorded(settings, self.total)
        self.model = build_model(settings.task).to(group.device)
        self.ddp = DistributedDataParallel(
            self.model,
            device_ids=[group.device] if group.device.type == "cuda" else None,
            bucket_cap_mb=settings.bucket_mb,
        )
        self.optimizer = build_optimizer(settings, self.ddp)
        self.gradients = Gradients(self.ddp, settings, group, self.optimizer)
        self.step = 0
        self.seconds = 0.0
        self.history: list[Record] = []
        seed_everything(settings.seed, group.rank)

    @property
    def folder(self) -> Path:
        """Where this run's checkpoints lie."""
        return Path(self.settings.output) / "checkpoints"

    def run(self, display: Display) -> dict[str, Any]:
        """Trains to the end and returns what ``report.write`` takes; collective."""
        if self.settings.checkpoint.resume:
            self.resume()
        display.begin(self.total, self.step)
        try:
            while self.step < self.total:
                epoch, start = divmod(self.step, len(self.sampler))
                for index in self.sampler.indices(epoch, start):
                    self._one(index, display)
                    if self.step == self.total:
                        break
        except RuntimeError:
            # Autograd turns every exception of a hook into a RuntimeError; the hook still has the original.
            self.gradients.raise_if_failed()
            raise
        return {
            "settings": self.settings.model_dump(),
            "summary": self.summary(self.evaluate()),
            "history": self.history,
        }

    def _one(self, index: Tensor, display: Display) -> None:
        """One step, its record, and what is due after it."""
        begin = time.perf_counter()
        before = self.gradients.bytes_sent
        rate = self.settings.optimizer.lr * learning_rate(self.step, self.total, self.settings.schedule)
        loss = self.train_step(index, rate)
        self.step += 1
        self.gradients.step_done()
        mean = float(self.group.mean(loss))
        taken = time.perf_counter() - begin
        self.seconds += taken
        total = self.gradients.bytes_sent
        record = {"step": self.step, "loss": mean, "rate": rate, "seconds": taken, "bytes": total - before}
        self.history.append({**record, "bytes_total": total, "ratio": self.gradients.ratio})
        display.show(self.history[-1], self.total)
        self._due(display)

    def train_step(self, index: Tensor, rate: float) -> Tensor:
        """Forward, backward (where the gradients travel), update. Returns this rank's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, y = self.split.train.take(index)
        self.optimizer.zero_grad(set_to_none=True)
        loss = models.loss(self.ddp(x.to(self.group.device)), y.to(self.group.device))
        loss.backward()
        if self.settings.clip_norm is not None:
            self.gradients.clip(self.settings.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _due(self, display: Display) -> None:
        every = self.settings.evaluate_every
        if every and self.step % every == 0 and self.step < self.total:
            display.evaluated(self.step, self.evaluate())
        every = self.settings.checkpoint.every
        if every and self.step % every == 0:
            self.save()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores over the whole held-out set, each rank taking its share; collective."""
        self.model.eval()
        test, group = self.split.test, self.group
        sums = torch.zeros(3, dtype=torch.float64, device=group.device)  # loss, right, count
        for index in torch.arange(group.rank, len(test), group.size).split(256):
            x, y = (part.to(group.device) for part in test.take(index))
            logits = self.model(x)
            right = (logits.argmax(-1) == y).sum()
            count = torch.full_like(right, y.numel())
            sums += torch.stack([models.loss(logits, y) * count, right, count])
        self.model.train()
        loss, right, count = group.total(sums).tolist()
        if isinstance(self.settings.task, CharLM):
            return {"loss": loss / count, "bits": loss / count / math.log(2)}
        return {"loss": loss / count, "accuracy": right / count}

    def summary(self, scores: dict[str, float]) -> dict[str, Any]:
        """The run in a few numbers; collective, since it compares all replicas."""
        prints = self.group.gather(fingerprint(self.model))
        sent = max(self.group.gather(self.gradients.bytes_sent))
        dense = self.gradients.per_step * self.step
        return {
            "algorithm": (self.settings.algorithm or {"name": "ddp"})["name"],
            "scores": scores,
            "train_loss": sum(r["loss"] for r in self.history[-20:]) / max(1, len(self.history[-20:])),
            "steps": self.step,
            "size": self.group.size,
            "parameters": trainable(self.model),
            "seconds": self.seconds,
            "bytes_sent": sent,
            "ratio": dense / sent if sent else 1.0,
            "phases": self.gradients.seconds(),
            "identical": len(set(prints)) == 1,
            "sha256": prints[0],
        }

    def save(self) -> None:
        """Writes a checkpoint; collective."""
        model: dict[str, Any] = {}
        if self.group.rank == 0:
            model = {
                "identity": self.settings.identity(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
            }
        own = {"gradients": self.gradients.state_dict(), "random": torch.get_rng_state()}
        if self.group.device.type == "cuda":
            own["random_cuda"] = torch.cuda.get_rng_state()
        checkpoint.save(self.folder, self.step, model, own, self.group.rank, self.group.size, self.group.barrier)
        if self.group.rank == 0:
            checkpoint.prune(self.folder, self.settings.checkpoint.keep)

    def resume(self) -> None:
        """Continues from the newest complete checkpoint, if there is one; collective.

        With the number of ranks it was written with, the run goes on bit for bit as if it had never stopped.
        """
        found = self.group.gather(str(checkpoint.newest(self.folder) or ""))[0]
        if not found:
            return
        shared = checkpoint.read_model(Path(found))
        checkpoint.check_same_run(Path(found), shared["identity"], self.settings.identity())
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.step, self.seconds, self.history = shared["step"], shared["seconds"], shared["history"]
        own = checkpoint.read_ranks(Path(found), self.group.rank, self.group.size)
        self.gradients.load_state_dict([part["gradients"] for part in own])
        if len(own) == 1:
            torch.set_rng_state(own[0]["random"])
            if self.group.device.type == "cuda" and "random_cuda" in own[0]:
                torch.cuda.set_rng_state(own[0]["random_cuda"])
        else:
            seed_everything(self.settings.seed, self.group.rank, self.step)


def check_recorded(settings: Settings, total: int) -> None:
    """Raises ConfigError if gradients are to be recorded in a step that a run of ``total`` steps does not have."""
    last = 0 if settings.record_gradients is None else max(settings.record_gradients.steps)
    if last > total:
        raise ConfigError(f"record_gradients.steps: there is no step {last}, the last one is {total}")


def learning_rate(step: int, total: int, schedule: Schedule) -> float:
    """The fraction of the peak learning rate used in step ``step`` (from 0)."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, total - schedule.warmup)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))


def load_data(task: Digits | CharLM | Embedding) -> data.Split:
    """The task's data."""
    if isinstance(task, Embedding):
        return data.tokens(task.context, task.rows, task.classes, task.validation_samples)
    return data.digits() if isinstance(task, Digits) else data.charlm(task.context, task.validation_windows)


def build_model(task: Digits | CharLM | Embedding) -> nn.Module:
    """The task's model."""
    if isinstance(task, Embedding):
        sparse = task.layout == "sparse"
        return models.GramNet(task.rows, task.width, task.context + 2, task.hidden, task.classes, sparse)
    if isinstance(task, Digits):
        return models.DigitsNet(task.width, task.blocks, task.dropout)
    return models.CharGPT(task.layers, task.width, task.heads, task.context, task.dropout)


def build_optimizer(settings: Settings, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer; weight decay spares biases and norms."""
    chosen = settings.optimizer
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if isinstance(chosen, SGD):
        return torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.momentum, nesterov=chosen.nesterov)
    if isinstance(chosen, RMSprop):
        return torch.optim.RMSprop(groups, lr=chosen.lr, alpha=chosen.alpha)
    told: dict[str, Any] = {"lr": chosen.lr, "algorithm": settings.build_algorithm(), "timeout": settings.timeout}
    if isinstance(chosen, Signum):
        return optim.Signum(groups, momentum=chosen.momentum, **told)
    betas = (chosen.beta1, chosen.beta2)
    if isinstance(chosen, Lion):
        return optim.DistributedLion(groups, betas=betas, **told)
    if isinstance(chosen, OneBitAdam):
        own = {"eps": chosen.eps, "warmup": chosen.warmup, "compress": chosen.compress}
        return optim.OneBitAdam(groups, betas=betas, **own, **told)
    if isinstance(chosen, HeldAdamW):
        return optim.AdamW(groups, lr=chosen.lr, betas=betas, floor=chosen.floor)
    return torch.optim.AdamW(groups, lr=chosen.lr, betas=betas)
