"""What torch's stores do not tell: whether this process hosts one, and whether its host is still there.

A call of a TCPStore whose host has gone prints a page of C++ frames to stderr before it raises. A rank that merely ends
after the host did would print that, too, so the socket is looked at first.
"""

from __future__ import annotations

import os
import re
import socket
from typing import Any

from torch.distributed import distributed_c10d as c10d

_CLIENT = re.compile(r"client=TCPClient\(SocketImpl\(fd=(\d+)")
_SERVER = re.compile(r"server=TCPServer\(")


def root_of(store: Any) -> Any:
    """The store beneath all prefixes."""
    while isinstance(store, c10d.PrefixStore):
        store = store.underlying_store
    return store


def hosts(store: Any) -> bool:
    """Whether other processes reach this store through this one. False where that cannot be told."""
    return bool(_SERVER.search(repr(root_of(store))))


def is_up(store: Any) -> bool:
    """False if the store's host has closed the connection, as it does when it ends. True where that cannot be told."""
    found = _CLIENT.search(repr(root_of(store)))
    if found is None:
        return True
    try:
        with socket.socket(fileno=os.dup(int(found.group(1)))) as peer:
            return peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True  # connected, and nothing has come
    except OSError:
        return False
