"""Dense's own settings and its baseline form."""

from __future__ import annotations

import pytest
import torch

from sparcomm.algorithms.dense import Dense
from sparcomm.errors import ConfigError
from support.sums import integers, simulate


@pytest.mark.parametrize("native", ["yes", 1, None])
def test_native_is_a_bool(native: object) -> None:
    with pytest.raises(ConfigError, match=r"native=.*True or False"):
        Dense(native=native)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_sends_the_gradients_own_width(dtype: torch.dtype) -> None:
    gradients = [[integers(1000, rank, 1, dtype) for rank in range(4)]]
    for done, _, traffic in simulate(Dense(native=True), gradients):
        assert traffic[0].bytes_sent == 2 * 3 * 1000 * dtype.itemsize // 4
        assert torch.equal(done[0].total, sum(g.float() for g in gradients[0]))
