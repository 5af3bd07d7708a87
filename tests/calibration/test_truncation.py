"""Samples cut to length: within the limit, closed messages, nothing moved, nothing torn."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from calibration.chat import encode
from calibration.messages import Sample, SampleError, tool_call
from calibration.truncation import fitted
from tests.calibration.conftest import CHATML, Wrap

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"


def turn(n: int, words: int) -> list[dict[str, Any]]:
    """A call, its result, and a remark, all told apart by n."""
    call = tool_call(f"c{n}", "look", {"at": f"place{n}"})
    return [
        {"role": "assistant", "content": f"looking{n}", "tool_calls": [call]},
        {"role": "tool", "content": f"seen{n} " + "word " * words, "tool_call_id": f"c{n}"},
        {"role": "assistant", "content": f"so{n} " + "thing " * words},
        {"role": "user", "content": f"next{n}"},
    ]


def run(turns: int, words: int) -> Sample:
    opening = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "question0"},
    ]
    return Sample(messages=(*opening, *(m for n in range(turns) for m in turn(n, words))))


def blocks(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """The messages of a ChatML text; each must be opened and closed."""
    text = tokenizer.decode(ids).removeprefix("<s>")
    assert text.count(OPEN) == text.count(CLOSE)
    assert re.fullmatch(rf"({re.escape(OPEN)}.*?{re.escape(CLOSE)}\n)+", text, re.DOTALL), text
    return [part.partition(CLOSE)[0] for part in text.split(OPEN)[1:]]


@pytest.mark.parametrize("limit", [120, 200, 400])
def test_tail_keeps_the_beginning(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    sample = run(9, 12)
    whole = blocks(tokenizer, encode(tokenizer, sample)[0])
    row = fitted(tokenizer, sample, limit, "tail")
    assert row.cut == "messages"
    assert limit - 60 < len(row.ids) <= limit
    assert row.full_length > limit
    kept = blocks(tokenizer, row.ids)
    assert kept[:-1] == whole[: len(kept) - 1]
    assert whole[len(kept) - 1].startswith(kept[-1])


@pytest.mark.parametrize("limit", [120, 200, 400])
def test_middle_keeps_both_ends(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    sample = run(9, 12)
    whole = blocks(tokenizer, encode(tokenizer, sample)[0])
    row = fitted(tokenizer, sample, limit, "middle")
    assert row.cut == "messages"
    assert limit - 90 < len(row.ids) <= limit
    kept = blocks(tokenizer, row.ids)
    assert kept[:2] == whole[:2]
    tail = kept[2:]
    assert tail[0].startswith("assistant\n")
    assert tail[1:] == whole[len(whole) - len(tail) + 1 :]
    last_part = tail[0].removeprefix("assistant\n")
    assert whole[len(whole) - len(tail)].endswith(last_part)


def test_cut_is_wherever_the_limit_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = run(5, 10)
    row = fitted(tokenizer, sample, 100, "cut")
    assert row.ids == encode(tokenizer, sample)[0][:100]
    assert row.cut == "ids"


def test_a_short_sample_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = run(1, 1)
    ids, rendering = encode(tokenizer, sample)
    row = fitted(tokenizer, sample, len(ids), "middle")
    assert (row.ids, row.rendering, row.cut, row.full_length) == (ids, rendering, "none", len(ids))


def test_a_document_keeps_its_beginning_or_both_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Sample(text=" ".join(f"w{n}" for n in range(400)))
    ids, _ = encode(tokenizer, sample)
    assert fitted(tokenizer, sample, 51, "tail").ids == ids[:51]
    assert fitted(tokenizer, sample, 51, "middle").ids == [*ids[:26], *ids[-25:]]
    assert fitted(tokenizer, sample, 51, "middle").cut == "ids"


def test_tools_longer_than_the_limit_are_cut_and_counted(wrap: Wrap) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x " * 300}}
    sample = Sample(messages=({"role": "user", "content": "u"},), tools=(tool,))
    row = fitted(wrap(CHATML), sample, 50, "tail")
    assert (len(row.ids), row.cut) == (50, "ids")


def test_reasoning_cut_short_stays_reasoning(tokenizer: PreTrainedTokenizerFast) -> None:
    """What is cut is content: a message with reasoning of its own is kept whole or left out."""
    long = {"role": "assistant", "content": "a " * 400, "reasoning_content": "r " * 10}
    sample = Sample(messages=({"role": "user", "content": "u"}, long))
    kept = blocks(tokenizer, fitted(tokenizer, sample, 60, "tail").ids)
    assert [part.split("\n")[0] for part in kept] == ["user"]


@pytest.mark.parametrize("how", ["tail", "middle", "cut"])
def test_half_a_surrogate_in_a_long_one(tokenizer: PreTrainedTokenizerFast, how: Any) -> None:
    long = {"role": "assistant", "content": "a" * 2000 + "\ud800"}
    sample = Sample(messages=({"role": "user", "content": "u"}, long))
    with pytest.raises(SampleError, match="half of a surrogate pair"):
        fitted(tokenizer, sample, 50, how)


@settings(max_examples=40)
@given(
    st.integers(0, 5), st.integers(0, 30), st.integers(2, 400), st.sampled_from(["tail", "middle"])
)
def test_never_longer_than_asked(turns: int, words: int, limit: int, how: Any) -> None:
    row = fitted(TOKENIZER[0], run(turns, words), limit, how)
    assert 0 < len(row.ids) <= limit
    if row.cut != "ids":
        blocks(TOKENIZER[0], row.ids)


TOKENIZER: list[PreTrainedTokenizerFast] = []


@pytest.fixture(autouse=True)
def _tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """For the property above: hypothesis and fixtures of a function do not go together."""
    TOKENIZER[:] = [tokenizer]
