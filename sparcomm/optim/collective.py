"""Optimizers that communicate: gradients stay on their ranks, what is voted on or summed is the optimizer's own.

A step: every rank makes what it sends of its own gradient and its own momentum, flat, all parameters together; an
algorithm reduces it; all ranks apply the same result, so that replicas stay bit-identical. The step is a transaction:
where an inf or NaN turns up on any rank, nothing changes on any of them.
"""

# The foreach functions are what torch.optim itself is made of, and have no public names.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

import copy
import datetime as dt
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparcomm import __version__, wire
from sparcomm.algorithms.base import Algorithm, Reduced
from sparcomm.errors import CheckpointError, ConfigError, DamagedBag
from sparcomm.kernels import prepare
from sparcomm.optim.buckets import Bucket, make_buckets
from sparcomm.optim.meeting import Meeting
from sparcomm.transport.base import Traffic, Transport

# What settings of a group may be: from, and below.
_RANGES = {
    "lr": (0.0, math.inf), "weight_decay": (0.0, math.inf), "momentum": (0.0, 1.0), "betas": (0.0, 1.0),
    "eps": (2.0**-149, math.inf),  # what is less is zero in float32
}  # fmt: skip
_KEY = "collective"  # of our part of a state_dict


class Sent(NamedTuple):
    """One bucket's way through a step: this rank's gradient, what was made of it to be sent, and what came back."""

    bucket: Bucket
    grad: Tensor
    sent: Tensor
    reduced: Reduced


