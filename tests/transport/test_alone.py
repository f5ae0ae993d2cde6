"""The group of one rank conforms as every transport does."""

from __future__ import annotations

import pytest

from sparcomm.errors import PeerError
from sparcomm.transport.alone import Alone
from support.conformance import CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_it_conforms(name: str) -> None:
    CHECKS[name](Alone())  # pyright: ignore[reportArgumentType]


def test_parts_of_it_share_its_traffic_and_fate() -> None:
    t = Alone()
    part = t.split(0, 0)
    assert part.traffic is t.traffic
    t.abort("enough")
    with pytest.raises(PeerError, match="enough"):
        part.split(0, 0)
