"""Hosts on one machine: network namespaces with a name, an address and a link each, behind one bridge.

Processes in them share nothing but files and real TCP. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ETC = Path("/etc/netns")  # `ip netns exec` puts NAME/hosts there over /etc/hosts
# As ssh would: the host, then a command line for its shell. mpirun starts its daemons with it.
AGENT = """#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0" && eval "$1"' "$host" "$*"
"""


@dataclass(frozen=True)
class Hosts:
    """Some hosts that reach each other by name.

    Attributes:
        names: of hosts, and of their namespaces.
        bridge: the name of the device that connects them.
    """

    names: list[str]
    bridge: str

    def command(self, number: int, *command: str) -> list[str]:
        """What runs a command on one of them."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[number]]
        return ["ip", "netns", "exec", self.names[number], *inside, *command]

    def bytes_carried(self) -> int:
        """That the hosts have sent over the bridge so far."""
        shown = subprocess.run(
            ["ip", "-s", "-j", "link", "show", "master", self.bridge], capture_output=True, check=True
        )
        return sum(link["stats64"]["rx"]["bytes"] for link in json.loads(shown.stdout))


def missing() -> str:
    """Why there can be no hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "ip or unshare is missing: apt-get install iproute2 util-linux"
    probe = f"sp{os.getpid()}x"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Makes them, and takes them away again with all that runs in them."""
    key = f"sp{os.getpid()}"
    made = Hosts([f"{key}n{i}" for i in range(count)], f"{key}b")
    known = "".join(f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(made.names))
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        _ip("link", "set", made.bridge, "up")
        for i, name in enumerate(made.names):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            _ip("netns", "add", name)
            _ip("link", "add", f"{key}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{key}v{i}", "master", made.bridge, "up")
            _ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield made
    finally:
        for name in made.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", made.bridge], capture_output=True)
        with contextlib.suppress(OSError):
            ETC.rmdir()  # if it is empty


def agent(folder: Path) -> Path:
    """A program that starts a command on a host by its name."""
    path = folder / "agent"
    path.write_text(AGENT)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
