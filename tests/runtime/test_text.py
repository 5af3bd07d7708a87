"""Text as it comes, sampling, and messages read back from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from calibration.chat import load_tokenizer
from calibration.deepseek_v32 import calls_text
from calibration.messages import tool_call
from models.errors import InputError
from runtime.conversation import AnswerStream, Conversations
from runtime.openai_bodies import read_body
from runtime.sampling import Sampler, Sampling
from runtime.text import TextStream, prompt_ids
from tests.runtime.oracle import DEMO

CALLS = [
    tool_call("1", "get_weather", {"city": "Paris", "days": 3}),
    tool_call("2", "now", {}),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO)


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x", "größer 漢字 🙂👍🏽 ok", "  a  b \n\n"]
)
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["return", "rn x", ":\n", "x):"])
def test_stop_strings_are_never_shown(tokenizer: Any, stop: str) -> None:
    text = "def f(x):\n    return x + 1"
    stream = TextStream(tokenizer, (stop, "never"))
    shown = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        shown += stream.push(token)
        assert text.partition(stop)[0].startswith(shown)
    assert stream.stopped
    assert shown + stream.finish() == text.partition(stop)[0]


def test_half_a_stop_string_comes_out_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ("retry",))
    ids = tokenizer("do ret", add_special_tokens=False)["input_ids"]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "do ret"
    assert not stream.stopped


@pytest.mark.parametrize("text", ["\ufffd\ufffd👩 ok", "\ufffd" * 9 + "漢", "a\ufffd\ufffd\ufffd"])
def test_a_mark_that_the_model_means_eats_nothing(tokenizer: Any, text: str) -> None:
    """U+FFFD itself, token by token as an unfinished character looks too."""
    stream = TextStream(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == text


def metaspace() -> Any:
    """A tokenizer as Llama's: the first word of a text loses its space, bytes for what is rare."""
    words = ["<unk>", "▁Hello", "▁world", "▁again", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


@pytest.mark.parametrize("prompt", [[1], [1] * 40, [1, *(4 + b for b in "漢字漢字".encode())]])
def test_what_continues_a_prompt_keeps_its_first_space(prompt: list[int]) -> None:
    tokenizer = metaspace()
    stream = TextStream(tokenizer, after=prompt)
    answer = [2, *(4 + b for b in "\ufffd\ufffd🙂".encode()), 3]
    shown = "".join(stream.push(token) for token in answer) + stream.finish()
    assert tokenizer.decode([*prompt, *answer]) == tokenizer.decode(prompt) + shown
    assert shown == " world\ufffd\ufffd🙂 again"
    assert stream.count == len(answer)


def test_a_prompt_of_ids_that_ends_inside_a_character(tokenizer: Any) -> None:
    ids = tokenizer("ab👩", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, after=ids[:-1])
    assert stream.push(ids[-1]) + stream.finish() == tokenizer.decode(ids[-1:])


def test_greedy_seeds_and_limits() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -5.0])
    assert Sampler(Sampling()).choose(logits, []) == 1
    drawn = [
        [sampler.choose(logits, []) for _ in range(20)]
        for sampler in (Sampler(Sampling(temperature=1.0, seed=s)) for s in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert {1} == set(
        Sampler(Sampling(temperature=1.0, top_p=0.4, seed=0)).choose(logits, []) for _ in range(50)
    )
    near = Sampler(Sampling(temperature=1.0, min_p=0.5, seed=0))
    assert {near.choose(logits, []) for _ in range(80)} == {1, 2}
    assert Sampler(Sampling(repetition_penalty=2.0)).choose(logits, [1]) == 2
    two = Sampler(Sampling(temperature=50.0, top_k=2, seed=0))
    assert {two.choose(logits, []) for _ in range(80)} == {1, 2}
    for none in (0, -1):
        every = Sampler(Sampling(temperature=50.0, top_k=none, seed=0))
        assert {every.choose(logits, []) for _ in range(80)} == {0, 1, 2, 3}
    for cold in (1e-40, 1e-6, 1e-5):
        assert Sampler(Sampling(temperature=cold)).choose(logits * 30, []) == 1
    drawn = Sampler(Sampling(temperature=1.0, repetition_penalty=0.01))
    assert drawn.choose(logits * 30, [1]) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1},
     {"repetition_penalty": 0}, {"repetition_penalty": 1e-40}, {"top_k": -2},
     {"temperature": float("nan")}, {"stop": ("",)}, {"seed": -1}],
)  # fmt: skip
def test_options_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_body_s_top_k() -> None:
    def sampling(**body: Any) -> Sampling:
        asked = {"prompt": "x", **body}
        return read_body(asked, "m", chat=False, room=9, defaults=Sampling(top_k=20)).sampling

    assert sampling().top_k == 20
    assert sampling(top_k=3).top_k == 3
    with pytest.raises(InputError, match="top_k"):
        sampling(top_k=1.5)


