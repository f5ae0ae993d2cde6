"""Every kernel test runs on every implementation."""

from __future__ import annotations

from typing import Any

import pytest

from support.kernels import IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Any:
    """One implementation of ``sparcomm.kernels.Kernels``."""
    return IMPLEMENTATIONS[request.param]
