"""The engine's thread at the end: a step that takes long is not waited for."""

from __future__ import annotations

import threading
from typing import Any, cast

from runtime.engine import Engine
from runtime.server import EngineThread


class Slow:
    """An engine whose step lasts until it is let go."""

    idle = False
    error = ""

    def __init__(self) -> None:
        self.stepping, self.go = threading.Event(), threading.Event()

    def step(self) -> None:
        self.stepping.set()
        self.go.wait()

    def fail_all(self, error: str) -> None:
        self.error = error


def test_a_step_that_takes_long() -> None:
    slow = Slow()
    thread = EngineThread(cast(Engine, cast(Any, slow)))
    thread.start()
    slow.stepping.wait()
    thread.stop(0.01)
    assert thread.alive
    assert not slow.error  # the batch is the thread's while it steps
    slow.go.set()
    thread.stop()
    assert not thread.alive
    assert "shutting down" in slow.error