def read(reader: AnswerStream, text: str, size: int, ended: bool = True) -> dict[str, Any]:
    """What a reader makes of a text that comes in pieces of `size` characters."""
    deltas = [reader.push(text[i : i + size]) for i in range(0, len(text), size)]
    deltas.append(reader.finish(ended=ended))
    return {
        "content": "".join(delta.content for delta in deltas),
        "reasoning": "".join(delta.reasoning for delta in deltas),
        "calls": [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for delta in deltas
            for call in delta.tool_calls
        ],
    }


WANTED = [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]
HERMES = "\n".join(
    "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    for name, arguments in WANTED
)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(("form", "text"), [("dsml", calls_text(CALLS)), ("hermes", HERMES)])
def test_calls_are_read_back(form: Any, text: str, size: int) -> None:
    found = read(AnswerStream(form, thinking=True), "hm, so</think>Sure." + text, size)
    assert found == {"content": "Sure.", "reasoning": "hm, so", "calls": WANTED}
    plain = read(AnswerStream(form, thinking=False), "1 < 2 and <tool", size)
    assert plain == {"content": "1 < 2 and <tool", "reasoning": "", "calls": []}


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_an_answer_that_opens_its_own_reasoning(size: int) -> None:
    found = read(AnswerStream("hermes", thinking=False), "\n<think>why</think>because", size)
    assert found == {"content": "because", "reasoning": "why", "calls": []}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {\n</tool_call>'),
        ("hermes", "<tool_call>\n[1]\n</tool_call>"),
        ("hermes", '<tool_call>\n{"name": 5}\n</tool_call>'),
        ("dsml", calls_text(CALLS).replace('string="false">3', 'string="false">three')),
        ("hermes", HERMES.replace("3}", "NaN}")),
        ("hermes", HERMES.replace("3}", "1e999}")),
        ("hermes", HERMES.replace("3}", "[" * 100_000 + "}")),
        ("hermes", HERMES + "\nand so on"),
        ("dsml", calls_text(CALLS).replace('string="false">3', 'string="false">NaN')),
        ("dsml", calls_text(CALLS).replace('string="false">3', 'string="false">' + "[" * 100_000)),
        ("dsml", calls_text(CALLS).replace('string="false">3', 'string="false">' + "3" * 5000)),
    ],
    ids=str,
)
def test_broken_calls_stay_content(form: Any, text: str) -> None:
    assert read(AnswerStream(form, thinking=False), text, 4)["content"] == text
    assert read(AnswerStream(form, thinking=False), "\n" + text, 1000)["content"] == "\n" + text


