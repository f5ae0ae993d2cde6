"""From a mapping (a YAML file, a command line) to an algorithm, strictly: a typing mistake never trains silently.

The registry finds the classes; this file reads their fields, so a new algorithm is configurable without a line here.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sparcomm.algorithms import registry
from sparcomm.algorithms.base import Algorithm
from sparcomm.errors import ConfigError
from sparcomm.selectors import Selector, make_selector

# Words for what Python spells otherwise, as YAML and the command line have them.
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}

# What makes a part of a configuration of text or a mapping, by the type that a field is annotated with.
_MAKERS: dict[Any, Callable[[Any], Any]] = {Selector: make_selector}


class Setting(NamedTuple):
    """One field of an algorithm or selector.

    Attributes:
        name: the key in a configuration.
        type: its type, as written in Python.
        default: its default; ``required`` says whether there is none.
        allowed: the values it may take, where the field's metadata lists them as "choices" or it is a bool, else empty.
        doc: what the class's docstring says of it.
    """

    name: str
    type: str
    default: Any
    required: bool
    allowed: tuple[Any, ...]
    doc: str


def settings(cls: type[Algorithm] | type[Selector]) -> list[Setting]:
    """The settings of an algorithm or selector, in the order of its dataclass fields."""
    hints, docs = get_type_hints(cls), _documented(inspect.getdoc(cls) or "")
    return [_setting(f, hints[f.name], docs.get(f.name, "")) for f in dataclasses.fields(cls) if f.init]


def algorithm_from_config(config: Mapping[str, Any]) -> Algorithm:
    """The algorithm that a mapping such as ``{"name": "spardl", "density": 0.01}`` describes.

    Args:
        config: ``name`` is required, every other key is a field of that algorithm. Values must have the field's
            own type (an int serves as a float, a list as a tuple, "none" as None where that is allowed and text is
            not; nothing else is converted). A field that is an algorithm or a selector takes one, a mapping like this,
            or text such as ``spardl(density=0.01)``.

    Raises:
        ConfigError: not a mapping, unknown name or key, mistyped or forbidden value. The message lists what is valid.
    """
    given = _keys(config)
    name = given.pop("name", None)
    known = registry()
    if not isinstance(name, str):
        problem = "is missing" if name is None else f"is {name!r}"
        raise ConfigError(f"algorithm 'name' {problem}: must be one of {_listed(known)}")
    if name not in known:
        raise ConfigError(f"unknown algorithm {name!r}{algorithm_suggestion(name)}: must be one of {_listed(known)}")
    cls = known[name]
    fields = {s.name: s for s in settings(cls)}
    for key in given:
        if key not in fields:
            near, allowed = suggestion(key, fields), _listed(fields) or "nothing"
            raise ConfigError(f"unknown key {key!r}{near} for algorithm {name!r}: it takes {allowed}")
    missing = [s.name for s in fields.values() if s.required and s.name not in given]
    if missing:
        raise ConfigError(f"algorithm {name!r} needs {_listed(missing)}")
    hints = get_type_hints(cls)
    return cls(**{key: _checked(name, fields[key], hints[key], value) for key, value in given.items()})


def algorithm_from_text(text: str) -> Algorithm:
    """The algorithm that text such as ``spardl`` or ``spardl(density=0.01, schedule='direct')`` describes.

    Values are Python literals, single words, or algorithms written in the same way.

    Raises:
        ConfigError: anything else, or what ``algorithm_from_config`` refuses.
    """
    try:
        called = _call(ast.parse(text.strip(), mode="eval").body)
        if called is not None:
            name, keywords = called
            given = {str(k.arg): _literal(k.value) for k in keywords if k.arg is not None}
            if len(given) == len(keywords) and "name" not in given:
                return algorithm_from_config({"name": name, **given})
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"{text!r} is no algorithm: write NAME or NAME(field=value, ...), as in 'spardl(density=0.01)'")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Text such as ``" (did you mean 'spardl'?)"`` for the nearest known word, or nothing."""
    return _nearest(word, {k.lower(): k for k in known})


