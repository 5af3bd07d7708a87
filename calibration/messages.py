"""Messages as we speak them: one sample, and its messages, calls and tools in one known form.

Rows come with content as text, as parts or as null, with arguments as objects or as JSON text,
with tools wrapped or flat. Everything after this module (templates, encodings, truncation) sees
OpenAI's form only: content is a str, a call's arguments are an object, a tool stands in its
wrapper. What has no such form raises `SampleError`, whose message is the reason under which the row
is counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


class SampleError(Exception):
    """One row cannot become a sample; the message is the reason under which it is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A conversation (`messages`, `tools`) or a plain `text`; exactly one of the two.

    `instance` names the task that other samples may be runs of (rows.py); it is no content.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    text: str | None = None
    instance: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        assert (self.text is None) == bool(self.messages), "a sample has messages or text, not both"


def user_and_assistant(user: str, assistant: str) -> Sample:
    """The two-message conversation of an instruction and its answer."""
    return Sample(
        messages=(
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        )
    )


class Arguments(dict[str, Any]):
    """A call's arguments, which a template that prints them whole writes as JSON."""

    def __str__(self) -> str:
        return compact(self)


def tool_call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One entry of an assistant message's `tool_calls`."""
    function = {"name": name, "arguments": Arguments(arguments)}
    return {"id": call_id, "type": "function", "function": function}


# ---- messages as they come -> messages as we speak them ------------------------------------------


def normalised_message(raw: object) -> Message:
    """A message with known role, str content, and calls whose arguments are objects.

    Keys outside the OpenAI form (thought, cache_control, ...) are left behind. Raises SampleError.
    """
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        role = raw.get("role") if isinstance(raw, dict) else type(raw).__name__
        raise SampleError(f"message with unknown role {role!r}")
    message: Message = {"role": raw["role"], "content": joined_content(raw.get("content"))}
    calls = raw.get("tool_calls")
    if isinstance(calls, list | tuple) and calls:
        message["tool_calls"] = [
            normalised_call(call, f"call_{place}") for place, call in enumerate(calls)
        ]
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(raw.get(key), str) and raw[key]:
            message[key] = raw[key]
    answered = raw.get("tool_call_ids")  # SWE-smith's trajectories: a list of one id
    if "tool_call_id" not in message and isinstance(answered, list) and len(answered) == 1:
        message["tool_call_id"] = str(answered[0])
    return message


def joined_content(content: object) -> str:
    """Content as one string: None is empty, text parts of a list are joined by newlines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                raise SampleError("message content with a part that is not text")
        return "\n".join(texts)
    raise SampleError(f"message content is a {type(content).__name__}, not text")


def normalised_call(raw: object, default_id: str) -> dict[str, Any]:
    """An OpenAI tool call from the wrapped or the flat form, its arguments as an object."""
    if not isinstance(raw, dict):
        raise SampleError("tool call is not an object")
    function = raw["function"] if isinstance(raw.get("function"), dict) else raw
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise SampleError("tool call without a name")
    if isinstance(arguments, str):
        said = "tool call whose arguments are"
        arguments = read_json(arguments, said) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise SampleError("tool call whose arguments are not an object")
    return tool_call(raw.get("id") or default_id, name, arguments)


def normalised_tool(raw: object) -> Tool:
    """A tool definition in its {"type": "function", "function": {...}} wrapper."""
    if isinstance(raw, dict) and isinstance(raw.get("function"), dict):
        raw = raw["function"]
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str) or not raw["name"]:
        raise SampleError("tool definition without a name")
    return {"type": "function", "function": raw}


def read_json(text: str, said: str) -> Any:
    """The value of a row's JSON text. Raises SampleError beginning with `said`: "line is"."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise SampleError(f"{said} not JSON") from None
    except (ValueError, RecursionError):  # Python reads 4,300 digits and 1,000 levels or so
        raise SampleError(f"{said} JSON with too long a number or too deep a nesting") from None


def compact(value: object) -> str:
    """JSON with its characters as they are. Raises SampleError where it is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:  # what could just be read cannot be written from a deeper call
        raise SampleError("a call or tool with too deep a nesting") from None
