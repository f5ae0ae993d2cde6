"""What a run is: one YAML file plus ``key=value`` overrides, strictly checked before anything is started.

An unknown key, a duplicate or a value of the wrong type ends the run with the list of what is valid.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from jobs.hook import Hook
from jobs.record import recording
from jobs.strict import Count, Fraction, Positive, Strict
from sparcomm.algorithms.base import Algorithm
from sparcomm.config import algorithm_from_config
from sparcomm.errors import ConfigError


class Digits(Strict):
    """scikit-learn's 8x8 digits and a small residual network."""

    name: Literal["digits"]
    width: Positive = 32
    blocks: Positive = 2
    dropout: Fraction = 0.1


class CharLM(Strict):
    """The text of Python's standard library and a GPT-style character model."""

    name: Literal["charlm"]
    layers: Positive = 6
    width: Positive = 128
    heads: Positive = 4
    context: Positive = 128
    dropout: Fraction = 0.0
    validation_windows: Positive = 64

    @model_validator(mode="after")
    def _divisible(self) -> CharLM:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


class Embedding(Strict):
    """The tokens of Python's standard library, told from the hashed n-grams in front of them: mostly an embedding.

    ``layout`` is that of the embedding's gradient; "sparse" wants an optimizer that takes such a gradient.
    """

    name: Literal["embedding"]
    rows: Positive = 24576
    width: Positive = 32
    hidden: Positive = 64
    classes: Positive = 255
    context: Annotated[int, Field(ge=3)] = 6
    validation_samples: Positive = 8192
    layout: Literal["dense", "sparse"] = "dense"


class SGD(Strict):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class AdamW(Strict):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


class HeldAdamW(Strict):
    """``sparcomm.optim.AdamW``: its second moment learns in dense steps only."""

    name: Literal["held_adamw"]
    lr: Annotated[float, Field(gt=0)]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    floor: Annotated[float, Field(ge=0)] = 0.01


class RMSprop(Strict):
    """Division by the root of a running mean of squares, without momentum or weight decay."""

    name: Literal["rmsprop"]
    lr: Annotated[float, Field(gt=0)]
    alpha: Fraction = 0.99
    weight_decay: ClassVar[float] = 0.0


