"""A real `thresher serve` process, and what its tests ask of it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from tests.cli.command import ROOT, argv, environment

DEMO = ROOT / "demo" / "model"


@dataclass(frozen=True, slots=True)
class Server:
    """A running `thresher serve`."""

    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def health(self) -> dict[str, Any]:
        answer = httpx.get(self.url.removesuffix("/v1") + "/health", timeout=30)
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        return found

    def assert_well(self) -> None:
        """Healthy, and it still writes what it would have written."""
        done = self.client.completions.create(
            model="demo", prompt="def add(a, b):", max_tokens=4, temperature=0
        )
        assert done.choices[0].text == '\n    """Add'
        self.wait_until_idle()

    def ended(self, seconds: float = 30) -> int:
        """The exit status once it has ended, of itself and without a traceback."""
        _, said = self.process.communicate(timeout=seconds)
        assert "Traceback" not in said
        return self.process.returncode

    def wait_until_idle(self, seconds: float = 30) -> None:
        began = time.monotonic()
        while (state := self.health())["running"] or state["waiting"]:
            assert time.monotonic() - began < seconds, state
            time.sleep(0.05)


def start(*options: object) -> Server:
    process = subprocess.Popen(
        argv("serve", DEMO, "--port", 0, "--name", "demo", *options),
        cwd=ROOT, env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving"):
            return Server(process, line.split()[-1])
    raise AssertionError("the server did not start")
