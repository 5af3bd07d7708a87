"""Samples longer than the limit, shortened between messages.

    tail     the beginning is kept: whole messages while they fit, then the part of the next one
             that does
    middle   system text and the first question are kept, and the end: whole messages from the last
             one back while they fit, beginning with an assistant's, then the end of one more
    cut      the first ids, wherever the limit falls

In `tail` and `middle` every message that is there is closed by the template, so that the model
sees conversations in its own form. Calls are never cut in two, and results without their calls are
left out. A document has no messages: `middle` joins its two ends. Where not even the first message
can be shortened (tool definitions longer than the limit), the ids are cut; how often is counted.

Costs of messages are counted with the tokenizer, and what the template adds is estimated; the
shortened sample is rendered and counted again, and shortened further until it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from calibration.chat import Rendering, check_whole, encode, spoken_text, tools_text
from calibration.messages import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["tail", "middle", "cut"]
Cut = Literal["none", "messages", "ids"]

LEAST_PART = 16  # tokens of a message worth keeping
MANY_CHARACTERS = 8  # a token; hardly any text has as many
ADDED = 6.0  # tokens that a template puts around a message, where it is not known
ATTEMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Ids of a sample within the limit, how they were rendered and cut, and its full length (to
    within a few tokens a message where the whole was never rendered)."""

    ids: list[int]
    rendering: Rendering
    cut: Cut
    full_length: int


def fitted(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, max_length: int, how: Truncation
) -> Fitted:
    """The sample in at most `max_length` tokens. Raises SampleError as `encode` does."""
    by_messages = bool(sample.messages) and how != "cut"
    if by_messages and characters(sample) > MANY_CHARACTERS * max_length:
        # Surely too long: a run of 30,000 tokens is counted once, by its messages, not twice.
        short = shortened(tokenizer, sample, None, max_length, how)
        if short is not None:
            return short
    ids, rendering = encode(tokenizer, sample)
    length = len(ids)
    if length <= max_length:
        return Fitted(ids=ids, rendering=rendering, cut="none", full_length=length)
    if by_messages:
        short = shortened(tokenizer, sample, length, max_length, how)
        if short is not None:
            return short
    if sample.text is not None and how == "middle":
        end = max_length // 2
        ids = ids[: max_length - end] + (ids[-end:] if end else [])
    return Fitted(ids=ids[:max_length], rendering=rendering, cut="ids", full_length=length)


def characters(sample: Sample) -> int:
    """Characters of all contents."""
    return sum(len(message["content"]) for message in sample.messages)


def shortened(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    length: int | None,
    max_length: int,
    how: Truncation,
) -> Fitted | None:
    """The sample with fewer or shorter messages; None where that cannot make it fit, or where it
    fits as it is. `length` is its full one, if that is known."""
    spoken = [spoken_text(message) for message in sample.messages]
    said = [tools_text(sample.tools)] if sample.tools else []
    counts = [len(ids) for ids in plain_ids(tokenizer, [*spoken, *said])]
    if length is None and sum(counts) <= max_length:
        return None
    costs = counts[: len(spoken)]
    known = None if length is None else max(0, length - sum(counts)) / len(costs)
    added = ADDED if known is None else known  # by the template, a message
    room = max_length - sum(counts[len(spoken) :])
    select = from_the_start if how == "tail" else both_ends
    for _ in range(ATTEMPTS):
        kept = select(tokenizer, sample.messages, [cost + added for cost in costs], room)
        if not kept:
            return None
        ids, rendering = encode(tokenizer, replace(sample, messages=tuple(kept)))
        if len(ids) <= max_length:
            full = length or sum(counts) + round(added * len(costs))
            return Fitted(ids=ids, rendering=rendering, cut="messages", full_length=full)
        room -= len(ids) - max_length + 1
    return None


def from_the_start(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    costs: list[float],
    room: float,
) -> list[Message]:
    """Whole messages from the first on, and the beginning of the next one."""
    kept: list[Message] = []
    for message, cost in zip(messages, costs, strict=True):
        if cost > room:
            part = part_of(tokenizer, message, room - LEAST_PART, end=False)
            return [*kept, part] if part else kept
        kept.append(message)
        room -= cost
    return kept


def both_ends(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    costs: list[float],
    room: float,
) -> list[Message]:
    """Messages up to the first question, and those of the end."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    head = users[0] + 1 if users else 0
    room -= sum(costs[:head])
    if room < LEAST_PART:
        return from_the_start(tokenizer, messages, costs, room + sum(costs[:head]))
    first = len(messages)
    while first > head and costs[first - 1] <= room:
        first -= 1
        room -= costs[first]
    part = None
    if first > head and messages[first - 1]["role"] == "assistant":
        part = part_of(tokenizer, messages[first - 1], room - LEAST_PART, end=True)
    tail = list(messages[first:])
    if part is not None:
        return [*messages[:head], part, *tail]
    starts = [place for place, message in enumerate(tail) if message["role"] == "assistant"]
    return [*messages[:head], *tail[starts[0] if starts else len(tail) :]]


def part_of(
    tokenizer: PreTrainedTokenizerBase, message: Message, room: float, *, end: bool
) -> Message | None:
    """The message with the first (or last) `room` tokens of its content; None where little would
    be left or calls or reasoning would be lost."""
    if room < LEAST_PART or message.get("tool_calls") or message.get("reasoning_content"):
        return None
    if not tokenizer.is_fast:  # only those tell where in the text a token stands
        return None
    content = message["content"]
    read = tokenizer(
        content, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # fmt: skip
    places = read["offset_mapping"]
    if len(places) <= room:
        return message
    kept = content[places[-int(room)][0] :] if end else content[: places[int(room) - 1][1]]
    return {**message, "content": kept}


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts without anything added. Raises SampleError as `encode` does."""
    for text in texts:
        check_whole(text)
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found
