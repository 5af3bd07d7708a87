"""`thresher generate` and `thresher chat`: text from a checkpoint, as it is written."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from cli.options import json_option, quiet_option, stdout_kept
from cli.progress import shown
from cli.sampling import chosen_sampling, load, run_options, said_sampling, sampling_options
from models.errors import InputError

if TYPE_CHECKING:
    from runtime.conversation import AnswerStream
    from runtime.engine import Engine
    from runtime.sampling import Sampling
    from runtime.text import TextStream


@click.command()
@click.argument("ckpt", metavar="CKPT")
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads stdin.")
@click.option("--chat", "as_chat", is_flag=True, help="PROMPT is a user's message, not raw text.")
@sampling_options
@run_options
@json_option
@quiet_option
def generate(
    ckpt: str,
    prompt: str,
    as_chat: bool,
    device: str,
    dtype: str,
    backend: str,
    gpu_memory: int | None,
    cuda_graphs: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with CKPT, its weights as packed as they are on disk."""
    if prompt == "-":
        prompt = sys.stdin.read()
    with stdout_kept(), shown(quiet) as progress:
        from calibration.chat import load_tokenizer
        from runtime.conversation import Conversations
        from runtime.engine import Engine
        from runtime.text import prompt_ids

        wanted = said_sampling(sampling)
        tokenizer = load_tokenizer(ckpt)
        if as_chat:
            asked = Conversations(tokenizer).prompt([{"role": "user", "content": prompt}])
            ids = asked.ids
        else:
            ids = prompt_ids(tokenizer, prompt)
        if not ids:
            raise InputError("--prompt is empty; give some text")
        loaded = load(ckpt, device, dtype, backend, gpu_memory, progress)
        chosen = chosen_sampling(loaded, wanted)
        engine = Engine(loaded, max_batch=1, cuda_graphs=cuda_graphs, eos=tokenizer.eos_token_id)
    text, tokens = write(engine, tokenizer, ids, chosen, show=not as_json, raw=not as_chat)
    if as_json:
        click.echo(json.dumps({"text": text, "token_ids": tokens}))
    else:
        click.echo()


@click.command()
@click.argument("ckpt", metavar="CKPT")
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@click.option("--thinking", is_flag=True, help="Ask the template for a reasoning answer.")
@sampling_options
@run_options
@quiet_option
def chat(
    ckpt: str,
    system: str | None,
    thinking: bool,
    device: str,
    dtype: str,
    backend: str,
    gpu_memory: int | None,
    cuda_graphs: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Talk to CKPT on the terminal; an empty line or the end of input leaves."""
    with stdout_kept(), shown(quiet) as progress:
        from calibration.chat import load_tokenizer
        from runtime.conversation import Conversations
        from runtime.engine import Engine

        wanted = said_sampling(sampling)
        tokenizer = load_tokenizer(ckpt)
        conversations = Conversations(tokenizer)
        loaded = load(ckpt, device, dtype, backend, gpu_memory, progress)
        chosen = chosen_sampling(loaded, wanted)
        engine = Engine(loaded, max_batch=1, cuda_graphs=cuda_graphs, eos=tokenizer.eos_token_id)
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": system})
    options = {"thinking": True, "enable_thinking": True} if thinking else {}
    while words := read_line():
        messages.append({"role": "user", "content": words})
        asked = conversations.prompt(messages, (), options)
        reader = conversations.answer(asked.thinking, tools=False)
        said, _ = write(engine, tokenizer, asked.ids, chosen, show=True, reader=reader)
        click.echo()
        messages.append({"role": "assistant", "content": said})


def read_line() -> str:
    """A line the user typed; empty at the end of input."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()


def write(
    engine: Engine,
    tokenizer: Any,
    ids: list[int],
    sampling: Sampling,
    *,
    show: bool,
    raw: bool = False,
    reader: AnswerStream | None = None,
) -> tuple[str, list[int]]:
    """Run one prompt; its text (with `reader`: the content alone) and token ids.

    `show` prints text on stdout as it comes; `raw`: it continues the prompt's own text.
    """
    from runtime.text import TextStream, pieces

    stream: TextStream = TextStream(
        tokenizer, sampling.stop, special=reader is not None, after=ids if raw else ()
    )
    request = engine.submit(ids, sampling, lambda token: None)
    parts: list[str] = []
    for text in pieces(engine, request, stream):
        if reader is not None:
            delta = reader.push(text)
            if show and delta.reasoning:
                click.echo(delta.reasoning, nl=False, err=True)
            text = delta.content
        parts.append(text)
        if show and text:
            click.echo(text, nl=False)
    if request.error:
        raise InputError(f"the model failed to answer: {request.error}")
    if reader is not None:
        left = reader.finish(ended=True)
        parts.append(left.content)
        if show:
            click.echo(left.content, nl=False)
    return "".join(parts), request.tokens[: stream.count]
