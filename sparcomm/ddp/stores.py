"""What torch's stores do not tell: whether this process hosts one, and whether its host is still there.

A call of a TCPStore whose host has gone prints a page of C++ frames to stderr before it raises. A rank that merely ends
after the host did would print that, too, so the connection is looked at first. It is found among the open files: the
store's ``repr`` names it, but looks up host names, which takes 5 s where no name server answers, with the GIL held.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_GONE = (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


def root_of(store: Any) -> Any:
    """The store beneath all prefixes."""
    while isinstance(store, c10d.PrefixStore):
        store = store.underlying_store
    return store


class Host:
    """The process that hosts ``store``, seen from one that uses it. Knows nothing of stores other than a TCPStore."""

    def __init__(self, store: Any) -> None:
        root = root_of(store)
        tcp = isinstance(root, dist.TCPStore)  # pyright: ignore[reportPrivateImportUsage]
        self._port: int | None = root.port if tcp else None
        found = [(fd, listens, ip) for fd, listens, ip, port in _sockets() if port == self._port] if tcp else []
        self.here = any(listens for _, listens, _ in found)
        connected = {ip: fd for fd, listens, ip in found if not listens}
        # Stores at one port of several machines: which is ours, only a name server could tell.
        self._connection = next(iter(connected.values())) if len(connected) == 1 else None

    def is_up(self) -> bool:
        """False if the host has closed the connection, as it does when it ends. True where that cannot be told."""
        if self._connection is None:
            return True
        try:
            with _socket(self._connection) as peer:
                if peer.getpeername()[1] != self._port:
                    return True  # the file is another one by now
                return peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except OSError as error:
            return error.errno not in _GONE  # EAGAIN: connected, and nothing has come


def _socket(fd: int) -> socket.socket:
    """A duplicate of an open file, to be closed. Raises OSError if it is no socket; nothing is left open then."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _sockets() -> Iterator[tuple[int, bool, str, int]]:
    """(file descriptor, whether it listens, address and port that it listens at or is connected to), all of them."""
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]  # noqa: PTH208  (not paths)
    except OSError:
        return
    for fd in numbers:
        try:
            with _socket(fd) as found:
                if found.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                listens = bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                ip, port = (found.getsockname() if listens else found.getpeername())[:2]
                yield fd, listens, ip, port
        except OSError:
            continue  # no socket, not connected, or closed meanwhile