class Signum(Strict):
    """``sparcomm.optim.Signum``: each rank's own momentum, and the sign of what ``algorithm`` makes of all of them."""

    name: Literal["signum"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class Lion(Strict):
    """``sparcomm.optim.DistributedLion``: as Signum, with a direction that is ahead of the momentum."""

    name: Literal["lion"]
    lr: Annotated[float, Field(gt=0)]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class OneBitAdam(Strict):
    """``sparcomm.optim.OneBitAdam``: ``warmup`` dense steps, then a frozen second moment and a compressed first one."""

    name: Literal["onebit_adam"]
    lr: Annotated[float, Field(gt=0)]
    warmup: Positive
    compress: Literal["update", "momentum"] = "update"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


COMMUNICATING = (Signum, Lion, OneBitAdam)


class Schedule(Strict):
    """Learning rate: linear warm-up over ``warmup`` steps, then a cosine down to ``floor`` of its peak."""

    warmup: Count = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0


class Checkpoints(Strict):
    """Every ``every`` steps (0: never), ``keep`` of them stay; ``resume`` continues from the newest complete one."""

    every: Count = 0
    keep: Positive = 2
    resume: bool = True


class Recorded(Strict):
    """``steps`` (the first is 1) whose gradients + residuals rank 0 writes to ``folder`` in the run's own folder."""

    steps: Annotated[list[Positive], Field(min_length=1)]
    folder: Annotated[str, Field(min_length=1)] = "gradients"


class Settings(Strict):
    """One run. ``batch`` counts samples over all ranks; either ``epochs`` or ``steps`` says how long it is.

    ``algorithm`` carries the gradients, or what optimizers that communicate themselves send in their place.
    """

    task: Annotated[Digits | CharLM | Embedding, Field(discriminator="name")]
    optimizer: Annotated[SGD | AdamW | HeldAdamW | RMSprop | Signum | Lion | OneBitAdam, Field(discriminator="name")]
    batch: Positive
    epochs: Positive | None = None
    steps: Positive | None = None
    algorithm: dict[str, Any] | None = None
    hook: Hook = Hook()
    schedule: Schedule = Schedule()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    seed: Count = 0
    evaluate_every: Count = 0
    checkpoint: Checkpoints = Checkpoints()
    bucket_mb: Annotated[float, Field(gt=0, le=1e6)] = 25.0
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    tensorboard: bool = False
    record_gradients: Recorded | None = None
    output: str = ""

    @field_validator("algorithm", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value is not None:
            algorithm_from_config(value)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Settings:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, and not both")
        return self

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if isinstance(self.task, Embedding) and self.task.layout == "sparse":
            self._check_sparse()
        if isinstance(self.optimizer, COMMUNICATING):
            if self.algorithm is None or self.hook != Hook() or self.clip_norm is not None:
                raise ValueError(
                    f"optimizer.name={self.optimizer.name!r} communicates itself: it needs an algorithm, and neither "
                    "hook nor clip_norm, which are about mean gradients, has a meaning"
                )
            return self
        if self.algorithm is None and self.hook != Hook():
            raise ValueError("hook: has no effect with algorithm: null")
        if self.algorithm is None and self.record_gradients is not None:
            raise ValueError("record_gradients: has no effect with algorithm: null")
        momentum = self.optimizer.momentum if isinstance(self.optimizer, SGD) else 0.0
        self.hook.check_optimizer(self.optimizer.name, momentum, self.clip_norm is not None)
        return self

    def _check_sparse(self) -> None:
        """Raises ValueError where something does not take gradients of sparse layout."""
        if self.algorithm is None:
            raise ValueError("task.layout='sparse' needs an algorithm: what DDP's own sum of rows sends is not counted")
        if not isinstance(self.optimizer, SGD) or self.optimizer.weight_decay:
            raise ValueError("task.layout='sparse' wants optimizer.name='sgd' with weight_decay: 0.0")
        if self.hook.memory.name != "error_feedback":
            raise ValueError(f"task.layout='sparse' does not go with hook.memory.name={self.hook.memory.name!r}")
        if self.clip_norm is not None:
            raise ValueError("task.layout='sparse' does not go with clip_norm: use hook.local_clip")

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run is resumed: a step means something else otherwise."""
        names = {
            "optimizer": self.optimizer.name,
            "algorithm": (self.algorithm or {}).get("name"),
            "memory": self.hook.memory.name,
        }
        return {**self.model_dump(include={"task", "batch", "seed"}), **names}

    def build_algorithm(self) -> Algorithm | None:
        """The algorithm that carries the gradients, or the optimizer's part; None leaves DDP to its own all-reduce."""
        if self.algorithm is None:
            return None
        algorithm, recorded = algorithm_from_config(self.algorithm), self.record_gradients
        if recorded is None:
            return algorithm
        return recording(algorithm, Path(self.output) / recorded.folder, frozenset(recorded.steps))


def load(path: Path, overrides: list[str] | None = None) -> Settings:
    """Reads a YAML file and applies overrides such as ``optimizer.lr=0.1`` (values are YAML too).

    Raises:
        ConfigError: no such file, not YAML, or any setting that is not allowed; the message lists what is.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = ", ".join(sorted(p.name for p in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"no configuration {str(path)!r}; in that folder: {there}")
    data = _parse(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of settings, got {type(data).__name__}")
    for override in overrides or []:
        _override(data, override)
    data.setdefault("output", f"runs/{path.stem}")
    return validate(data, str(path))


def validate(data: dict[str, Any], where: str) -> Settings:
    """Settings from parsed YAML. Raises ConfigError, one line per mistake."""
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(mistake)) for mistake in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: 1e-3 is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not valid YAML: {at}{error.problem}") from None
    except yaml.YAMLError as error:  # bytes that are no text
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _override(data: dict[str, Any], text: str) -> None:
    """Sets one value in ``data``, making the sections on the way to it."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {text!r} must look like key=value, for example optimizer.lr=0.1")
    *parents, last = path.split(".")
    for part in parents:
        section: Any = data.get(part)
        if not isinstance(section, dict | None):
            raise ConfigError(f"override {text!r}: {part!r} is a value and has no keys")
        data[part] = {} if section is None else section
        data = data[part]
    data[last] = _parse(value, f"override {text!r}")


def _explain(mistake: dict[str, Any]) -> str:
    """One of pydantic's complaints with what is valid there."""
    loc: tuple[Any, ...] = mistake["loc"]
    # A discriminated union puts its tag into the location, which no one wrote in the file.
    path = ".".join(str(part) for i, part in enumerate(loc) if not (i and part in _tags(_at(loc[:i]))))
    context = mistake.get("ctx", {})
    if mistake["type"] == "extra_forbidden":
        known = sorted(_at(loc[:-1]).model_fields)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key {path!r}{hint}; valid keys there: {', '.join(known)}"
    if mistake["type"] == "missing":
        return f"missing key {path!r}"
    if mistake["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or ", ".join(repr(tag) for tag in _tags(_at(loc)))
        return f"{path}.name must be one of {tags}"
    if isinstance(context.get("error"), Exception):
        return f"{path + ': ' if path else ''}{context['error']}"
    return f"{path}={mistake['input']!r}: {mistake['msg'].lower()}"


def _tags(at: Any) -> dict[str, type[BaseModel]]:
    """The models of a discriminated union by their ``name``; empty for anything else."""
    if getattr(at, "discriminator", None) is None:
        return {}
    return {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(at.annotation)}


def _at(loc: tuple[Any, ...]) -> Any:
    """What is at a location of pydantic's: a model; the field of a discriminated union; None for plain values."""
    at: Any = Settings
    for part in loc:
        if tags := _tags(at):
            at = tags[part]
        elif isinstance(at, type) and issubclass(at, BaseModel) and part in at.model_fields:
            field = at.model_fields[part]
            models = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)]
            at = field if _tags(field) else models[0] if models else None
        else:
            return None
    return at


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