class CollectiveOptimizer(Optimizer, ABC):
    """Base of the optimizers that communicate. The first step is collective beyond the others: it makes a group.

    Gradients must be each rank's own: ``sparcomm.keep_local(ddp)`` for a DDP module. Without it they are DDP's means:
    the result is then right, but has been sent twice. Weights must be equal on all ranks at the start, as DDP makes
    them; all ranks must call ``step`` equally often. The parameters that require a gradient at the first step are those
    that are trained; one that has no gradient on some ranks counts as zero there, and one that has none on any rank is
    left as it is. After a failed step the group is gone, and every later step fails.

    On a GPU the host waits for the device in every step.

    Args:
        params: parameters, or groups of them.
        defaults: settings of a group.
        algorithm: what carries the vectors.
        process_group: whose ranks train together; None = the default group. Without torch.distributed: this rank alone.
        transport: instead of a process group.
        timeout: seconds (or a timedelta) after which waiting for another rank is an error. How long the first step
            waits until all ranks have come is up to ``process_group``.

    Attributes:
        steps, skipped_steps: how many have been taken, and how many were not, since an inf or NaN was in a gradient.
    """

    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling, and the decision to skip, to ``step``
    communicates = True  # which ``sparcomm.attach`` warns of
    COPIED: ClassVar[tuple[str, ...]] = ("algorithm", "timeout")  # attributes that a copy takes along

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any], algorithm: Algorithm, *,
        process_group: Any = None, transport: Transport | None = None, timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        if not isinstance(algorithm, Algorithm):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"algorithm={algorithm!r}: must be an instance, such as sparcomm.Dense()")
        if getattr(algorithm, "momentum", 0) and defaults.keys() & {"momentum", "betas"}:
            raise ConfigError(
                f"algorithm={algorithm!r}: its momentum would come on top of {type(self).__name__}'s own; leave it out"
            )
        if process_group is not None and transport is not None:
            raise ConfigError("give either process_group or transport, and not both")
        self.algorithm, self.timeout = algorithm, timeout
        self._begin(process_group, transport)
        super().__init__(params, defaults)

    def _begin(self, process_group: Any = None, transport: Transport | None = None) -> None:
        self._group, self._transport = process_group, transport
        self._meeting: Meeting | None = None
        self._buckets: list[Bucket] = []
        self._loaded: dict[str, Any] | None = None
        self.steps = self.skipped_steps = 0

    # ---- what a kind of optimizer says ------------------------------------------------------------------------

    def _carrier(self) -> Algorithm:
        """What reduces in the step to come."""
        return self.algorithm

    @abstractmethod
    def _outgoing(self, bucket: Bucket, grad: Tensor) -> Tensor:
        """(n,) what is sent, made of this rank's gradient. Either may be ``grad`` itself, which may be overwritten.

        What outlives the step must not change here.
        """

    @abstractmethod
    def _advance(self, bucket: Bucket, done: Sent, total: Tensor) -> Tensor:
        """Takes the step in ``bucket.flat``, and returns (n,) by which, times lr, weights shrink.

        ``total`` is the sum over ranks of what was sent. All of ``done`` may be overwritten.
        """

    # ---- a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, together with all other ranks. Returns what ``closure`` returns.

        Raises:
            ConfigError: a gradient of a parameter that did not require one at the first step; or settings that do not
                go with this number of ranks.
            ConfigMismatch, CheckpointError: ranks have different optimizers or learning rates, or stand at different
                steps.
            GradientError: a gradient of sparse layout, or of a dtype that cannot be sent.
            CommunicationError: a rank failed, did not come in time, or sent damaged bytes. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        meeting = self._start() if self._meeting is None else self._meeting
        try:
            self._together(meeting)
        except BaseException as error:
            meeting.abort(error)
            raise
        return loss

    def _start(self) -> Meeting:
        """Makes buckets and group, and takes up what was loaded."""
        buckets = make_buckets(self.param_groups)
        if not buckets:
            raise ConfigError("no parameter requires a gradient: there is nothing to train")
        prepare({bucket.device for bucket in buckets})  # before anyone waits for anyone: compiling takes its time
        meeting = Meeting.join(self._group, self._transport, buckets[0].device, self.timeout)
        try:
            self.algorithm.check_size(meeting.transport.size)
            meeting.agree(self._fields(buckets))
            self._meeting, self._buckets = meeting, buckets
            self._take_up()
        except BaseException as error:
            self._meeting = None
            meeting.abort(error)
            meeting.close()
            raise
        return meeting

    def _fields(self, buckets: list[Bucket]) -> dict[str, str]:
        """What must be the same on all ranks, as text."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "sparcomm": __version__,
            "optimizer": type(self).__name__,
            "settings": repr(settings),
            **{name: repr(getattr(self, name)) for name in self.COPIED if name != "timeout"},
            "environment": repr(self.algorithm.surroundings()),
            "parameters": repr([[(tuple(p.shape), str(p.dtype)) for p in b.params] for b in buckets]),
        }

    def _together(self, meeting: Meeting) -> None:
        transport = meeting.transport
        transport.context = f"{type(self).__name__} step {self.steps}"
        params = [p for bucket in self._buckets for p in bucket.params]
        self._check_layout(params)
        settings = repr([{name: group[name] for name in _RANGES if name in group} for group in self.param_groups])
        absent = meeting.roll_call(self.steps, settings, [p.grad is not None for p in params])
        unused = {id(params[i]) for i in absent}
        done = [self._reduce(bucket, transport) for bucket in self._buckets]
        if all(torch.stack([d.reduced.ok.to(done[0].grad.device) for d in done]).tolist()):
            for d in done:
                self._commit(d, unused)
            self.steps += 1
        else:
            self._drop(done)
            self.skipped_steps += 1

    def _check_layout(self, params: list[Tensor]) -> None:
        known = {id(p) for p in params}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in known:
                    raise ConfigError(
                        f"a parameter of shape {tuple(p.shape)} has a gradient, and required none at the first step: "
                        "make a new optimizer where parameters are thawed"
                    )

    def _reduce(self, bucket: Bucket, transport: Transport) -> Sent:
        grad = bucket.gradient(getattr(self, "grad_scale", None))
        sent = self._outgoing(bucket, grad)
        state = bucket.use(self._carrier(), transport.size)
        return Sent(bucket, grad, sent, self._carrier().reduce(sent, bucket.residual, state, self.steps, transport))

    def _drop(self, done: list[Sent]) -> None:
        """Leaves everything as it was before the step."""
        for bucket, grad, sent, reduced in done:
            bucket.space.give(grad, sent, reduced.total, reduced.residual)
            damage = reduced.state.damage
            if damage is not None and bool(damage & wire.DAMAGED):
                raise DamagedBag(f"step {self.steps}: bytes that arrived are not what was sent")

    def _commit(self, done: Sent, unused: set[int]) -> None:
        bucket, grad, sent, reduced = done
        assert reduced.total is not None
        owed = bucket.residual
        idle = [i for i, p in enumerate(bucket.params) if id(p) in unused]
        kept = [(flat, i, bucket.views(flat)[i].clone()) for flat in bucket.flat.values() for i in idle]
        by = self._advance(bucket, done, reduced.total)
        for flat, i, before in kept:
            bucket.views(flat)[i].copy_(before)
        if idle and reduced.residual is not None:
            now, before = bucket.views(reduced.residual), None if owed is None else bucket.views(owed)
            for i in idle:
                now[i].zero_() if before is None else now[i].copy_(before[i])
        self._apply(bucket, by, unused)
        bucket.state, bucket.residual = reduced.state, reduced.residual
        bucket.space.give(grad, sent, reduced.total, by, None if owed is reduced.residual else owed)

    def _apply(self, bucket: Bucket, by: Tensor, unused: set[int]) -> None:
        views = dict(zip(map(id, bucket.params), bucket.views(by), strict=True))
        for span in bucket.spans:
            group, params = self.param_groups[span.group], [p for p in span.params if id(p) not in unused]
            if not params:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [views[id(p)] for p in params], alpha=-group["lr"])

    # ---- groups, traffic, the end -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer, before the first step. Raises ConfigError after it, or for settings out of range."""
        if self._meeting is not None:
            raise ConfigError("parameters can be added before the first step only: make a new optimizer")
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent and received for this optimizer, roll calls included."""
        return Traffic() if self._meeting is None else self._meeting.transport.traffic

    def seconds(self) -> dict[str, float]:
        """Host seconds spent selecting, coding and on the wire so far, by phase."""
        found: Counter[str] = Counter()
        for bucket in self._buckets:
            found.update(bucket.clock.seconds)
        return dict(found)

    def close(self) -> None:
        """Ends the group that the first step made; later steps raise PeerError. Happens at exit by itself."""
        if self._meeting is not None:
            self._meeting.close()

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's own part of a checkpoint, as copies: momentum, what is owed and the step number.

        Momentum before a vote and residuals differ between ranks, so every rank saves its own and loads its own; the
        run then goes on bit for bit. Another rank's, or one of another number of ranks, gives its momentum and owes
        nothing.
        """
        return {**super().state_dict(), _KEY: self._snapshot()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave. Raises CheckpointError for another kind of optimizer or parameters.

        What does not fit is found at once after the first step, else in it.
        """
        found = state_dict.get(_KEY)
        if found is None or found["kind"] != type(self).__name__:
            kind = "another library's optimizer" if found is None else found["kind"]
            raise CheckpointError(f"the state is of {kind}, and this is {type(self).__name__}")
        if self._meeting is not None:
            self._check_fits(found)
        super().load_state_dict(state_dict)
        self._remember(copy.deepcopy(found))
        if self._meeting is not None:
            self._take_up()

    def _remember(self, snapshot: dict[str, Any]) -> None:
        """To be taken up when the buckets are there."""
        self._loaded, self.steps, self.skipped_steps = snapshot, snapshot["steps"], snapshot["skipped_steps"]

    def _snapshot(self) -> dict[str, Any]:
        if self._loaded is not None:  # and not taken up yet
            return copy.deepcopy(self._loaded)
        transport = None if self._meeting is None else self._meeting.transport
        return {
            "kind": type(self).__name__,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "place": [] if transport is None else [transport.rank, transport.size],
            "buckets": [bucket.state_dict() for bucket in self._buckets],
        }

    def _take_up(self) -> None:
        found = self._loaded
        if found is None or self._meeting is None:
            return
        self._check_fits(found)
        transport, self._loaded = self._meeting.transport, None
        own = found["place"] == [transport.rank, transport.size]
        for bucket, part in zip(self._buckets, found["buckets"], strict=False):
            bucket.load(part, self._carrier(), transport.size, own=own)

    def _check_fits(self, found: dict[str, Any]) -> None:
        """Raises CheckpointError unless what was saved is of these parameters."""
        saved = found["buckets"]
        if saved and len(saved) != len(self._buckets):
            raise CheckpointError(f"the optimizer's state has {len(saved)} dtypes, the parameters {len(self._buckets)}")
        for bucket, part in zip(self._buckets, saved, strict=False):
            bucket.check_fits(part)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which start in the default group. Raises ConfigError if this one was given another."""
        if self._group is not None or self._transport is not None:
            raise ConfigError(
                "an optimizer with a group of its own cannot be copied: make a new one, and load its state"
            )
        own = {name: getattr(self, name) for name in self.COPIED}
        return {**super().__getstate__(), "own": own, "snapshot": self._snapshot()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or torch's own use of it in ``load_state_dict``."""
        if "own" in state:
            state = dict(state)
            self._begin()
            for name, value in state.pop("own").items():
                setattr(self, name, value)
            self._remember(state.pop("snapshot"))
        super().__setstate__(state)


def _check_settings(group: dict[str, Any]) -> None:
    """Raises ConfigError for a setting out of range."""
    for name in _RANGES.keys() & group.keys():
        (least, end), value = _RANGES[name], group[name]
        if name == "betas" and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise ConfigError(f"{name}={value!r}: must be two numbers")
        for part in value if name == "betas" else (value,):
            if isinstance(part, bool) or not isinstance(part, (int, float)) or not least <= part < end:
                raise ConfigError(f"{name}={value!r}: must be in [{least}, {end})")
