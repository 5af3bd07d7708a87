"""The real server with the real client: every answer, every refusal, and what comes after."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.cli.command import assert_refused, thresher
from tests.cli.serving import DEMO, Server, start

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city"}},
            "required": ["city"],
        },
    },
}
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = start()
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.ended() == 0


def test_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["demo"]
    assert server.client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_chat_and_its_stream_say_the_same(server: Server) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "messages": [{"role": "user", "content": "Write a function"}],
        "temperature": 0, "max_tokens": 24,
    }  # fmt: skip
    whole = server.client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    text, reasons, counted = "", [], None
    for chunk in server.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reasons.append(chunk.choices[0].finish_reason)
        counted = chunk.usage or counted
    assert text == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason
    assert counted == whole.usage


def test_completions_stop_seed_and_length(server: Server) -> None:
    def complete(**options: Any) -> Any:
        done = server.client.completions.create(model="demo", prompt="def add(a, b):", **options)
        return done.choices[0]

    greedy = complete(max_tokens=12, temperature=0)
    assert greedy.finish_reason == "length"
    mark = greedy.text.strip()[3:8]
    cut = complete(max_tokens=12, temperature=0, stop=[mark])
    assert cut.finish_reason == "stop"
    assert cut.text == greedy.text.partition(mark)[0]
    drawn = [complete(max_tokens=12, temperature=1.5, seed=5).text for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert complete(max_tokens=12, temperature=1.5, seed=6).text != drawn[0]
    ids = server.client.completions.create(
        model="demo", prompt=[5, 6, 7], max_tokens=3, temperature=0
    )
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_round_trip(server: Server, stream: bool) -> None:
    """The bundled model calls the tool, gets the result, and answers."""
    asked: dict[str, Any] = {"model": "demo", "tools": [WEATHER], "temperature": 0}
    answered = server.client.chat.completions.create(
        messages=ASKED, max_tokens=120, stream=stream, **asked
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answered]
        assert chunks[-1].finish_reason == "tool_calls"
        assert not any(chunk.delta.content for chunk in chunks)
        (delta,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        call = {"id": delta.id, "type": "function", "function": delta.function.model_dump()}
    else:
        (choice,) = answered.choices
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0].model_dump()
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    history = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": '{"degrees": 21}'},
    ]
    final = server.client.chat.completions.create(messages=history, max_tokens=20, **asked)
    assert final.choices[0].message.tool_calls is None
    assert final.choices[0].message.content


def test_fifty_at_once(server: Server) -> None:
    """All answered, and each with what it gets alone."""

    def ask(number: int) -> str:
        done = server.client.completions.create(
            model="demo", prompt=f"def f{number % 5}(a, b):", max_tokens=4 + number % 7,
            temperature=0,
        )  # fmt: skip
        return done.choices[0].text

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(ask, range(50)))
    for number in (0, 11, 37):
        assert texts[number] == ask(number)
    assert all(texts)
    server.assert_well()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", b"{", 400, "not JSON"),
        ("chat/completions", b"[]", 400, "no JSON object"),
        ("chat/completions", b'"x"' * 9, 400, "not JSON"),
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": "hello"}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages"),
        ("chat/completions", {"messages": ASKED, "model": "gpt"}, 404, "gpt"),
        ("chat/completions", {"messages": ASKED, "temperature": "hot"}, 400, "temperature"),
        ("chat/completions", {"messages": ASKED, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {"messages": ASKED, "top_p": 0}, 400, "top_p"),
        ("chat/completions", {"messages": ASKED, "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"messages": ASKED, "max_tokens": True}, 400, "max_tokens"),
        ("chat/completions", {"messages": ASKED, "stop": [1]}, 400, "stop"),
        ("chat/completions", {"messages": ASKED, "n": 2}, 400, "n is not supported"),
        ("chat/completions", {"messages": ASKED, "tools": [{}]}, 400, "tool"),
        ("chat/completions", {"messages": ASKED, "tool_choice": "required"}, 400, "tool_choice"),
        ("completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("completions", {"prompt": [1 << 40]}, 400, "vocabulary"),
        ("completions", {"prompt": [-1]}, 400, "vocabulary"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [5] * 5000}, 400, "context"),
        ("completions", {"prompt": "x", "logprobs": 5}, 400, "logprobs"),
        ("completions", {"prompt": "x", "logprobs": 0}, 400, "logprobs"),
        ("completions", {"prompt": "x", "stop": 0}, 400, "stop"),
        ("completions", {"prompt": "x", "seed": -4}, 400, "seed"),
        ("completions", {"prompt": "x", "top_k": -5}, 400, "top_k"),
        ("completions", {"prompt": "x", "repetition_penalty": 1e-40}, 400, "repetition_penalty"),
        ("completions", {"prompt": "x", "temperature": 10**400}, 400, "temperature"),
        ("completions", {"prompt": "a\ud83d"}, 400, "surrogate"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "surrog"),
        ("chat/completions", {"messages": ASKED, "model": "\ud83d"}, 404, "ud83d"),
        (
            "chat/completions",
            {"messages": ASKED, "chat_template_kwargs": {"chat_template": "x"}},
            400,
            "chat_template",
        ),
        ("completions", b"x" * (17 << 20), 413, "larger"),
        ("nowhere", {}, 404, "Not Found"),
    ],
)
def test_wrong_requests_are_answered(
    server: Server, path: str, body: object, status: int, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/{path}", content=content, timeout=60)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_well_after_wrong_requests(server: Server) -> None:
    assert httpx.get(f"{server.url}/completions").status_code == 405
    server.assert_well()


def test_an_oversize_prompt_by_the_client(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "word " * 5000}]
        )
    assert refused.value.code == "context_length_exceeded"
    server.assert_well()


def test_a_temperature_near_zero_is_greedy(server: Server) -> None:
    """It once hung the client and failed everybody else's answers."""

    def complete(temperature: float) -> str:
        done = server.client.completions.create(
            model="demo", prompt="x", max_tokens=4, temperature=temperature
        )
        return done.choices[0].text

    assert complete(1e-40) == complete(0)
    server.assert_well()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    """Its connection is cut in the middle of an answer that would take minutes."""
    body = json.dumps({"prompt": [5, 6], "max_tokens": 4000, "temperature": 1, "stream": stream})
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        while not server.health()["running"]:
            time.sleep(0.02)
    server.wait_until_idle(20)
    server.assert_well()


