"""An HTTP server that speaks OpenAI's API over one engine.

    GET  /health   /v1/models   /v1/models/{name}
    POST /v1/chat/completions   /v1/completions

The engine steps in a thread of its own; every request is a coroutine that waits for its tokens.
A client that goes away cancels its request: its row leaves the batch before the next token. When
the queue is full the answer is 429, while shutting down 503 (runtime/stopping.py); what is wrong in
a request is a 4xx that says what.

Starlette was chosen over FastAPI: the bodies are checked by runtime/openai_bodies.py, whose errors
must have OpenAI's form, so the schema layer would be turned off again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.errors import InputError
from runtime.conversation import AnswerStream, Conversations
from runtime.engine import Engine, QueueFullError
from runtime.engine import Request as Running
from runtime.openai_bodies import Asked, error_body, read_body
from runtime.sampling import Sampling
from runtime.text import prompt_ids
from runtime.turn import Events, Turn

BODY_BYTES = 16 << 20
STEP_SECONDS = 2  # that the engine's last step may take when all answers have ended
STOPPING = "the server is shutting down; send the request again"
log = logging.getLogger("thresher.server")


class EngineThread:
    """Steps the engine while there is work, and sleeps otherwise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stopping = threading.Event()
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(
        self, prompt: list[int], sampling: Sampling, on_token: Callable[[int | None], None]
    ) -> Running:
        """Queue a request and wake the engine."""
        running = self.engine.submit(prompt, sampling, on_token)
        with self._work:
            self._work.notify()
        return running

    def stop(self, seconds: float = STEP_SECONDS) -> None:
        """End after the current step, but do not wait longer for it than `seconds`."""
        self._stopping.set()
        with self._work:
            self._work.notify()
        self._thread.join(seconds)
        if not self.alive:
            self.engine.fail_all(STOPPING)

    @property
    def alive(self) -> bool:
        """True while it steps, or waits for work."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._work:
                self._work.wait_for(lambda: self._stopping.is_set() or not self.engine.idle)
            if self._stopping.is_set():
                return
            try:
                self.engine.step()
            except Exception as error:  # the requests fail, the server lives
                log.exception("a step of the engine failed")
                self.engine.fail_all(f"{type(error).__name__}: {error}")


class Service:
    """The endpoints of one model under one name."""

    def __init__(
        self, engine: Engine, tokenizer: Any, name: str, defaults: Sampling | None = None
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.defaults = defaults or Sampling(temperature=1.0)
        self.conversations = Conversations(tokenizer)
        self.thread = EngineThread(engine)
        self.turns: set[Turn] = set()
        self.closed = False

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and stops the engine's thread."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.thread.start()
            yield
            await run_in_threadpool(self.thread.stop)

        return Starlette(
            lifespan=lifespan,
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            exception_handlers={HTTPException: http_error, Exception: unexpected},
        )

    # -- the end: called on the event loop -----------------------------------------------------

    @property
    def num_open(self) -> int:
        """Answers that are being written and not refused yet."""
        return sum(not turn.refusal for turn in self.turns)

    def close(self) -> None:
        """Take nothing new, and refuse what has not begun."""
        self.closed = True
        for turn in self.turns:
            if not turn.running.begun:
                turn.cut(STOPPING)

    def cut(self) -> None:
        """End all answers where they are."""
        for turn in self.turns:
            turn.cut(STOPPING)

    # -- endpoints -----------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """What is running and waiting."""
        state = {"running": len(self.engine.batch), "waiting": len(self.engine.waiting)}
        return JSONResponse({"status": "ok", "model": self.name, **state})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """The one model by name."""
        if request.path_params["name"] != self.name:
            return self._no_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        context = self.engine.context
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "thresher"}
        return {**card, "max_model_len": context}

    def _no_model(self, name: str) -> Response:
        message = f"the model {name!r} is not served here; the one that is: {self.name}"
        body = error_body(message, "invalid_request_error", "model_not_found")
        return JSONResponse(body, status_code=404)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            body = await read_json(request)
            room = self.engine.context
            asked = read_body(body, self.name, chat=chat, room=room, defaults=self.defaults)
            ids, reader = await run_in_threadpool(self._prompt, asked, chat)
            tokens: asyncio.Queue[int | None] = asyncio.Queue()
            if self.closed:
                body = error_body(STOPPING, "server_error", "shutting_down")
                return JSONResponse(body, status_code=503)
            loop = asyncio.get_running_loop()
            running = self.thread.submit(
                ids, asked.sampling, lambda token: post(loop, tokens, token)
            )
        except ClientDisconnect:
            return Response(status_code=499)
        except InputError as wrong:
            code = "context_length_exceeded" if "context is" in str(wrong) else None
            body = error_body(str(wrong), "invalid_request_error", code)
            return JSONResponse(body, status_code=400)
        except KeyError as unknown:
            return self._no_model(unknown.args[0])
        except QueueFullError as full:
            body = error_body(str(full), "rate_limit_error", "queue_full")
            return JSONResponse(body, status_code=429, headers={"Retry-After": "1"})
        turn = Turn(
            self.engine, self.tokenizer, self.name, asked, running, tokens, reader, chat=chat
        )
        self.turns.add(turn)
        if asked.stream:
            return Events(turn.events(), lambda: self._ended(turn))
        try:
            return await turn.whole(request)
        finally:
            self._ended(turn)

    def _ended(self, turn: Turn) -> None:
        """However it ended: a client may have left before the first event was asked for."""
        self.engine.cancel(turn.running)
        self.turns.discard(turn)

    def _prompt(self, asked: Asked, chat: bool) -> tuple[list[int], AnswerStream]:
        if chat:
            prompt = self.conversations.prompt(asked.messages, asked.tools, asked.template_options)
            return prompt.ids, self.conversations.answer(prompt.thinking, bool(asked.tools))
        if isinstance(asked.prompt, str):
            ids = prompt_ids(self.tokenizer, asked.prompt)
        else:
            ids = asked.prompt or []
        reader = AnswerStream(None, False)
        reader.state = "content"
        return ids, reader


def post(
    loop: asyncio.AbstractEventLoop, tokens: asyncio.Queue[int | None], token: int | None
) -> None:
    """Hand a token from the engine's thread to a coroutine; a closed loop wants none."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tokens.put_nowait, token)


async def read_json(request: Request) -> object:
    """The body as JSON. InputError when it is none; 413 when it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {BODY_BYTES >> 20} MiB")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error


async def http_error(request: Request, error: Exception) -> Response:
    """Unknown paths, wrong methods, bodies too large."""
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def unexpected(request: Request, error: Exception) -> Response:
    """Our own mistakes."""
    return JSONResponse(error_body(type(error).__name__, "server_error"), status_code=500)
