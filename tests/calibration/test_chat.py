"""Messages -> text -> ids: what templates do with tools, arguments, roles and BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.chat import (
    Sample,
    SampleError,
    encode,
    load_tokenizer,
    normalised_call,
    normalised_message,
    normalised_tool,
    render,
    tokenizer_sha256,
)
from models.errors import InputError
from tests.calibration.conftest import CHATML, Wrap

WEATHER = normalised_tool({"name": "get_weather", "parameters": {"type": "object"}})
CALL = {"function": {"name": "get_weather", "arguments": '{"city": "Köln", "days": 2}'}}
CONVERSATION = Sample(
    messages=tuple(
        normalised_message(message)
        for message in (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}, "In Köln."]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny", "tool_call_id": "call_0"},
            {"role": "assistant", "content": "It is sunny."},
        )
    ),
    tools=(WEATHER,),
)
# DeepSeek's templates join arguments to a string; Mistral's and others refuse roles.
JOINS_ARGUMENTS = CHATML.replace(
    "{{ call.function.arguments | tojson }}", "{{ call.function.arguments + '' }}"
)
REFUSES = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- else %}{{ message.content }}</s>{% endif %}{% endfor %}"""
IGNORES_TOOLS = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}"""
CHAIN = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}
{% elif m.role == 'user' %}U: {{ m.content }}
{% elif m.role == 'assistant' %}A: {{ m.content }}{% for call in m.tool_calls or [] %}
{{ call.function | tojson }}{% endfor %}
{% endif %}{% endfor %}{{ tools | tojson }}"""
RESULTS_AS_JSON = """{% for m in messages %}{{ m.role }}:
{%- if m.role == 'tool' %}{{ m.content | tojson }}
{%- else %}{{ m.content.split('</think>')[-1] }}{{ (m.tool_calls or '') | tojson }}{% endif %}
{% endfor %}{{ tools | tojson }}"""
EVERYTHING = ("Be brief.", "Weather?\nIn Köln.", "get_weather", "Köln", "sunny", "It is sunny.")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHATML, "template"),
        (JOINS_ARGUMENTS, "template"),
        (REFUSES, "folded"),
        (IGNORES_TOOLS, "folded"),
        (None, "plain"),
    ],
    ids=["chatml", "joins-arguments", "refuses-roles", "ignores-tools", "no-template"],
)
def test_nothing_is_left_out(wrap: Wrap, template: str | None, form: str) -> None:
    text, rendering = render(wrap(template), CONVERSATION)
    assert rendering == form
    for words in EVERYTHING:
        assert words in text, words


ASKED = {"role": "user", "content": "Weather?"}
LOOKS = {"role": "assistant", "content": "I look first.", "tool_calls": [CALL]}
SEEN = {"role": "tool", "content": "sunny"}


@pytest.mark.parametrize(
    ("messages", "form"),
    [
        (({"role": "developer", "content": "Be terse."}, ASKED), "template"),
        ((ASKED, LOOKS, SEEN), "folded"),
    ],
    ids=["developer", "tool"],
)
def test_a_message_that_a_template_drops_is_said_otherwise(
    wrap: Wrap, messages: tuple[dict[str, Any], ...], form: str
) -> None:
    """A developer as a system; a role that is not known at all within the others."""
    sample = Sample(messages=tuple(normalised_message(m) for m in messages), tools=(WEATHER,))
    text, rendering = render(wrap(CHAIN), sample)
    assert rendering == form
    for message in messages:
        assert message["content"] in text


def test_results_as_json_and_early_reasoning_are_not_missed(wrap: Wrap) -> None:
    """What templates write in another form or drop by their own rule is no reason to fold."""
    thinks = {**LOOKS, "content": "<think>hm</think>I look first."}
    seen = {**SEEN, "content": '{"sky": "clear"}\nnö'}
    messages = tuple(normalised_message(m) for m in (ASKED, thinks, seen, ASKED))
    text, rendering = render(wrap(RESULTS_AS_JSON), Sample(messages=messages, tools=(WEATHER,)))
    assert rendering == "template"
    assert 'tool:"{\\"sky\\": \\"clear\\"}\\nnö"' in text


