"""One sample, and its way from messages to token ids through the tokenizer's own chat template.

A `Sample` is either a conversation in OpenAI's form (roles, content as str, tool calls with their
arguments as a JSON object) or plain text. Conversations are rendered by the template that the
tokenizer carries, never by a look-alike of ours. Rendering is tried in these forms, and which one
served is returned so that it can be counted:

  template   the template takes messages and tools as they are (arguments as objects, which is
             transformers' convention; as JSON strings for templates that concatenate them; the
             last turn's reasoning inside the content, for templates that know no other place; a
             developer's messages as a system's). Words that a template drops beside calls by its
             own rule (Llama-3.1, older Mistral) stay dropped: the form of its calls counts more.
  folded     the template refuses or silently leaves out a role, the tools or the calls: system text
             and tools are written into the first user message, calls into the assistant's content,
             tool results into a user message; consecutive messages of a role are joined.
  deepseek_v32  the tokenizer has no template and DeepSeek-V3.2's tokens: deepseek_v32.py.
  plain      the tokenizer has no template of any kind. Blocks are joined by a blank line:
             `{system}`, `Tools:` and one JSON object a line, `User: ...`, `Assistant: ...` with one
             `Call: {"name": ..., "arguments": ...}` line a call, `Tool: ...`.

BOS stands exactly once, first, if the tokenizer starts sequences with it or the template writes it:
the rendered text is tokenized without special tokens (a template that writes BOS must not get a
second one) and a missing one is put in front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calibration import deepseek_v32
from calibration.messages import (
    Message,
    Sample,
    SampleError,
    Tool,
    compact,
    normalised_call,
    normalised_message,
    normalised_tool,
    tool_call,
    user_and_assistant,
)
from models.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Message",
    "Rendering",
    "Sample",
    "SampleError",
    "Tool",
    "compact",
    "encode",
    "load_tokenizer",
    "normalised_call",
    "normalised_message",
    "normalised_tool",
    "plain",
    "render",
    "tokenizer_sha256",
    "tool_call",
    "user_and_assistant",
]

Rendering = Literal["template", "deepseek_v32", "folded", "plain", "text"]

# What a template's own code raises on messages it was not written for, besides raise_exception: str
# plus dict, `content.index(..)`, a key that is not there, arguments nested too deep.
TEMPLATE_BUGS = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip

TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tiktoken.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


# ---- messages -> text ----------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[str, Rendering]:
    """The text of a sample as the model will read it, and the form that served (see above)."""
    if sample.text is not None:
        return sample.text, "text"
    if not tokenizer.chat_template:
        if deepseek_v32.speaks(tokenizer.get_vocab()):
            return deepseek_v32.encode_sample(sample), "deepseek_v32"
        return plain(sample), "plain"
    tries = [sample, reasoning_inside(sample)] if last_reasoning(sample) else [sample]
    for one in (*tries, *(developer_as_system(one) for one in tries if has_developer(one))):
        for arguments_as_text in (False, True):
            text = templated(tokenizer, one.messages, one.tools, arguments_as_text)
            if text is not None and says_everything(text, sample):
                return text, "template"
    sample = tries[-1]
    text = templated(tokenizer, folded(sample), (), False)
    if text is None:
        raise SampleError("the tokenizer's chat template refuses the conversation")
    return text, "folded"


def templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    arguments_as_text: bool,
) -> str | None:
    """The template's own rendering, or None where the template refuses these messages."""
    from jinja2 import TemplateError

    if arguments_as_text:
        messages = [with_text_arguments(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=False
        )
    except (TemplateError, *TEMPLATE_BUGS):
        return None
    assert isinstance(text, str)
    return text


def with_text_arguments(message: Message) -> Message:
    """The message with every call's arguments as a JSON string."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": compact(call["function"]["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def says_everything(text: str, sample: Sample) -> bool:
    """Whether no tool, no call, no words of anyone but the assistant and no reasoning of the last
    turn were left out by the template."""
    if not all(reasoning.strip() in text for reasoning in last_reasoning(sample)):
        return False
    called = [call for message in sample.messages for call in message.get("tool_calls", ())]
    names = [item["function"]["name"] for item in (*sample.tools, *called)]
    others = [m["content"] for m in sample.messages if m["role"] != "assistant"]
    return all(says(text, words.strip()) for words in (*names, *others))


def says(text: str, words: str) -> bool:
    """Whether the words stand in the text, as they are or inside a JSON string: some templates
    write tools' results as JSON."""
    return words in text or compact(words)[1:-1] in text


def has_developer(sample: Sample) -> bool:
    """Whether a developer speaks."""
    return any(message["role"] == "developer" for message in sample.messages)


def developer_as_system(sample: Sample) -> Sample:
    """The sample for templates that know a system only."""
    named = {"developer": "system"}
    messages = ({**m, "role": named.get(m["role"], m["role"])} for m in sample.messages)
    return replace(sample, messages=tuple(messages))


def last_reasoning(sample: Sample) -> list[str]:
    """Reasoning after the last user's message; that of earlier turns is for templates to drop."""
    last = deepseek_v32.last_user(sample.messages)
    return [m["reasoning_content"] for m in sample.messages[last + 1 :] if "reasoning_content" in m]


def reasoning_inside(sample: Sample) -> Sample:
    """The sample with the last turn's reasoning in its content, as <think>..</think>."""
    last = deepseek_v32.last_user(sample.messages)
    messages = list(sample.messages)
    for place, message in enumerate(messages):
        if place > last and "reasoning_content" in message:
            inside = f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"
            messages[place] = {**message, "content": inside}
            del messages[place]["reasoning_content"]
    return replace(sample, messages=tuple(messages))


def folded(sample: Sample) -> list[Message]:
    """The conversation in user and assistant messages alone, alternating, nothing left out."""
    turns: list[tuple[str, list[str]]] = []
    opening: list[str] = []
    for message in sample.messages:
        role, text = message["role"], spoken_text(message)
        if role in ("system", "developer"):
            opening.append(text)
            continue
        if role == "tool":
            role, text = "user", f"Tool: {text}"
        if not turns and role == "assistant":
            turns.append(("user", []))
        if turns and turns[-1][0] == role:
            turns[-1][1].append(text)
        else:
            turns.append((role, [text]))
    if not turns:
        turns.append(("user", []))
    turns[0][1][:0] = [*opening, *([tools_text(sample.tools)] if sample.tools else [])]
    return [{"role": role, "content": "\n\n".join(texts)} for role, texts in turns]


def plain(sample: Sample) -> str:
    """The documented rendering for tokenizers without a chat template."""
    if sample.text is not None:
        return sample.text
    sample = reasoning_inside(sample)
    blocks: list[str] = []
    for message in sample.messages:
        text = spoken_text(message)
        system = message["role"] in ("system", "developer")
        blocks.append(text if system else f"{message['role'].capitalize()}: {text}")
    if sample.tools:
        first = sample.messages[0]["role"] in ("system", "developer")
        blocks.insert(int(first), tools_text(sample.tools))
    return "\n\n".join(block for block in blocks if block) + "\n"


def spoken_text(message: Message) -> str:
    """Content and calls of a message as text, one `Call:` line a call."""
    lines = [message["content"]] if message["content"] else []
    lines += [f"Call: {compact(call['function'])}" for call in message.get("tool_calls", ())]
    return "\n".join(lines)


def tools_text(tools: Sequence[Tool]) -> str:
    """Tool definitions as text, one JSON object a line."""
    return "\n".join(["Tools:", *(compact(tool["function"]) for tool in tools)])


# ---- text -> ids ---------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[int], Rendering]:
    """Token ids of a sample with BOS at most once and only in front, and the form that served.

    Plain text is never read as control tokens: `<s>` in a document stays four characters or so.
    """
    text, rendering = render(tokenizer, sample)
    split = {"split_special_tokens": True} if rendering == "text" else {}
    check_whole(text)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False, **split)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids, rendering
    content = 0
    while content < len(ids) and ids[content] == bos:
        content += 1
    if content or starts_with_bos(tokenizer):
        ids = [bos, *ids[content:]]
    return ids, rendering


