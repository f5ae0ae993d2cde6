"""The environment variables by which torch and others know a rank: written for this process, or for ranks it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from sparcomm.launch.environment import Found


def export(found: Found) -> None:
    """Sets them for this process, where they are unset. MPI may have set the address meanwhile."""
    values = {
        "RANK": found.rank,
        "WORLD_SIZE": found.size,
        "LOCAL_RANK": found.local_rank,
        "LOCAL_WORLD_SIZE": found.local_size,
        "MASTER_ADDR": found.host,
        "MASTER_PORT": found.port,
    }
    for name, value in values.items():
        if not os.environ.get(name) and value is not None:
            os.environ[name] = str(value)


def of_ranks(size: int, port: int, base: Mapping[str, str]) -> list[dict[str, str]]:
    """For ranks on this machine, by rank: ``base``, and that they meet in a store that the caller keeps at ``port``."""
    shared = {
        **base,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the caller's, as torchrun's agent has one: so no port has to be free at the right moment.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if sys.platform == "linux":
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
