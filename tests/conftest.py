"""What every test shares: one thread, and optional packages that are skipped with their reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def require() -> Callable[[str, str], None]:
    """Skip a test whose optional package is missing; where the variable CI is set, fail instead."""

    def check(module: str, hint: str) -> None:
        if importlib.util.find_spec(module) is not None:
            return
        reason = f"{module} is not installed: {hint}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return check
