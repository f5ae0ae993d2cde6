"""Loops in several parts at once: the same bits whatever their number, and no part left behind."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sparcomm import threads
from sparcomm.dtypes import working_dtype
from sparcomm.kernels import cpu
from sparcomm.kernels.cpu import _parts
from sparcomm.layout import Layout, contiguous, dealt, whole
from sparcomm.transport import sim
from support.kernels import GRADIENTS, data, increasing, same

N = 40_000


def step(grad: torch.Tensor, layout: Layout, floor: torch.Tensor | None) -> list[torch.Tensor]:
    """What the kernels that work in parts do to some vectors, and what is selected after them."""
    working = working_dtype(grad.dtype)
    residual, out = data("spread", grad.numel(), working, seed=1), torch.full(grad.shape, float("nan"), dtype=working)
    flags, k = torch.zeros(1, dtype=torch.uint8), layout.length // 50
    work = cpu.compensate(grad, residual, out, layout, k, flags, floor)
    results = [out.clone(), flags.clone()]
    lists = [cpu.select(work, b, k) for b in range(layout.blocks)]
    survey = cpu.survey(out, layout, k, flags, floor)
    for b in range(layout.blocks):
        results += [*lists[b], *cpu.above(survey, b, 1.0, k)]
    sparse = torch.full_like(grad, 7)
    wide = [increasing(k, layout.length + 9, seed=b) for b in range(layout.blocks)]
    cpu.expand(sparse, wide, [value for _, value in lists], layout)
    return [*results, sparse]


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("kind", ["normal", "special", "spread", "equal"])
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_the_number_of_threads_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, parts: int
) -> None:
    grad, working = data(kind, N, dtype), working_dtype(dtype)
    for layout in (dealt(N, 3), contiguous(N, 3), whole(N)):
        for floor in (None, torch.full((layout.blocks,), 1.5, dtype=working)):
            with threads.serial():
                expected = step(grad, layout, floor)
            with monkeypatch.context() as patch:
                patch.setattr(_parts, "LARGE", 1)
                patch.setattr(threads, "allowed", lambda: parts)
                found = step(grad, layout, floor)
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 64])
@pytest.mark.parametrize(("n", "tile"), [(1, 1), (5, 2), (3000, 1000), (5000, 5000), (1 << 20, 1024)])
def test_parts_cover_a_vector_and_start_where_a_tile_or_a_piece_does(
    monkeypatch: pytest.MonkeyPatch, n: int, tile: int, count: int
) -> None:
    monkeypatch.setattr(_parts, "LARGE", 1)
    monkeypatch.setattr(threads, "allowed", lambda: count)
    parts = _parts.cut(n, tile)
    assert len(parts) >= count
    assert [first for first, _ in parts] + [n] == [0] + [last for _, last in parts]
    assert all(first % tile % 1024 == 0 for first, _ in parts)


def test_threads_are_torchs_but_for_ranks_that_are_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert threads.allowed() == 2
        assert len(_parts.cut(1 << 20, 1024)) == 4
        assert len(_parts.cut((1 << 20) - 1, 1024)) == 1
        with threads.serial():
            assert threads.allowed() == 1
            elsewhere: list[int] = []
            other = threading.Thread(target=lambda: elsewhere.append(threads.allowed()))
            other.start()
            other.join()
            assert elsewhere == [2]
        assert threads.allowed() == 2
        assert sim.run(2, lambda _: threads.allowed()).results == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_a_failure_waits_for_the_parts_under_way_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed", lambda: 2)
    ended: list[int] = []
    begun, failing = threading.Event(), threading.Event()

    def fail() -> None:
        begun.wait(10)
        failing.set()
        raise ValueError("a part")

    def work() -> None:
        begun.set()
        failing.wait(10)
        ended.append(1)

    for jobs in ([fail, work], [work, fail]):  # whoever does which
        begun.clear()
        failing.clear()
        ended.clear()
        with pytest.raises(ValueError, match="a part"):
            _parts.run(jobs)
        assert ended == [1]


def test_what_no_other_thread_begins_is_done_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed", lambda: 4)
    with ThreadPoolExecutor(1) as busy:
        monkeypatch.setattr(_parts, "_pool", busy)
        gate = threading.Event()
        busy.submit(gate.wait, 30)
        assert _parts.run([threading.get_ident] * 9) == [threading.get_ident()] * 9
        gate.set()
    assert _parts.run([threading.get_ident] * 9) == [threading.get_ident()] * 9, "after a shutdown, too"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed", lambda: 3)

    def square(i: int) -> Any:
        return lambda: i * i

    jobs = [square(i) for i in range(3)]
    assert _parts.run(jobs) == [0, 1, 4]
    child = os.fork()
    if not child:
        os._exit(0 if _parts.run(jobs) == [0, 1, 4] else 1)
    assert os.waitpid(child, 0)[1] == 0