def check_whole(text: str) -> None:
    """SampleError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SampleError("half of a surrogate pair in its text") from None


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts BOS before a text of its own accord."""
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id; code that a model ships is never run.

    Raises InputError when there is none, or when it exists only as remote code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(model)
    local = path.is_dir()
    if local and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{path} has no tokenizer files (tokenizer.json, tokenizer_config.json); "
            "copy them from the original model"
        )
    if not local and path.exists():
        raise InputError(f"{path} is a file; give the model's directory or hub id")
    if not local and str(model).count("/") != 1:
        raise InputError(f"there is no directory {model}; give the model's directory or hub id")
    try:
        return AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=False, local_files_only=local
        )
    except (OSError, ValueError, KeyError, ImportError) as problem:
        if local and (path / "tokenizer.json").is_file():
            # A config.json unknown to this transformers does not spoil a plain tokenizer.json.
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        reason = " ".join(str(problem).split()).partition(". ")[0]
        raise InputError(
            f"no usable tokenizer in {model} ({reason}); it must load without remote code, so give "
            "a directory with a tokenizer.json"
        ) from problem


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: over its files when it came from a directory, else its own state."""
    digest = hashlib.sha256()
    root = Path(tokenizer.name_or_path)
    files = [root / name for name in TOKENIZER_FILES if (root / name).is_file()]
    for path in files if tokenizer.name_or_path else ():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    if not files or not tokenizer.name_or_path:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        digest.update(f"{vocabulary}\n{tokenizer.chat_template}\n{tokenizer.bos_token}".encode())
    return digest.hexdigest()
