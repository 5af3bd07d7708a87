"""SIGTERM and Ctrl-C: what clients of answers under way, and of those that wait, get to hear."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.cli.serving import Server, start

LONG = {"model": "demo", "prompt": [5, 6], "max_tokens": 4000, "temperature": 1, "seed": 0}
SHORT = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 150, "temperature": 0}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def stream(server: Server, asked: dict[str, Any]) -> tuple[str, str | None]:
    """The text and the last reason given."""
    text, reason = "", None
    for chunk in server.client.completions.create(**asked, stream=True):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def wait_for(server: Server, **state: int) -> None:
    """Until so many requests run and wait."""
    began = time.monotonic()
    while (found := server.health()) | state != found:
        assert time.monotonic() - began < 30, found
        time.sleep(0.02)


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_answers_under_way_end_as_ever(
    pool: ThreadPoolExecutor, sign: signal.Signals, status: int
) -> None:
    """Whole and streamed, to their last word; a new connection is refused meanwhile."""
    server = start("--grace", 60)
    alone = server.client.completions.create(**SHORT).choices[0]
    streamed = pool.submit(stream, server, SHORT)
    whole = pool.submit(server.client.completions.create, **SHORT)
    wait_for(server, running=2)
    server.process.send_signal(sign)
    assert streamed.result(60) == (alone.text, alone.finish_reason)
    assert whole.result(60).choices[0].text == alone.text
    assert server.ended() == status
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()


def refusal(asked: Future[Any]) -> openai.APIError:
    with pytest.raises(openai.APIError, match="shutting down") as refused:
        asked.result(30)
    assert refused.value.code == "shutting_down"
    return refused.value


def assert_refused(whole: Future[Any], streamed: Future[Any]) -> None:
    """By a status the one, by an error event the other."""
    refused = refusal(whole)
    assert isinstance(refused, openai.InternalServerError)
    assert refused.status_code == 503
    refusal(streamed)


def test_those_that_wait_are_refused_at_once(pool: ThreadPoolExecutor) -> None:
    """The one that runs has its whole grace period meanwhile, until a second signal ends it."""
    server = start("--grace", 600, "--max-batch", 1)
    running = pool.submit(stream, server, LONG)
    wait_for(server, running=1)
    whole = pool.submit(server.client.completions.create, **SHORT)
    streamed = pool.submit(stream, server, SHORT)
    wait_for(server, waiting=2)
    server.process.send_signal(signal.SIGTERM)
    assert_refused(whole, streamed)
    assert not running.done()
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.ended(10) == -signal.SIGTERM
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        running.result(10)


@pytest.mark.parametrize("grace", [0, 1])
def test_answers_that_outlast_the_grace_period(pool: ThreadPoolExecutor, grace: int) -> None:
    """Nobody hangs, and nobody takes a part for the whole."""
    server = start("--grace", grace)
    whole = pool.submit(server.client.completions.create, **LONG)
    streamed = pool.submit(stream, server, LONG)
    events = pool.submit(httpx.post, f"{server.url}/completions", json={**LONG, "stream": True})
    wait_for(server, running=3)
    server.process.send_signal(signal.SIGTERM)
    assert_refused(whole, streamed)
    *_, error, done = events.result(30).text.strip().split("\n\n")
    assert "shutting_down" in error
    assert done == "data: [DONE]"
    assert server.ended() == 0


def test_a_client_that_says_nothing_keeps_nobody() -> None:
    """It cannot be told the end; the process ends all the same."""
    server = start("--grace", 0)
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        server.health()  # its body never comes
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
