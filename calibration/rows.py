"""How a row becomes a sample. A row is recognised by its columns, in this order:

  messages (+ tools)         a conversation in OpenAI's form; either may be JSON text
  query + tools + answers    one question and the calls that answer it (+ system)
  query + answer             a question and its answer
  instruction + output       an instruction (+ input) and its answer
  prompt + canonical_solution, text + code
                             tasks of HumanEval and MBPP, to be judged on, never calibrated on
  text                       a document

A row that cannot become a sample is handed on as a `Rejected` with its reason and is counted, never
dropped in silence.

Every sample knows its instance: what it shares with other runs of the same task. Runs of one
instance are never split between calibration and held-out sets. It is the column `instance_id` where
there is one (up to 21 runs of an issue in SWE-smith), else the first user message or the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from calibration.messages import (
    Sample,
    SampleError,
    Tool,
    normalised_call,
    normalised_message,
    normalised_tool,
    read_json,
    user_and_assistant,
)
from calibration.tool_schemas import json_schema_tool, trajectory_tools
from models.errors import InputError

Row = dict[str, Any]
Shape = Callable[[Row], Sample]
# What the shapes read; nothing else of a row is kept in the cache of hub sets.
COLUMNS = (
    "messages", "tools", "tool_names", "query", "answers", "answer", "system", "instruction",
    "input", "output", "prompt", "canonical_solution", "text", "code", "instance_id",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that did not become a sample, and why."""

    reason: str


def from_messages(row: Row) -> Sample:
    """`messages` (+ `tools`), each a list or its JSON text."""
    raw = listed(row["messages"], "messages")
    if not raw:
        raise SampleError("no messages")
    messages = tuple(normalised_message(message) for message in raw)
    tools = tools_of(row)
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if calls and not tools:
        offered = listed(row.get("tool_names"), "tool_names")
        if not all(isinstance(name, str) for name in offered):
            raise SampleError("tool_names with an entry that is not text")
        tools = tuple(trajectory_tools(calls, offered))
    return Sample(messages=messages, tools=tools)


def from_query(row: Row) -> Sample:
    """`query`, `tools`, `answers`: the question, the tools offered, the calls to make."""
    if not isinstance(row["query"], str) or not row["query"].strip():
        raise SampleError("empty query")
    answers = listed(row["answers"], "answers")
    if not answers:
        raise SampleError("no answers")
    calls = [normalised_call(answer, f"call_{n}") for n, answer in enumerate(answers, start=1)]
    system = row.get("system")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return Sample(
        messages=(
            *opening,
            {"role": "user", "content": row["query"]},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ),
        tools=tools_of(row),
    )


def from_pair(asked: str, answered: str) -> Shape:
    """Two columns of text: what is asked, and the answer."""

    def from_columns(row: Row) -> Sample:
        for column in (asked, answered):
            if not isinstance(row[column], str) or not row[column].strip():
                raise SampleError(f"empty {column}")
        return user_and_assistant(row[asked], row[answered])

    return from_columns


def from_instruction(row: Row) -> Sample:
    """`instruction` (+ `input`) and `output`."""
    for column in ("instruction", "output"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise SampleError(f"empty {column}")
    given = row.get("input")
    more = f"\n\n{given}" if isinstance(given, str) and given.strip() else ""
    return user_and_assistant(row["instruction"] + more, row["output"])


def from_text(row: Row) -> Sample:
    """`text` as it stands."""
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise SampleError("empty text")
    return Sample(text=row["text"])


SHAPES: tuple[tuple[tuple[str, ...], Shape], ...] = (
    (("messages",), from_messages),
    (("query", "tools", "answers"), from_query),
    (("query", "answer"), from_pair("query", "answer")),
    (("instruction", "output"), from_instruction),
    (("prompt", "canonical_solution"), from_pair("prompt", "canonical_solution")),
    (("text", "code"), from_pair("text", "code")),
    (("text",), from_text),
)


def shape_of(columns: list[str], source: str) -> Shape:
    """The conversion that fits the columns. Raises InputError naming the columns found."""
    for needed, shape in SHAPES:
        if set(needed) <= set(columns):
            return shape
    wanted = " | ".join("+".join(needed) for needed, _ in SHAPES)
    raise InputError(
        f"{source} has the columns {', '.join(columns) or '(none)'}; a row needs {wanted}"
    )


def converted(shape: Shape, row: Row) -> Sample | Rejected:
    """The sample of a row, or why there is none."""
    try:
        sample = shape(row)
        return replace(sample, instance=instance_of(row, sample))
    except SampleError as problem:
        return Rejected(reason=str(problem))
    except KeyError as missing:
        return Rejected(reason=f"row without the column {missing.args[0]!r}")


def instance_of(row: Row, sample: Sample) -> str:
    """What the row shares with other runs of its task (see the module), as a digest."""
    told = row.get("instance_id")
    if isinstance(told, int):
        told = str(told)
    if not isinstance(told, str) or not told:
        # A developer's text is often the same in all rows: a question only where no user asks.
        asks = {"user": 0, "developer": 1}
        told = sample.text or min(sample.messages, key=lambda m: asks.get(m["role"], 2))["content"]
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def tools_of(row: Row) -> tuple[Tool, ...]:
    """The tools column as JSON Schema definitions in their wrappers."""
    tools = [normalised_tool(tool)["function"] for tool in listed(row.get("tools"), "tools")]
    return tuple({"type": "function", "function": json_schema_tool(tool)} for tool in tools)


def listed(value: object, column: str) -> list[Any]:
    """A column that is a list or the JSON text of one; None is empty."""
    if isinstance(value, str):
        value = read_json(value, f"{column} is") if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleError(f"{column} is not a list")
    return value


def without_nulls(value: Any) -> Any:
    """Nested values without the None that Arrow puts where a row lacks another row's key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
