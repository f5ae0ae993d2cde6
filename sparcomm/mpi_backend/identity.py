"""What a process group says of itself to torch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

NAME = "mpi4py"
# torch's short and long forms of one method, and its older names for others, are more than type checkers can follow.
Base: Any = dist.ProcessGroup


class Identity(Base):
    """Rank, size and names of a group.

    Args:
        store: the group's own part of torch's store.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._store = rank, size, store
        self._called: list[str] = ["", "undefined"]  # the group's name and description

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """The name it is registered under."""
        return NAME

    def getRank(self) -> int:  # noqa: N802
        """This rank in the group."""
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        """Ranks of the group."""
        return self._size

    def name(self) -> str:
        """The name it is registered under."""
        return NAME

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """The name under which functional collectives find it."""
        self._called[0] = name

    def getGroupName(self) -> str:  # noqa: N802
        """The name under which functional collectives find it."""
        return self._called[0]

    def setGroupDesc(self, text: str) -> None:  # noqa: N802
        """What it is for."""
        self._called[1] = text

    def getGroupDesc(self) -> str:  # noqa: N802
        """What it is for."""
        return self._called[1]

    def get_group_store(self) -> Any:
        """The group's own part of torch's store."""
        return self._store
