"""From messages to the prompt of a model, and from what it writes back to a message.

Prompts are rendered by the tokenizer's own template; DeepSeek-V3.2, which ships none, by
calibration/deepseek_v32.py; a tokenizer without either gets the plain form of calibration/chat.py.
Tool calls are read back in two forms:

    DSML      \\n\\n<|DSML|function_calls>...    DeepSeek-V3.2 (full-width bars in the real one)
    Hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>    ChatML models, Qwen

Which one a model speaks is told by its template. A call that is written wrongly stays in the
content: the client then sees what the model said instead of an error or nothing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calibration import deepseek_v32
from calibration.chat import TEMPLATE_BUGS, plain, starts_with_bos, with_text_arguments
from calibration.deepseek_v32 import CompletionError, encode_messages, parse_completion
from calibration.messages import (
    Message,
    Sample,
    SampleError,
    Tool,
    normalised_message,
    normalised_tool,
)
from models.errors import InputError
from runtime.text import overlap, prompt_ids, whole

Form = Literal["dsml", "hermes"]
DSML_START = f"\n\n{deepseek_v32.CALLS}\n"
HERMES_START = "<tool_call>"
HERMES_OPEN = re.compile(r"\s*<tool_call>\s*")
HERMES_CLOSE = re.compile(r"\s*</tool_call>\s*")
LENIENT = json.JSONDecoder(strict=False)  # models write line breaks inside strings
THINK, END_THINK = deepseek_v32.THINK, deepseek_v32.END_THINK


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a model is asked: its ids, and whether its turn was opened inside a reasoning block."""

    ids: list[int]
    thinking: bool


class Conversations:
    """How one model's conversations are written and read."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template or "")
        self.encoded = not template and deepseek_v32.speaks(tokenizer.get_vocab())
        self.form: Form = "dsml" if self.encoded or deepseek_v32.DSML in text else "hermes"

    def prompt(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Ids up to the opening of the assistant's turn. `options` go to the template.

        InputError for messages or tools without OpenAI's form, and what the template refuses.
        """
        options = dict(options or {})
        try:
            known = [normalised_message(message) for message in messages]
            offered = [normalised_tool(tool) for tool in tools]
            if not known:
                raise InputError("messages is empty; give at least one message")
            text = self._render(known, offered, options)
        except SampleError as error:
            raise InputError(f"messages: {error}") from error
        ids = prompt_ids(self.tokenizer, text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and starts_with_bos(self.tokenizer):
            ids.insert(0, bos)
        return Prompt(ids=ids, thinking=text.rstrip().endswith(THINK))

    def _render(self, messages: list[Message], tools: list[Tool], options: dict[str, Any]) -> str:
        if "chat_template" in options:
            raise InputError("chat_template_kwargs may not replace chat_template; leave it out")
        if self.encoded:
            thinking = bool(options.get("thinking", options.get("enable_thinking", False)))
            return encode_messages(messages, tools, thinking=thinking)
        if not self.tokenizer.chat_template:
            sample = Sample(messages=tuple(messages), tools=tuple(tools))
            return plain(sample) + "\nAssistant:"
        from jinja2 import TemplateError

        for name in ("tokenize", "add_generation_prompt", "return_dict", "return_tensors"):
            options.pop(name, None)
        try:
            try:
                return self._templated(messages, tools, options)
            except TypeError:  # the template joins arguments to text, as OpenAI's are
                return self._templated(map(with_text_arguments, messages), tools, options)
        except (TemplateError, *TEMPLATE_BUGS) as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"the model's chat template refuses the messages: {problem}"
            ) from error

    def _templated(
        self, messages: Iterable[Message], tools: list[Tool], options: dict[str, Any]
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages),
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        assert isinstance(text, str)
        return text

    def answer(self, thinking: bool, tools: bool) -> AnswerStream:
        """A reader of one answer to a prompt."""
        return AnswerStream(self.form if tools else None, thinking)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: reasoning, content, or whole tool calls in OpenAI's form."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


