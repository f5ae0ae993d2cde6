"""Who is to blame: from what ranks say, and by real stores with ranks that do not answer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from sparcomm.ddp import rollcall
from sparcomm.ddp.rollcall import Pace, Pulse, Standing, call, look_up, pace_of, standing_of, verdict
from sparcomm.ddp.stores import Host

AT_WORK = Standing(7)
PACE = Pace(0.02, 1.0)


@pytest.mark.parametrize(
    ("standings", "ranks", "text"),
    [
        ({1: AT_WORK, 2: AT_WORK}, (), ""),
        ({}, (), ""),
        ({1: AT_WORK, 2: None}, (2,), "rank 2 does not answer: killed or stopped, or is cut off from the store"),
        ({1: None, 2: None}, (1, 2), "ranks 1, 2 do not answer: killed or stopped, or are cut off from the store"),
        ({1: Standing(7, left="it closed its hook after 7 steps"), 2: AT_WORK}, (1,), "rank 1 has left: it closed"),
        # Who has ended the step may do as he likes.
        ({1: Standing(8, left="its process ended after 8 steps"), 2: None}, (2,), "rank 2 does not answer"),
        ({1: Standing(8, busy=False, seconds=3.0), 2: Standing(7, busy=False, seconds=2.0)}, (2,),
         "rank 2 has not come to step 7: it runs, but has been in its own code for 2.0 s"),
        # A rank in its own code is to blame only where nobody is missing: it may just be ahead of its bucket.
        ({1: Standing(7, busy=False, seconds=0.1), 2: None}, (2,), "rank 2 does not answer"),
        ({1: Standing(6, left="x"), 2: None}, (1, 2), "rank 1 has left: x; rank 2 does not answer"),
        ({0: None, 1: AT_WORK}, (), ""),  # oneself
    ],
)  # fmt: skip
def test_the_verdict(standings: dict[int, Standing | None], ranks: tuple[int, ...], text: str) -> None:
    blamed, why = verdict(0, 7, standings)
    assert blamed == ranks
    assert why.startswith(text)
    assert bool(why) == bool(ranks)


@pytest.mark.parametrize("timeout", [0.05, 0.3, 3.0, 30.0, 300.0])
def test_a_roll_call_leaves_most_of_the_timeout_and_covers_several_looks(timeout: float) -> None:
    pace = pace_of(timeout)
    assert pace.limit <= min(timeout / 3, 2.5)
    assert pace.period <= 0.25
    assert timeout < 0.3 or pace.limit >= 4 * pace.period * 0.999


def tcp() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def no_threads_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("sparcomm-pulse")]


def test_those_that_run_answer_and_the_others_are_none() -> None:
    store = tcp()
    pulses = [
        Pulse(store, r, lambda r=r: Standing(r, busy=False, seconds=1.5), PACE.period, Host(store)) for r in (1, 2)
    ]
    answers = call(store, 0, 4, PACE)
    assert answers == {1: Standing(1, False, 1.5), 2: Standing(2, False, 1.5), 3: None}
    again = call(store, 3, 4, PACE)
    assert again == {0: None, 1: Standing(1, False, 1.5), 2: Standing(2, False, 1.5)}
    assert look_up(store, 1, number=2) == Standing(1, False, 1.5)
    assert look_up(store, 1, number=3) is None
    for pulse in pulses:
        pulse.stop()
    assert no_threads_left()


def test_a_farewell_is_an_answer_and_says_why() -> None:
    store = tcp()
    leaving, staying = (Pulse(store, r, lambda: AT_WORK, PACE.period, Host(store)) for r in (1, 2))
    leaving.stop(Standing(3, left="it closed its hook after 3 steps"))
    leaving.stop(Standing(9, left="twice"))
    start = time.monotonic()
    answers = call(store, 0, 3, Pace(5.0, 60.0))
    assert time.monotonic() - start < 20
    said = answers[1]
    assert said is not None
    assert said.left == "it closed its hook after 3 steps"
    assert answers[2] == AT_WORK
    staying.stop()
    assert no_threads_left()


def test_a_hook_that_is_gone_does_not_answer_and_is_not_kept_alive() -> None:
    class Owner:
        def standing(self) -> Standing:
            return AT_WORK

    owner = Owner()
    ask, gone = standing_of(owner), weakref.ref(owner)
    assert ask() == AT_WORK
    del owner
    assert gone() is None
    assert ask() is None


def test_a_store_whose_host_has_gone_is_known_without_a_call() -> None:
    store = tcp()
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    prefixed = dist.PrefixStore("a", dist.PrefixStore("b", client))
    host = Host(prefixed)
    assert host.here  # this process
    assert host.is_up()
    pulse = Pulse(prefixed, 1, lambda: AT_WORK, 0.01, host)
    del store
    deadline = time.monotonic() + 10
    while host.is_up() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not host.is_up()
    while pulse._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not pulse._thread.is_alive()
    pulse.stop(Standing(1, left="nobody hears it"))


def test_a_store_that_is_hosted_elsewhere(tmp_path: Path) -> None:
    code = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(process.stdout.readline()), is_master=False, wait_for_workers=False)
        host = Host(store)
        assert not host.here
        assert host.is_up()
        store.set("key", "value")
        assert host.is_up()
        assert store.get("key") == b"value"
        process.kill()
        process.wait()
        assert not host.is_up()


def test_stores_that_tell_nothing_count_as_up(tmp_path: Path) -> None:
    for store in (dist.HashStore(), dist.FileStore(str(tmp_path / "store"), 1)):
        host = Host(dist.PrefixStore("a", store))
        assert host.is_up()
        assert not host.here


def test_a_fork_does_not_speak_for_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    store = tcp()
    pulse = Pulse(store, 1, lambda: AT_WORK, PACE.period, Host(store))
    with monkeypatch.context() as patch:
        patch.setattr(rollcall.os, "getpid", os.getppid)
        pulse.stop(Standing(2, left="a data loader's worker ended"))
        assert not store.check(["left/1"])
        assert pulse._thread.is_alive()
    pulse.stop()
    assert not store.check(["left/1"])


def test_a_pulse_ends_while_the_store_is_busy_elsewhere() -> None:
    """A wait for a key holds the store's lock: the pulse stands behind it, and still ends with it."""
    store = tcp()
    pulse = Pulse(store, 1, lambda: AT_WORK, 0.01, Host(store))

    def wait() -> None:
        with pytest.raises(dist.DistStoreError):
            store.wait(["never"], timedelta(seconds=0.5))

    waiting = threading.Thread(target=wait)
    waiting.start()
    pulse.stop()
    waiting.join()
    assert no_threads_left()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system does not list open files there")
def test_looking_for_the_host_leaves_no_file_open() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208  (not paths)
    for _ in range(10):
        host = Host(store)
        assert host.here
        assert host.is_up()
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
