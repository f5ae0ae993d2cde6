"""Which ranks share a node: cut into teams of the node and teams across nodes, or an error that all ranks see alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparcomm.collectives.groups import split_once
from sparcomm.errors import ConfigError
from sparcomm.transport.base import Transport

LOCAL_SIZE = "LOCAL_WORLD_SIZE"  # set by torchrun
_ASKED, _ELSEWHERE = 32, 1 << 31  # bits of a color for what its rank takes for granted, and one of these


@dataclass(frozen=True)
class Nodes:
    """Nodes of equally many ranks. Made often: it holds nothing else.

    Attributes:
        local_size: ranks of a node; None: what LOCAL_WORLD_SIZE says. Which ones they are the transport knows, or they
            are numbered one after the other.
        groups: the ranks of every node instead, where they are numbered otherwise.
    """

    local_size: int | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def check_settings(self) -> None:
        """Raises ConfigError for what is no number of ranks, or no groups of ranks, of one length, no rank twice."""
        local: Any = self.local_size
        if local is not None and (isinstance(local, bool) or not isinstance(local, int) or local < 1):
            raise ConfigError(f"local_size={local!r}: must be a number of ranks, at least 1, or None")
        if self.groups is not None:
            if local is not None:
                raise ConfigError(f"local_size={local} and groups={self.groups}: give one of them")
            _check_groups(self.groups)

    @property
    def per_node(self) -> int:
        """Ranks of a node. Raises ConfigError if nothing says it."""
        if self.groups is not None:
            return len(self.groups[0])
        if self.local_size is not None:
            return self.local_size
        found = os.environ.get(LOCAL_SIZE, "")
        if not (found.isdecimal() and 0 < int(found) < _ELSEWHERE):
            said = f"{LOCAL_SIZE}={found!r}" if found else f"{LOCAL_SIZE} is not set"
            raise ConfigError(
                f"hierarchical: how many ranks a node has is unknown ({said}): start with torchrun or "
                "mpirun, or give local_size= or groups="
            )
        return int(found)

    def surroundings(self) -> dict[str, str]:
        """The variable that decides, if one does, by its name."""
        decides = self.local_size is None and self.groups is None
        return {LOCAL_SIZE: os.environ.get(LOCAL_SIZE, "(not set)")} if decides else {}

    def check_size(self, size: int) -> None:
        """Raises ConfigError unless ``size`` ranks make whole nodes."""
        if self.groups is not None:
            if sorted(r for group in self.groups for r in group) != list(range(size)):
                raise ConfigError(f"groups={self.groups}: must name every rank from 0 to {size - 1} once")
        elif size % (s := self.per_node):
            raise ConfigError(_uneven([s] * (size // s) + [size % s], {s}))

    def teams(self, transport: Transport) -> tuple[Transport, Transport]:
        """(this rank's node, the ranks of all nodes that have its local number). Collective at the first call.

        Raises:
            ConfigError: nodes are not equal; on all ranks, whatever each of them had been told.
        """
        size, per_node = transport.size, self.per_node
        if self.groups is not None:
            self.check_size(size)
            place = [rank for group in self.groups for rank in group].index(transport.rank)
        else:
            place = in_order_of_nodes(transport.nodes, size, per_node).index(transport.rank)
        number, key = divmod(place, per_node)
        # A color holds how many its rank takes to be in the group, so that all ranks see from the sizes who is wrong.
        name = f"of {per_node} by {self.groups}"
        mark = _ELSEWHERE if self._elsewhere(transport) else 0
        node = split_once(transport, f"node {name}", number << _ASKED | mark | per_node, key)
        counts, asked = list(node.siblings.values()), {color & (1 << _ASKED) - 1 for color in node.siblings}
        if any(each & _ELSEWHERE for each in asked):
            raise ConfigError(
                "hierarchical: the ranks of a node are not numbered one after the other (rank modulo LOCAL_WORLD_SIZE "
                "is not LOCAL_RANK), and this transport does not know which ones they are: start the ranks node by "
                "node (mpirun --map-by slot, srun --distribution=block), or give groups="
            )
        if len(asked) > 1 or asked != set(counts):
            raise ConfigError(_uneven(counts, asked))
        if per_node == 1:
            return node, transport
        return node, split_once(transport, f"across nodes {name}", node.rank, number)

    def _elsewhere(self, transport: Transport) -> bool:
        """Whether the launcher has put this rank on another node than its number says."""
        if self.groups is not None or self.local_size is not None or transport.nodes:
            return False
        rank, size, local = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        whole = (rank, size) == (str(transport.rank), str(transport.size))
        return whole and local.isdecimal() and int(local) != transport.rank % self.per_node


def in_order_of_nodes(nodes: Sequence[Sequence[int]], size: int, per_node: int) -> list[int]:
    """All ranks, in an order in which every ``per_node`` that follow one another share a node, if ``nodes`` can be cut.

    Args:
        nodes: the ranks of each; () where they are not known: then, as where they cannot be cut, by number.
    """
    if any(len(node) % per_node for node in nodes):
        nodes = ()
    return [rank for node in nodes for rank in node] or list(range(size))


def _check_groups(groups: Any) -> None:
    tuples = isinstance(groups, tuple) and groups and all(isinstance(g, tuple) and g for g in groups)
    if not tuples or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for g in groups for r in g):
        raise ConfigError(f"groups={groups!r}: must be the ranks of every node, such as ((0, 1), (2, 3)), or None")
    ranks = [r for g in groups for r in g]
    if len(set(ranks)) < len(ranks):
        raise ConfigError(f"groups={groups!r}: names a rank twice")
    if len({len(g) for g in groups}) > 1:
        raise ConfigError(_uneven([len(g) for g in groups], set(map(len, groups))))


def _uneven(counts: Sequence[int], asked: set[int]) -> str:
    return (
        f"hierarchical: {sum(counts)} ranks make nodes of {', '.join(map(str, counts))}, where "
        f"{' or '.join(map(str, sorted(asked)))} were asked for: all nodes must have the same number of ranks; "
        "local_size= a divisor, or groups=, cuts them otherwise"
    )
