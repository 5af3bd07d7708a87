"""The packed runtime as the model that tasks ask: `eval --tasks` without a server.

Threads of a task share one engine: each submits its prompt, and whoever holds the lock advances
the whole batch by a token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from calibration.chat import load_tokenizer
from evals.endpoint import Completion, Sampling, read_calls
from models.errors import InputError
from models.progress import Progress, silent
from runtime.conversation import Conversations
from runtime.engine import Engine, Request
from runtime.load import LoadSettings, load_model
from runtime.sampling import Sampling as EngineSampling
from runtime.text import TextStream, pieces, prompt_ids


class LocalModel:
    """A checkpoint loaded as it is stored; satisfies evals.endpoint.Completer."""

    def __init__(
        self, ckpt: str, settings: LoadSettings | None = None, progress: Progress = silent
    ) -> None:
        """InputError when the checkpoint cannot be loaded or has no tokenizer."""
        self.name = Path(ckpt).name
        self.tokenizer = load_tokenizer(ckpt)
        self.conversations = Conversations(self.tokenizer)
        self.loaded = load_model(ckpt, settings, progress=progress)
        self.engine = Engine(self.loaded, eos=self.tokenizer.eos_token_id)
        self.lock = threading.Lock()

    def complete(self, prompt: str, sampling: Sampling) -> Completion:
        """Go on from a prompt."""
        ids = prompt_ids(self.tokenizer, prompt)
        text, request = self._answer(ids, sampling, raw=True)
        return Completion(text, reason(request), len(request.tokens))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: Sampling,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Completion:
        """Answer a conversation; reasoning is left out of the text."""
        asked = self.conversations.prompt(messages, tools)
        text, request = self._answer(asked.ids, sampling, raw=False)
        reader = self.conversations.answer(asked.thinking, tools=bool(tools))
        first = reader.push(text)
        last = reader.finish(ended=request.reason == "stop")
        calls = read_calls([*first.tool_calls, *last.tool_calls])
        return Completion(
            first.content + last.content, reason(request), len(request.tokens), tuple(calls)
        )

    def log_probabilities(self, ids: Sequence[int]) -> list[float]:
        """log p of every id but the first, nats."""
        tensor = torch.tensor([list(ids)], device=self.loaded.device)
        with self.lock, torch.inference_mode():
            logits = self.loaded.model(input_ids=tensor, use_cache=False).logits[0, :-1]
            each = logits.float().log_softmax(-1).gather(1, tensor[0, 1:, None].to(logits.device))
        found: list[float] = each[:, 0].tolist()
        return found

    def _answer(self, ids: list[int], sampling: Sampling, *, raw: bool) -> tuple[str, Request]:
        chosen = EngineSampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        after = ids if raw else ()
        stream = TextStream(self.tokenizer, sampling.stop, special=not raw, after=after)
        request = self.engine.submit(ids, chosen, lambda token: None)
        text = "".join(pieces(self.engine, request, stream, self.lock))
        if request.error:
            raise InputError(f"{self.name} failed to answer: {request.error}")
        return text, request


def reason(request: Request) -> str:
    """OpenAI's finish_reason; a request that its stop string ended has stopped."""
    return "length" if request.reason == "length" else "stop"
