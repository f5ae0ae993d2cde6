"""Sub-groups that are made once: making one costs connections and a rendezvous, and every step wants the same."""

from __future__ import annotations

from sparcomm.errors import ConfigError
from sparcomm.transport.base import Transport


def split_once(transport: Transport, name: str, color: int, key: int) -> Transport:
    """``transport.split(color, key)``, made at the first call of this ``name`` and kept as long as ``transport``.

    Collective at the first call. The group belongs to ``transport``, and is closed with it.

    Args:
        name: of this way to cut the group, the same on all ranks at the same point of the program.
        color, key: see ``Transport.split``; the same at every call of one name.

    Raises:
        ConfigError: the name was used with another color or key before.
    """
    if name not in transport.subgroups:
        transport.subgroups[name] = color, key, transport.split(color, key)
    known_color, known_key, group = transport.subgroups[name]
    if (known_color, known_key) != (color, key):
        raise ConfigError(
            f"sub-group {name!r} was made with color {known_color} and key {known_key}, and is now asked for with "
            f"color {color} and key {key}: another cut needs another name"
        )
    return group