class AnswerStream:
    """Text as it comes -> pieces of a message. Marks are never shown, not even half.

    Blank text before the first call is no content; it is held back until other text comes.
    """

    def __init__(self, form: Form | None, thinking: bool) -> None:
        self.form = form
        self.start = {"dsml": DSML_START, "hermes": HERMES_START}[form] if form else None
        self.state: Literal["opening", "reasoning", "content", "calls"]
        self.state = "reasoning" if thinking else "opening"
        self.held = ""
        self.blank = ""  # held back until there is content
        self.spoken = False

    def push(self, text: str) -> Delta:
        """What is certain after more text."""
        self.held += text
        content = reasoning = ""
        if self.state == "opening":
            begun = self.held.lstrip()
            if begun.startswith(THINK):
                self.state, self.held = "reasoning", begun[len(THINK) :]
            elif THINK.startswith(begun):
                return Delta()
            else:
                self.state = "content"
        if self.state == "reasoning":
            reasoning, end, rest = self._until(END_THINK)
            if end:
                self.state, self.held = "content", rest
        if self.state == "content":
            content = self.held
            if self.start is None:
                self.held = ""
            else:
                content, found, rest = self._until(self.start)
                if not self.spoken:
                    content, self.blank = self.blank + content, ""
                    self.spoken = bool(content.strip())
                    if not self.spoken:
                        content, self.blank = "", content
                if found:
                    self.state, self.held = "calls", self.blank + self.start + rest
        return Delta(content, reasoning)

    def _until(self, mark: str) -> tuple[str, bool, str]:
        """Text before `mark`, whether it was found, and what follows; else what surely precedes."""
        before, found, rest = self.held.partition(mark)
        if found:
            self.held = ""
            return before, True, rest
        keep = overlap(self.held, mark)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure, False, ""

    def finish(self, *, ended: bool) -> Delta:
        """What is left; `ended`: the model closed its turn itself."""
        text, self.held = self.held, ""
        if self.state == "reasoning":
            return Delta(reasoning=text)
        if self.state != "calls":
            return Delta(content=self.blank + text)
        calls = (dsml_calls if self.form == "dsml" else hermes_calls)(text, ended)
        if calls is None:
            return Delta(content=text)
        return Delta(tool_calls=calls)


def dsml_calls(text: str, ended: bool) -> tuple[dict[str, Any], ...] | None:
    """The calls of a DSML block; None where it is broken."""
    try:
        parsed = parse_completion(text + (deepseek_v32.EOS if ended else ""), thinking=False)
        calls = [call["function"] for call in parsed.tool_calls]
        return tuple(called(call["name"], call["arguments"]) for call in calls) or None
    except (CompletionError, ValueError, RecursionError):
        return None


def hermes_calls(text: str, ended: bool) -> tuple[dict[str, Any], ...] | None:
    """The calls of Hermes blocks; None where one is broken or text stands between them.

    Of an answer that was cut off (not `ended`) a last call that is not whole is left out.
    """
    calls: list[dict[str, Any]] = []
    at = 0
    while opening := HERMES_OPEN.match(text, at):
        try:
            call, stop = LENIENT.raw_decode(text, opening.end())
            closing = HERMES_CLOSE.match(text, stop)
            if closing is None:
                break
            calls.append(hermes_call(call))
        except (ValueError, RecursionError):
            break
        at = closing.end()
    rest = text[at:]
    cut = not ended and (rest.startswith(HERMES_START) or HERMES_START.startswith(rest))
    return tuple(calls) if calls and (cut or not rest) else None


def hermes_call(call: Any) -> dict[str, Any]:
    """A Hermes block's JSON as a call. ValueError where it is none."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("a call without a name")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = LENIENT.decode(arguments) if arguments.strip() else None
    if not isinstance(arguments, dict | None):
        raise ValueError("arguments that are no object")
    return called(call["name"], arguments or {})


def called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as OpenAI's clients read it: arguments as JSON text.

    ValueError or RecursionError for what JSON cannot say: NaN, numbers too large, a deep nesting.
    """
    said = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    function = {"name": whole(name), "arguments": whole(said)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