@pytest.mark.parametrize(
    "bug",
    ["m.content.index('zzz')", "1 / (m.content | length - m.content | length)", "'{}'.format()"],
)
def test_a_template_that_raises_python_errors(wrap: Wrap, bug: str) -> None:
    """It refuses: what it chokes on is folded, and where it always does the row is counted."""
    loop = "{% for m in messages %}{{ m.content }}{% if tools %}{{ BUG }}{% endif %}{% endfor %}"
    template = loop.replace("BUG", bug)
    assert render(wrap(template), CONVERSATION)[1] == "folded"
    with pytest.raises(SampleError, match="chat template refuses"):
        render(wrap(template.replace("if tools", "if messages")), CONVERSATION)


def test_too_deep_a_nesting_is_a_reason(wrap: Wrap) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    call = {"name": "get_weather", "arguments": {"city": deep}}
    message = normalised_message({"role": "assistant", "tool_calls": [call]})
    for template in (CHATML, None):
        with pytest.raises(SampleError, match="too deep a nesting"):
            render(wrap(template), Sample(messages=(message,)))


def test_a_template_that_prints_arguments_prints_json(wrap: Wrap) -> None:
    template = """{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}
{{ call.function.name }}|{{ call.function.arguments }}{% endfor %}
{% endfor %}{{ tools | tojson }}"""
    call = {"name": "get_weather", "arguments": {"city": "Köln", "now": True}}
    message = normalised_message({"role": "assistant", "tool_calls": [call]})
    text, rendering = render(wrap(template), Sample(messages=(message,)))
    assert rendering == "template"
    assert 'get_weather|{"city": "Köln", "now": true}' in text


def test_template_gets_arguments_as_an_object(wrap: Wrap) -> None:
    text, _ = render(wrap(CHATML), CONVERSATION)
    line = next(line for line in text.split("\n") if line.startswith("<tool_call>"))
    assert json.loads(line.removeprefix("<tool_call>").removesuffix("<|im_end|>")) == {
        "name": "get_weather",
        "arguments": {"city": "Köln", "days": 2},
    }


def test_plain_rendering_as_documented(wrap: Wrap) -> None:
    text, _ = render(wrap(None), CONVERSATION)
    assert text == (
        "Be brief.\n\n"
        'Tools:\n{"name": "get_weather", "parameters": {"type": "object"}}\n\n'
        "User: Weather?\nIn Köln.\n\n"
        'Assistant: Call: {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n\n'
        "Tool: sunny\n\n"
        "Assistant: It is sunny.\n"
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, REFUSES, None], ids=["without", "with", "plain"])
def test_bos_at_most_once(wrap: Wrap, template: str | None, adds_bos: bool) -> None:
    """Once if either the template or the tokenizer puts it, whichever does."""
    tokenizer = wrap(template, adds_bos=adds_bos)
    ids, _ = encode(tokenizer, CONVERSATION)
    expected = int(adds_bos or template == REFUSES)
    assert ids.count(tokenizer.bos_token_id) == expected
    assert (ids[0] == tokenizer.bos_token_id) == bool(expected)


def test_bos_of_plain_text_and_control_words_in_it(wrap: Wrap) -> None:
    tokenizer = wrap(adds_bos=True)
    text = "a <s> b <|im_end|> c"
    ids, rendering = encode(tokenizer, Sample(text=text))
    assert rendering == "text"
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_without_bos(wrap: Wrap) -> None:
    tokenizer = wrap(CHATML, bos=None)
    ids, _ = encode(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == render(tokenizer, CONVERSATION)[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {})],
)
def test_arguments_become_an_object(arguments: Any, expected: dict[str, int]) -> None:
    for raw in (
        {"name": "f", "arguments": arguments},
        {"function": {"name": "f", "arguments": arguments}},
    ):
        assert normalised_call(raw, "call_1") == {
            "id": "call_1", "type": "function", "function": {"name": "f", "arguments": expected},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text"),
        ({"role": "user", "content": 7}, "content is a int"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "not an object"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "without a name"),
        ("hello", "unknown role 'str'"),
    ],
)
def test_bad_messages_are_named(message: Any, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        normalised_message(message)


def test_loading_a_tokenizer(wrap: Wrap, tmp_path: Path) -> None:
    saved = wrap(CHATML, adds_bos=True)
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {}}')
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, CONVERSATION) == encode(saved, CONVERSATION)
    digest = tokenizer_sha256(loaded)
    assert digest == tokenizer_sha256(load_tokenizer(tmp_path))
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert tokenizer_sha256(load_tokenizer(tmp_path)) != digest


def test_missing_tokenizers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer files .*; copy them") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.OddTokenizer", null]}}'
    )
    (tmp_path / "odd.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(InputError, match="without remote code") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="is a file"):
        load_tokenizer(tmp_path / "odd.py")
