"""One thread, in order, and gone when told."""

from __future__ import annotations

import threading

from sparcomm.ddp.worker import Worker


def test_jobs_run_in_order_on_one_other_thread() -> None:
    worker, seen = Worker("test-order"), []
    for i in range(200):
        worker.submit(lambda i=i: seen.append((i, threading.current_thread().name)))
    worker.drain()
    assert seen == [(i, "test-order") for i in range(200)]
    worker.stop()


def test_no_thread_is_started_without_a_job_and_none_is_left_after_stop() -> None:
    worker = Worker("test-idle")
    worker.drain()
    assert all(t.name != "test-idle" for t in threading.enumerate())
    worker.submit(lambda: None)
    worker.stop()
    worker.stop()
    assert all(t.name != "test-idle" for t in threading.enumerate())


def test_stop_lets_the_running_job_end_and_drops_the_rest() -> None:
    worker, seen, running, go_on = Worker("test-stop"), [], threading.Event(), threading.Event()

    def first() -> None:
        running.set()
        go_on.wait(10)
        seen.append("first")

    worker.submit(first)
    worker.submit(lambda: seen.append("second"))
    assert running.wait(10)
    worker._queue.stop()  # what stop() begins with
    go_on.set()
    worker.stop()
    worker.submit(lambda: seen.append("late"))
    worker.drain()
    assert seen == ["first"]


def test_a_job_may_drain_and_stop_its_own_worker() -> None:
    worker, done = Worker("test-self"), threading.Event()

    def job() -> None:
        worker.drain()
        worker.stop()
        done.set()

    worker.submit(job)
    assert done.wait(10)


def test_gradients_are_not_recorded_on_the_worker() -> None:
    import torch

    worker, seen = Worker("test-grad"), []
    worker.submit(lambda: seen.append(torch.is_grad_enabled()))
    worker.drain()
    worker.stop()
    assert seen == [False]
