"""One request on its way through the server: the engine's tokens in, OpenAI's answer out.

The engine's thread puts tokens into a queue (None: no more follow); a coroutine makes text,
reasoning and tool calls of them and sends the answer whole or as server-sent events. However the
sending ends, the request is given up with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.conversation import AnswerStream, Delta
from runtime.engine import Engine
from runtime.engine import Request as Running
from runtime.openai_bodies import Answers, Asked, error_body, usage
from runtime.text import TextStream


class Events(StreamingResponse):
    """Server-sent events; however sending them ends, `ended` is called."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


class Turn:
    """One request on its way: tokens in, pieces of the answer out."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        asked: Asked,
        running: Running,
        tokens: asyncio.Queue[int | None],
        reader: AnswerStream,
        *,
        chat: bool,
    ) -> None:
        self.engine, self.asked, self.running = engine, asked, running
        self.tokens, self.reader, self.chat = tokens, reader, chat
        # marks of reasoning and calls may be special tokens
        after = [] if chat else running.prompt
        self.text = TextStream(tokenizer, asked.sampling.stop, special=chat, after=after)
        self.answers = Answers(name, chat=chat)
        self.called = False
        self.refusal = ""  # why the server ended it before its time

    def cut(self, why: str) -> None:
        """End the answer where it is, by an error that says why; a whole answer stays one."""
        if self.running.reason is None and not self.text.stopped:
            self.refusal = why
            self.tokens.put_nowait(None)

    @property
    def failure(self) -> tuple[int, dict[str, Any]] | None:
        """Status and body of the error that the answer ends with."""
        if self.refusal:
            return 503, error_body(self.refusal, "server_error", "shutting_down")
        if self.running.reason == "error":
            return 500, error_body(self.running.error, "server_error")
        return None

    async def pieces(self) -> AsyncGenerator[Delta, None]:
        """Pieces as they become certain; the request is given up when nobody waits any more."""
        try:
            while not self.text.stopped and (token := await self.tokens.get()) is not None:
                yield self.reader.push(self.text.push(token))
            yield self.reader.push(self.text.finish())
            ended = self.text.stopped or self.running.reason == "stop"
            last = self.reader.finish(ended=ended)
            self.called = bool(last.tool_calls)
            yield last
        finally:
            self.engine.cancel(self.running)

    @property
    def reason(self) -> str:
        """OpenAI's finish_reason."""
        if self.called:
            return "tool_calls"
        return "length" if self.running.reason == "length" and not self.text.stopped else "stop"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of prompt and answer."""
        return usage(len(self.running.prompt), len(self.running.tokens))

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        if self.chat:
            yield event(self.answers.chunk({"role": "assistant", "content": ""}))
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                if self.failure is not None:
                    break
                for delta in self._deltas(piece):
                    yield event(self.answers.chunk(delta))
        if self.failure is not None:
            yield event(self.failure[1])
        else:
            yield event(self.answers.chunk({}, self.reason))
            if self.asked.include_usage:
                yield event(self.answers.usage_chunk(self.usage))
        yield "data: [DONE]\n\n"

    def _deltas(self, piece: Delta) -> list[dict[str, Any]]:
        if not self.chat:
            return [{"text": piece.content}] if piece.content else []
        deltas: list[dict[str, Any]] = []
        if piece.reasoning:
            deltas.append({"reasoning_content": piece.reasoning})
        if piece.content:
            deltas.append({"content": piece.content})
        deltas += [
            {"tool_calls": [{"index": index, **call}]}
            for index, call in enumerate(piece.tool_calls)
        ]
        return deltas

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; given up when the client goes away before."""
        collecting = asyncio.create_task(self._collect())
        leaving = asyncio.create_task(until_disconnected(request))
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not collecting.done():
            collecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await collecting
            return Response(status_code=499)
        message = collecting.result()
        if self.failure is not None:
            status, body = self.failure
            return JSONResponse(body, status_code=status)
        return JSONResponse(self.answers.whole(message, self.reason, self.usage))

    async def _collect(self) -> dict[str, Any]:
        content = reasoning = ""
        calls: list[dict[str, Any]] = []
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                content += piece.content
                reasoning += piece.reasoning
                calls += piece.tool_calls
        if not self.chat:
            return {"text": content}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"tool_calls": calls, "content": content or None}
        return message


async def until_disconnected(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