def test_a_call_that_was_cut_off_is_not_made(tokenizer: Any) -> None:
    half = calls_text(CALLS)[:-40]
    found = read(AnswerStream("dsml", thinking=False), "ok" + half, 9, ended=False)
    assert found["calls"] == WANTED[:1]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"code": "a\nb"}', {"code": "a\nb"}),
        ('{"code": "} </tool_call> {"}', {"code": "} </tool_call> {"}),
        ('"{\\"code\\": 1}"', {"code": 1}),
        ('{"code": "\\ud83d 漢"}', {"code": "? 漢"}),
        ("null", {}),
    ],
)
@pytest.mark.parametrize("size", [3, 1000])
def test_hermes_calls_as_models_write_them(written: str, arguments: Any, size: int) -> None:
    block = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    text = "hm</think>\n\n" + block % written + "\n" + block % "{}"
    found = read(AnswerStream("hermes", thinking=True), text, size)
    assert found == {"content": "", "reasoning": "hm", "calls": [("f", arguments), ("f", {})]}


@pytest.mark.parametrize("size", [1, 1000])
def test_blank_text_that_no_call_follows_is_content(size: int) -> None:
    for text in ("\n\n", "\n\nSure. ", "\n <tool_cal"):
        assert read(AnswerStream("hermes", thinking=False), text, size)["content"] == text


@pytest.mark.parametrize("cut", [1, 12, 40, 55])
def test_a_hermes_call_that_was_cut_off_is_not_made(cut: int) -> None:
    found = read(AnswerStream("hermes", thinking=False), "ok" + HERMES[:-cut], 9, ended=False)
    assert (found["content"], found["calls"]) == ("ok", WANTED[:1])
    whole = read(AnswerStream("hermes", thinking=False), HERMES[:-cut], 9, ended=True)
    assert (whole["content"], whole["calls"]) == (HERMES[:-cut], [])


HISTORY = [
    {"role": "user", "content": "w"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function",
         "function": {"name": "f", "arguments": '{"city": "Köln", "ok": true}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "21"},
]  # fmt: skip


@pytest.mark.parametrize(
    "shown",
    ["{{ f.name + '|' + f.arguments }}", "{{ f.name }}|{{ f.arguments }}",
     "{{ f.name ~ '|' ~ f.arguments }}", "{{ f.name }}|{{ f.arguments | tojson }}"],
)  # fmt: skip
def test_arguments_are_json_however_a_template_writes_them(shown: str) -> None:
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{% set f = call.function %}" + shown + "{% endfor %}{% endfor %}"
    )
    text = tokenizer.decode(Conversations(tokenizer).prompt(HISTORY).ids)
    assert 'wf|{"city": "Köln", "ok": true}21' in text


def test_templates_that_fail_and_that_are_sent_are_refused() -> None:
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    asked = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="template refuses the messages: ZeroDivisionError"):
        Conversations(tokenizer).prompt(asked)
    with pytest.raises(InputError, match="may not replace chat_template"):
        Conversations(tokenizer).prompt(asked, (), {"chat_template": "x"})


def test_half_a_surrogate_pair_is_refused(tokenizer: Any) -> None:
    conversations = Conversations(tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "\ud83d"}}
    with pytest.raises(InputError, match="surrogate"):
        prompt_ids(tokenizer, "caf\udce9")
    with pytest.raises(InputError, match="surrogate"):
        conversations.prompt([{"role": "user", "content": "\ud83d"}])
    with pytest.raises(InputError, match="surrogate"):
        conversations.prompt([{"role": "user", "content": "x"}], [tool])


def test_prompts_of_the_demo_model(tokenizer: Any) -> None:
    conversations = Conversations(tokenizer)
    assert conversations.form == "dsml"
    asked = conversations.prompt([{"role": "user", "content": "Hi"}])
    text = tokenizer.decode(asked.ids)
    assert text.count(tokenizer.bos_token) == 1
    assert text.endswith("</think>")
    assert not asked.thinking
    assert conversations.prompt(
        [{"role": "user", "content": "Hi"}], (), {"thinking": True}
    ).thinking
    for wrong in ([], [{"role": "robot", "content": ""}], [{"role": "user", "content": [{}]}]):
        with pytest.raises(InputError, match="message"):
            conversations.prompt(wrong)