def algorithm_suggestion(word: str, others: Iterable[str] = ()) -> str:
    """``suggestion`` of an algorithm, by its class's name, too; ``others``: further known words."""
    known = registry()
    classes = {cls.__name__.lower(): name for name, cls in known.items()}
    return _nearest(word, classes | {k.lower(): k for k in (*known, *others)})


def _nearest(word: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean {known[near[0]]!r}?)" if near else ""


def _keys(config: Mapping[str, Any]) -> dict[str, Any]:
    # Callers hand over parsed YAML, whose type is what the file says rather than what the annotation promises.
    config_: Any = config
    if not isinstance(config_, Mapping):
        raise ConfigError(f"algorithm must be a mapping with a 'name', such as {{name: spardl}}, got {config!r}")
    for key in config:
        key_: Any = key
        if not isinstance(key_, str):
            raise ConfigError(f"keys of an algorithm must be text, got {key!r}")
    return dict(config)


def _setting(field: dataclasses.Field[Any], hint: Any, doc: str) -> Setting:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    allowed = tuple(field.metadata.get("choices", (False, True) if hint is bool else ()))
    return Setting(field.name, _named(hint), default, required, allowed, doc)


def _named(hint: Any) -> str:
    """A type as one would write it: without modules."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return " | ".join("None" if p is NoneType else getattr(p, "__name__", str(p)) for p in parts)


def _documented(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` section."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _call(node: ast.expr) -> tuple[str, list[ast.keyword]] | None:
    """Name and fields of an algorithm as text has it; a hyphen in the name reads as a minus."""
    if isinstance(node, ast.Name):
        return node.id, []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return node.func.id, node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and not isinstance(node.left, ast.Call):
        left, right = _call(node.left), _call(node.right)
        if left and right and not left[1]:
            return f"{left[0]}-{right[0]}", right[1]
    return None


def _literal(node: ast.expr) -> Any:
    """A value in the text of an algorithm; words, selectors and other algorithms stay text."""
    called = _call(node)
    if isinstance(node, ast.Call) or (called and called[1]):
        return ast.unparse(node)
    return _WORDS.get(called[0], called[0]) if called else ast.literal_eval(node)


def word(text: str) -> Any:
    """A value as it is typed on the command line: a Python literal, one of a few words for such, or text."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _nested(name: str, setting: Setting, value: Any) -> Algorithm:
    """An algorithm that is a field of algorithm ``name``."""
    if isinstance(value, Algorithm):
        return value
    if not isinstance(value, (str, Mapping)):
        raise ConfigError(
            f"{setting.name}={value!r} for algorithm {name!r}: must be an algorithm, as a mapping with a 'name' or as "
            "text such as 'spardl(density=0.01)'"
        )
    made: Any = value
    try:
        return algorithm_from_text(made) if isinstance(made, str) else algorithm_from_config(made)
    except ConfigError as error:
        raise ConfigError(f"{name}.{setting.name}: {error}") from error


def _tuples(value: Any) -> Any:
    """Lists, which is what YAML has, as the tuples that a frozen configuration holds."""
    items: Any = value
    return tuple(map(_tuples, items)) if isinstance(items, list) else value


def _checked(name: str, setting: Setting, hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Algorithm):
        return _nested(name, setting, value)
    kinds = [kind for kind in (hint, *get_args(hint)) if kind in _MAKERS]
    if kinds and isinstance(value, (str, Mapping)):
        return _MAKERS[kinds[0]](value)
    if isinstance(value, str) and NoneType in get_args(hint) and str not in get_args(hint):
        value = None if value.lower() in ("none", "null") else value
    # A dataclass has a configuration of its own, and takes no other.
    own = bool(dataclasses.is_dataclass(hint))
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=None if own else ConfigDict(arbitrary_types_allowed=True))
    try:
        taken = adapter.validate_python(_tuples(value), strict=True)
    except ValidationError:
        pass
    else:
        if not setting.allowed or taken in setting.allowed:
            return taken
    example = "" if setting.required or setting.default is None else f", such as {setting.default!r}"
    wanted = f"one of {_listed(setting.allowed)}" if setting.allowed else f"of type {setting.type}{example}"
    near = suggestion(value, map(str, setting.allowed)) if isinstance(value, str) else ""
    raise ConfigError(f"{setting.name}={value!r}{near} for algorithm {name!r}: must be {wanted}")


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))
