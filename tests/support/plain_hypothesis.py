"""Random examples where Hypothesis is not installed: as much of its interface as tests here use, and no shrinking.

For GPUs that are borrowed with PyTorch, CuPy, Numba and pytest alone: ``support.borrowed`` puts it in Hypothesis' place
there. Examples depend on the test's name alone, and a failing one is printed.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import struct
import types
import zlib
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from typing import Any, ClassVar

TRIES = 1000  # draws after which a filter is given up


class HealthCheck(Enum):
    """Names only."""

    too_slow = 1
    data_too_large = 2


class settings:  # noqa: N801  (Hypothesis' name)
    """How many examples a test has; everything else is taken and ignored."""

    _profiles: ClassVar[dict[str, settings]] = {}
    _examples = 25

    def __init__(self, parent: settings | None = None, *, max_examples: int | None = None, **ignored: Any) -> None:
        self.max_examples = max_examples or (parent.max_examples if parent else None)

    def __call__(self, test: Any) -> Any:
        test.max_examples = self.max_examples
        return test

    @classmethod
    def register_profile(cls, name: str, parent: settings | None = None, **given: Any) -> None:
        cls._profiles[name] = cls(parent, **given)

    @classmethod
    def get_profile(cls, name: str) -> settings:
        return cls._profiles[name]

    @classmethod
    def load_profile(cls, name: str) -> None:
        cls._examples = cls._profiles[name].max_examples or cls._examples

    @classmethod
    def examples(cls, test: Any) -> int:
        return getattr(test, "max_examples", None) or cls._examples


class Strategy:
    """Draws values by a function of a random generator."""

    def __init__(self, draw: Callable[[random.Random], Any]) -> None:
        self.draw = draw

    def __or__(self, other: Strategy) -> Strategy:
        return one_of(self, other)

    def map(self, change: Callable[[Any], Any]) -> Strategy:
        return Strategy(lambda r: change(self.draw(r)))

    def filter(self, allowed: Callable[[Any], Any]) -> Strategy:
        def draw(r: random.Random) -> Any:
            for _ in range(TRIES):
                if allowed(value := self.draw(r)):
                    return value
            raise ValueError(f"none of {TRIES} examples is allowed")

        return Strategy(draw)


class DataObject:
    """Draws within a test."""

    def __init__(self, r: random.Random) -> None:
        self._random = r
        self.drawn: list[Any] = []

    def draw(self, strategy: Strategy, label: str | None = None) -> Any:
        self.drawn.append(strategy.draw(self._random))
        return self.drawn[-1]

    def __repr__(self) -> str:
        return f"data drawn: {self.drawn!r}"


DrawFn = Callable[[Strategy], Any]


def integers(min_value: int | None = None, max_value: int | None = None) -> Strategy:
    low = min_value if min_value is not None else (max_value or 0) - (1 << 64)
    high = max_value if max_value is not None else (min_value or 0) + (1 << 64)
    if low > high:
        raise ValueError(f"no integer is from {low} to {high}")

    def draw(r: random.Random) -> int:
        kind = r.random()
        if kind < 0.15:
            return r.choice([low, high, min(max(0, low), high)])
        if kind < 0.4:  # small ones are where loops end
            return min(high, low + r.getrandbits(r.randint(1, 12)))
        return r.randint(low, high)

    return Strategy(draw)


def floats(
    min_value: float | None = None, max_value: float | None = None, *, width: int = 64, allow_nan: bool | None = None,
    allow_infinity: bool | None = None,
) -> Strategy:  # fmt: skip
    bounded = min_value is not None or max_value is not None
    nan, infinity = (not bounded if allow is None else allow for allow in (allow_nan, allow_infinity))
    low, high = (bound if bound is not None else sign * 1e30 for bound, sign in ((min_value, -1.0), (max_value, 1.0)))
    form = {64: ("Q", "d"), 32: ("I", "f"), 16: ("H", "e")}[width]

    def rounded(x: float) -> float:
        return struct.unpack(form[1], struct.pack(form[1], x))[0]

    def draw(r: random.Random) -> float:
        if bounded:
            return min(max(rounded(r.choice([low, high, r.uniform(low, high), r.uniform(low, high)])), low), high)
        odd = [0.0, -0.0, 1.0, -1.0, rounded(1 / 3), math.nan, math.inf, -math.inf]
        x = r.choice(odd) if r.random() < 0.3 else struct.unpack(form[1], struct.pack(form[0], r.getrandbits(width)))[0]
        return 1.5 if (math.isnan(x) and not nan) or (math.isinf(x) and not infinity) else x

    return Strategy(draw)


def booleans() -> Strategy:
    return sampled_from([False, True])


def none() -> Strategy:
    return just(None)


def just(value: Any) -> Strategy:
    return Strategy(lambda r: value)


def sampled_from(values: Iterable[Any]) -> Strategy:
    known = list(values)
    return Strategy(lambda r: r.choice(known))


def one_of(*strategies: Strategy) -> Strategy:
    return Strategy(lambda r: r.choice(strategies).draw(r))


def tuples(*strategies: Strategy) -> Strategy:
    return Strategy(lambda r: tuple(s.draw(r) for s in strategies))


def lists(
    elements: Strategy, *, min_size: int = 0, max_size: int | None = None, unique: bool = False,
    unique_by: Callable[[Any], Hashable] | None = None,
) -> Strategy:  # fmt: skip
    most = min_size + 10 if max_size is None else max_size
    key = unique_by or ((lambda x: x) if unique else None)

    def draw(r: random.Random) -> list[Any]:
        size = r.choice([min_size, most, r.randint(min_size, most), r.randint(min_size, most)])
        if key is None:
            return [elements.draw(r) for _ in range(size)]
        found: dict[Hashable, Any] = {}
        for _ in range(TRIES + size):
            if len(found) == size:
                break
            value = elements.draw(r)
            found.setdefault(key(value), value)
        if len(found) < min_size:
            raise ValueError(f"only {len(found)} different examples were found, not {min_size}")
        return list(found.values())

    return Strategy(draw)


def sets(elements: Strategy, *, min_size: int = 0, max_size: int | None = None) -> Strategy:
    return lists(elements, min_size=min_size, max_size=max_size, unique=True).map(set)


def dictionaries(keys: Strategy, values: Strategy, *, min_size: int = 0, max_size: int | None = None) -> Strategy:
    pairs = lists(tuples(keys, values), min_size=min_size, max_size=max_size, unique_by=lambda pair: pair[0])
    return pairs.map(dict)


def binary(*, min_size: int = 0, max_size: int | None = None) -> Strategy:
    return lists(integers(0, 255), min_size=min_size, max_size=max_size).map(bytes)


def text(*, min_size: int = 0, max_size: int | None = None) -> Strategy:
    return lists(sampled_from("abz019 _-=(),'\"\\\n\0äß€"), min_size=min_size, max_size=max_size).map("".join)


def data() -> Strategy:
    return Strategy(DataObject)


def composite(made: Callable[..., Any]) -> Callable[..., Strategy]:
    def strategy(*args: Any, **kwargs: Any) -> Strategy:
        return Strategy(lambda r: made(lambda inner: inner.draw(r), *args, **kwargs))

    return functools.wraps(made)(strategy)


def given(*positional: Strategy, **named: Strategy) -> Callable[[Any], Any]:
    """Calls a test with many examples; strategies without a name are for its last arguments."""

    def decorate(test: Any) -> Any:
        signature = inspect.signature(test)
        names = list(signature.parameters)
        last = names[len(names) - len(positional) :]
        strategies = {**named, **dict(zip(last, positional, strict=True))}

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            r = random.Random(zlib.crc32(test.__qualname__.encode()))
            for _ in range(settings.examples(run)):
                drawn = {name: strategy.draw(r) for name, strategy in strategies.items()}
                try:
                    test(*args, **kwargs, **drawn)
                except BaseException:
                    print(f"falsified by {drawn!r}")
                    raise

        kept = [p for name, p in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


strategies = types.ModuleType("hypothesis.strategies")
for _name in (
    "DataObject", "DrawFn", "binary", "booleans", "composite", "data", "dictionaries", "floats", "integers", "just",
    "lists", "none", "one_of", "sampled_from", "sets", "text", "tuples",
):  # fmt: skip
    setattr(strategies, _name, globals()[_name])