def test_a_killed_client_process(server: Server) -> None:
    """SIGKILL while it streams: no goodbye at all."""
    code = (
        "import openai, sys\n"
        f"client = openai.OpenAI(base_url={server.url!r}, api_key='none')\n"
        "for _ in client.completions.create(model='demo', prompt='a', max_tokens=4000,"
        " temperature=1, stream=True):\n    print('x', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "x\n"
    child.kill()
    child.wait()
    child.stdout.close()
    server.wait_until_idle(20)
    server.assert_well()


def test_a_full_queue_refuses_and_recovers() -> None:
    small = start("--max-batch", 1, "--queue", 1)

    async def many() -> list[int]:
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"prompt": [5, 6], "max_tokens": 40, "temperature": 1}
            posts = [client.post(f"{small.url}/completions", json=body) for _ in range(12)]
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    codes = asyncio.run(many())
    assert set(codes) == {200, 429}
    small.wait_until_idle()
    small.assert_well()
    small.process.send_signal(signal.SIGINT)  # and a Ctrl-C ends it cleanly
    assert small.ended() == 130


def test_an_address_of_the_newer_kind() -> None:
    from cli.serve import listening

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


def test_a_port_in_use_is_told_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(thresher("serve", DEMO, "--port", port), str(port), "in use")
