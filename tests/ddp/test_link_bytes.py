"""Counted bytes against the network's own count: every rank in a network namespace, behind a link of its own.

The link's counter also sees what is not ours to count: a header for every packet (Ethernet 14 bytes, IPv4 20, TCP 20 to
60), acknowledgements, which are packets of nothing else, and Gloo's own words around every message: a preamble of 48
bytes and up to two notifications like it. So, with the link's counts of bytes and packets,

    bytes_sent <= link bytes - 54 * packets      and      link bytes - 66 * packets - bytes_sent <= 5 % of bytes_sent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOSTS = 3
PORT = 29517
LEAST_HEADERS, USUAL_HEADERS = 54, 66  # bytes a packet: without TCP options, and with a time stamp
NUMEL = 400_000
WARM_STEPS, STEPS = 3, 6


def ip(*argv: str) -> None:
    """Runs ``ip``; skips where this system does not let us."""
    done = subprocess.run(["ip", *argv], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"ip {' '.join(argv)}: {done.stderr.strip()}")


def name(host: int | str) -> str:
    """Of a namespace."""
    return f"sc{os.getpid() % 100_000}{host}"


def address(host: int) -> str:
    return f"10.79.0.{host + 1}"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Namespaces, each with an interface ``eth0`` into one bridge, which lies in a namespace of its own."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("no ip command: install iproute2")
    names = [name(f"h{h}") for h in range(HOSTS)]
    hub, bridge = name("hub"), "bridge"
    try:
        for ns in (*names, hub):
            ip("netns", "add", ns)
            ip("-n", ns, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", bridge, "type", "bridge")
        ip("-n", hub, "link", "set", bridge, "up")
        for h, ns in enumerate(names):
            up = f"up{h}"
            ip("link", "add", up, "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", ns)
            ip("-n", hub, "link", "set", up, "master", bridge, "up")
            ip("-n", ns, "addr", "add", f"{address(h)}/24", "dev", "eth0")
            ip("-n", ns, "link", "set", "eth0", "up")
        yield names
    finally:
        for ns in (*names, hub):
            subprocess.run(["ip", "netns", "del", ns], capture_output=True)


def run_ranks(namespaces: list[str]) -> list[list[dict[str, Any]]]:
    """This file as a program, once in each namespace; what each rank measured, by job."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", ns, sys.executable, __file__, str(rank), str(len(namespaces))], **pipes
        )
        for rank, ns in enumerate(namespaces)
    ]
    try:
        deadline = time.monotonic() + 90
        said = [r.communicate(timeout=max(1.0, deadline - time.monotonic())) for r in ranks]
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    assert all(r.returncode == 0 for r in ranks), "\n".join(err for _, err in said)
    return [[json.loads(line) for line in out.splitlines()] for out, _ in said]


@pytest.mark.slow
def test_the_link_counts_what_the_hook_counts(hosts: list[str]) -> None:
    results = run_ranks(hosts)
    assert len(results) == HOSTS
    for jobs in zip(*results, strict=True):
        for rank, job in enumerate(jobs):
            counted, link, packets = job["bytes_sent"], job["link_bytes"], job["link_packets"]
            assert counted > 100_000, job
            assert counted <= link - LEAST_HEADERS * packets, (rank, job)
            assert link - USUAL_HEADERS * packets - counted <= 0.05 * counted, (rank, job)
    dense, sparse, looked = ([job["bytes_sent"] for job in jobs] for jobs in zip(*results, strict=True))
    assert sum(dense) > 8 * sum(sparse)
    # Steps 4, 6 and 8 look, and each look reduces the whole gradient twice.
    others, chunk = HOSTS - 1, -(-NUMEL // HOSTS)
    assert sum(looked) - sum(sparse) == pytest.approx(3 * 2 * HOSTS * 2 * others * chunk * 4, rel=0.05)


# ---- inside a namespace ----------------------------------------------------------------------------------------------


def link() -> tuple[int, int]:
    """(bytes, packets) that have left through eth0 so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            numbers = line.split(":")[1].split()
            return int(numbers[8]), int(numbers[9])
    raise AssertionError("no eth0")


def measure(rank: int, label: str, **attached: Any) -> None:
    """Some steps of one job; prints what the hook and the link counted meanwhile."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import sparcomm
    from support.training import Fed, gradient_step

    ddp = DistributedDataParallel(Fed([NUMEL]))
    state = sparcomm.attach(ddp, timeout=60, **attached)
    made = torch.Generator().manual_seed(rank)
    grads = [torch.randn(NUMEL, generator=made)]
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            dist.barrier()
            before, sent = link(), state.traffic.bytes_sent
        gradient_step(ddp, grads)
    counted = state.traffic.bytes_sent - sent
    dist.barrier()  # what this rank still had to send has left, since the others have it
    now = link()
    dist.barrier()  # nobody closes anything before all have read their counters
    said = {"job": label, "bytes_sent": counted, "link_bytes": now[0] - before[0], "link_packets": now[1] - before[1]}
    print(json.dumps(said), flush=True)
    state.close()


def main(rank: int, size: int) -> None:
    """One rank: all jobs one after the other."""
    import torch
    import torch.distributed as dist

    from sparcomm import Check, Dense, SparDL

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address(0)}:{PORT}", rank=rank, world_size=size)
    measure(rank, "dense", algorithm=Dense())
    measure(rank, "spardl", algorithm=SparDL(density=0.02))
    measure(rank, "spardl, looked at", algorithm=SparDL(density=0.02), check=Check(every=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
