"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# No deadline: how long an example takes is the machine's affair, not the test's. On CI the
# examples are the same every time, so that a failure there is a failure here.
settings.register_profile("thresher", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("thresher")


@pytest.fixture(autouse=True)
def modes_stay_as_they_are() -> Iterator[None]:
    """AutoRound, which some tests read, makes torch deterministic for the rest of the process."""
    yield
    torch.use_deterministic_algorithms(False)
