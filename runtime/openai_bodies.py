"""The bodies of OpenAI's HTTP API: what requests may say, and how answers are written.

Fields that are known and not carried out here (several choices, logprobs, penalties of other
kinds, forced tools, JSON modes) are refused by name when they ask for anything; fields nobody
here has heard of are left alone, as other servers do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import InputError
from runtime.sampling import Sampling
from runtime.text import whole

# field -> values that ask for nothing
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),  # 0 asks for that of the chosen token
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
}
STOPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that could be read."""

    sampling: Sampling
    stream: bool
    include_usage: bool
    messages: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()
    template_options: Mapping[str, Any]
    prompt: str | list[int] | None = None


def read_body(body: object, model: str, *, chat: bool, room: int, defaults: Sampling) -> Asked:
    """A request body. InputError naming the field; KeyError for another model.

    `room` is what max_tokens is when it is not said.
    """
    if not isinstance(body, dict):
        raise InputError("the body is no JSON object")
    for name, harmless in REFUSED.items():
        value = body.get(name)
        if not any(value == one and type(value) is type(one) for one in harmless):
            raise InputError(f"{name} is not supported here; leave it out")
    wanted = field(body, "model", str, model)
    if wanted != model:
        raise KeyError(wanted)
    stream = field(body, "stream", bool, False)
    stream_options = field(body, "stream_options", dict, {})
    limit = field(body, "max_tokens", int, None)
    limit = field(body, "max_completion_tokens", int, limit)
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOPS or any(type(s) is not str for s in stop):
        raise InputError(f"stop is a text or at most {STOPS} texts")
    sampling = Sampling(
        max_tokens=room if limit is None else limit,
        temperature=number(body, "temperature", defaults.temperature),
        top_p=number(body, "top_p", defaults.top_p),
        top_k=field(body, "top_k", int, defaults.top_k),
        min_p=number(body, "min_p", defaults.min_p),
        repetition_penalty=number(body, "repetition_penalty", defaults.repetition_penalty),
        stop=tuple(stop),
        seed=field(body, "seed", int, None),
    )
    common: dict[str, Any] = {
        "sampling": sampling,
        "stream": stream,
        "include_usage": bool(stream_options.get("include_usage")),
        "template_options": field(body, "chat_template_kwargs", dict, {}),
    }
    if not chat:
        return Asked(prompt=read_prompt(body.get("prompt")), **common)
    messages = field(body, "messages", list, None)
    if not messages:
        raise InputError("messages is missing or empty; give a list of messages")
    tools = field(body, "tools", list, [])
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise InputError("tool_choice must be auto or none here; tools cannot be forced")
    return Asked(messages=tuple(messages), tools=() if choice == "none" else tuple(tools), **common)


def read_prompt(prompt: object) -> str | list[int]:
    """One prompt, as text or as ids; a list of one is that one."""
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return list(prompt)
    raise InputError("prompt must be one text or one list of token ids")


def field(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of one JSON type, `default` where it is null or missing."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} is {str(value)[:80]!r}, not of type {kind.__name__}")
    return value


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """A number."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is {str(value)[:80]!r}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name} has too many digits; give a smaller number") from None


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; it may quote halves of surrogate pairs."""
    return {"error": {"message": whole(message), "type": kind, "param": None, "code": code}}


class Answers:
    """The envelope of one request's answers."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _envelope(self, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream; for completions `delta` is {"text": ...}."""
        body = {"delta": dict(delta)} if self.chat else {"text": delta.get("text", "")}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": reason}
        return {**self._envelope(True), "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last piece of a stream whose client asked for it."""
        return {**self._envelope(True), "choices": [], "usage": dict(usage)}

    def whole(
        self, message: Mapping[str, Any], reason: str, usage: Mapping[str, int]
    ) -> dict[str, Any]:
        """An answer in one piece; for completions `message` is {"text": ...}."""
        body = {"message": dict(message)} if self.chat else {"text": message["text"]}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": reason}
        return {**self._envelope(False), "choices": [choice], "usage": dict(usage)}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens counted."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
