"""The free list of buffers."""

from __future__ import annotations

import torch

from sparcomm.workspace import Workspace

CPU = torch.device("cpu")


def test_a_buffer_has_one_owner() -> None:
    space = Workspace()
    first = space.take(10, torch.float32, CPU)
    space.give(first, None)
    assert space.take(10, torch.float64, CPU).dtype == torch.float64
    assert space.take(10, torch.float32, CPU) is first
    assert space.take(10, torch.float32, CPU) is not first


def test_what_was_not_lent_is_not_kept() -> None:
    """Else whoever gives back what an algorithm allocated itself would make the list grow at every step."""
    space = Workspace()
    foreign = torch.ones(10)
    lent = space.take(10, torch.float32, CPU)
    space.give(foreign, lent[:10], torch.ones(2, 5))
    fresh = space.take(10, torch.float32, CPU)
    assert fresh is not foreign
    assert fresh.data_ptr() != lent.data_ptr()


def test_giving_back_twice_makes_no_second_owner() -> None:
    space = Workspace()
    lent = space.take(10, torch.float32, CPU)
    space.give(lent, lent)
    space.give(lent)
    assert space.take(10, torch.float32, CPU) is lent
    assert space.take(10, torch.float32, CPU) is not lent
