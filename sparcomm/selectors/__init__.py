"""Which entries of a vector are sent, one way a file. A file put here is found and can be named in configurations."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from sparcomm.errors import ConfigError
from sparcomm.selectors.base import Choice, Memo, Selector

__all__ = ["Choice", "Memo", "Selector", "make_selector", "registry"]

EXAMPLES = "such as 'topk', 'gaussiank(reestimate_every=32)' or {'name': 'gaussiank', 'guard': False}"
LONGEST = 1000  # characters of a selector's text


def registry() -> dict[str, type[Selector]]:
    """Every selector by its name, sorted."""
    found: dict[str, type[Selector]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Selector) and not inspect.isabstract(cls):
                found[cls.name] = cls
    return dict(sorted(found.items()))


def make_selector(value: Selector | str | Mapping[str, Any]) -> Selector:
    """The selector that ``value`` is, or describes.

    Args:
        value: a selector; its text, ``"name"`` or ``"name(field=literal, ...)"``, as ``str`` of it gives; or a mapping
            of ``name`` and fields.

    Raises:
        ConfigError: anything else, an unknown name or field, or a value that the field does not take. The message
            lists what is valid.
    """
    if isinstance(value, Selector):
        return value
    return _from_text(value) if isinstance(value, str) else _made(_mapped(value))


@functools.lru_cache(maxsize=256)
def _from_text(text: str) -> Selector:
    """Looked up once: a step asks for it several times."""
    return _made(_parsed(text))


def _made(given: dict[str, Any]) -> Selector:
    name = given.pop("name")
    known = registry()
    if name not in known:
        raise ConfigError(f"unknown selector {name!r}{_near(name, known)}: must be one of {_listed(known)}")
    fields = [f.name for f in dataclasses.fields(known[name])]
    for key in given:
        if key not in fields:
            takes = _listed(fields) or "nothing"
            raise ConfigError(f"unknown key {key!r}{_near(key, fields)} for selector {name!r}: it takes {takes}")
    return known[name](**given)


def _parsed(text: str) -> dict[str, Any]:
    """Name and fields of ``name(field=literal, ...)``; nothing is evaluated."""
    wrong = ConfigError(f"selector {text[:LONGEST]!r}: must be a name with literals for its fields, {EXAMPLES}")
    if len(text) > LONGEST:
        raise wrong
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        called = tree.func if isinstance(tree, ast.Call) else tree
        words = tree.keywords if isinstance(tree, ast.Call) else []
        positional = tree.args if isinstance(tree, ast.Call) else []
        values = {word.arg: ast.literal_eval(word.value) for word in words}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise wrong from None
    if not isinstance(called, ast.Name) or positional or None in values or len(values) != len(words):
        raise wrong
    if "name" in values:
        raise ConfigError(f"selector {text!r}: the name stands before the parenthesis")
    return {"name": called.id, **{str(key): value for key, value in values.items()}}


def _mapped(value: Any) -> dict[str, Any]:
    # Callers hand over parsed YAML, whose type is what the file says rather than what an annotation promises.
    if not isinstance(value, Mapping):
        raise ConfigError(f"selector={value!r}: must be a selector, its text or a mapping, {EXAMPLES}")
    given: dict[Any, Any] = dict(value)  # pyright: ignore[reportUnknownArgumentType]
    if not all(isinstance(key, str) for key in given):
        raise ConfigError(f"selector {given!r}: keys must be text")
    if not isinstance(given.get("name"), str):
        problem = f"is {given['name']!r}" if "name" in given else "is missing"
        raise ConfigError(f"selector {given!r}: 'name' {problem}: must be one of {_listed(registry())}")
    return given


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))
