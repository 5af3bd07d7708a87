"""Continuous batching: requests join the running batch and leave it between any two tokens.

    step():  one chunk of the prompt at the head of the queue is read into a cache of its own;
             a prompt that is complete joins the batch; every row of the batch gets one token.

The forward, its masks and its cache are transformers'. Its own ContinuousBatchingManager is not
used: it refuses DeepSeek-V3.2 ("Invalid group type: deepseek_sparse_attention", 5.17, run on the
demo model), and it has no seed, minimum probability or repetition penalty for single requests.

The engine knows nothing of threads or text. Whoever owns it calls `step` until `idle`; `submit`
and `cancel` may come from other threads.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from models.errors import InputError
from runtime.cache import can_join, length, new_cache, rows_join, rows_keep
from runtime.graph import Graphs
from runtime.load import Loaded
from runtime.sampling import Sampler, Sampling

Reason = Literal["stop", "length", "cancelled", "error"]
PREFILL_TOKENS = 2048  # of a prompt, between two tokens of the others
MAX_BATCH = 16
QUEUE = 256


class QueueFullError(Exception):
    """As many requests wait as may."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt and what becomes of it. `on_token` gets ids and, last, None once."""

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[int | None], None]
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    cancelled: bool = False
    begun: bool = False  # its prompt is being read, or was
    sampler: Sampler | None = None
    cache: Any = None  # while the prompt is being read
    read: int = 0

    @property
    def length(self) -> int:
        """Tokens in the cache once all ids but the newest have run."""
        return len(self.prompt) + len(self.tokens) - 1


class Engine:
    """One model, one batch."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_batch: int = MAX_BATCH,
        queue: int = QUEUE,
        cuda_graphs: bool = False,
        eos: int | None = None,
    ) -> None:
        """`eos`: the tokenizer's, which ends answers beside the checkpoint's own."""
        self.loaded, self.model = loaded, loaded.model
        self.max_batch = max_batch if can_join(new_cache(self.model)) else 1
        self.queue_size = queue
        self.context = int(loaded.spec.text.get("max_position_embeddings") or 1 << 20)
        own = loaded.generation.eos_token_id
        own = [own] if isinstance(own, int) else own or []
        self.eos = frozenset(own if eos is None else [*own, eos])
        self.waiting: deque[Request] = deque()
        self.batch: list[Request] = []
        self.cache: Any = None
        self.graphs = Graphs(loaded, self.context, wanted=cuda_graphs)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    # -- called from anywhere ------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        on_token: Callable[[int | None], None],
    ) -> Request:
        """Queue a prompt. InputError when it cannot fit, QueueFullError when too many wait."""
        vocabulary = self.loaded.spec.text.get("vocab_size")
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if any(not 0 <= token < (vocabulary or 1 << 62) for token in prompt):
            raise InputError(f"the prompt has token ids outside the vocabulary of {vocabulary}")
        if len(prompt) >= self.context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self.context}; "
                "shorten the prompt"
            )
        with self._lock:
            if len(self.waiting) >= self.queue_size:
                raise QueueFullError(f"{len(self.waiting)} requests wait; try again later")
            request = Request(
                prompt=prompt, sampling=sampling, on_token=on_token, number=next(self._numbers)
            )
            request.sampler = Sampler(sampling)
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Give a request up; its place is free before the next token."""
        request.cancelled = True

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and not self.batch

    # -- called by the owner -------------------------------------------------------------------

    def step(self) -> None:
        """Advance every request by at most one token."""
        with torch.inference_mode():
            self._drop_cancelled()
            self._drop_ended()
            self._read_prompt()
            if self.batch:
                self._decode()

    def fail_all(self, error: str) -> None:
        """End every request with an error: what the owner does when `step` raised."""
        with self._lock:
            pending = [*self.batch, *self.waiting]
            self.waiting.clear()
        self.batch, self.cache = [], None
        self.graphs.forget()
        for request in pending:
            request.error = error
            self._end(request, "error")

    def _read_prompt(self) -> None:
        """One chunk of the oldest waiting prompt; complete, it joins the batch.

        It waits until it has joined: should anything raise before, `fail_all` ends it.
        """
        if len(self.batch) >= self.max_batch:
            return
        with self._lock:
            if not self.waiting:
                return
            request = self.waiting[0]
        request.begun = True
        if request.cache is None:
            request.cache = new_cache(self.model)
        stop = min(request.read + PREFILL_TOKENS, len(request.prompt))
        ids = torch.tensor([request.prompt[request.read : stop]], device=self.loaded.device)
        positions = torch.arange(request.read, stop, device=self.loaded.device).unsqueeze(0)
        logits = self._forward(ids, positions, None, request.cache)
        request.read = stop
        if stop < len(request.prompt):
            return
        cache, request.cache = request.cache, None
        self._take(request, logits[0])
        if request.reason is None and self.batch:
            self.graphs.release(self.cache)
            rows_join(self.cache, cache)
        elif request.reason is None:
            self.cache = cache
        with self._lock:
            self.waiting.popleft()
        if request.reason is None:
            self.batch.append(request)

    def _decode(self) -> None:
        """One token for every row."""
        device = self.loaded.device
        newest = torch.tensor([[r.tokens[-1]] for r in self.batch], device=device)
        lengths = torch.tensor([[r.length] for r in self.batch], device=device)
        logits = self.graphs.step(self.cache, newest, lengths)
        if logits is None:
            width = length(self.cache) + 1
            mask = None
            if len(self.batch) > 1:
                place = torch.arange(width, device=device)
                mask = (place >= width - 1 - lengths).long()
            logits = self._forward(newest, lengths, mask, self.cache)
        largest = logits.argmax(-1).tolist()
        for request, token, row in zip(self.batch, largest, logits, strict=True):
            assert request.sampler is not None
            self._take(request, row, token if request.sampler.is_argmax else None)
        self._drop_ended()

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """Logits [B, V] after the last of `ids` [B, S]."""
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _take(self, request: Request, logits_V: torch.Tensor, token: int | None = None) -> None:
        """Choose the request's next token and say so; end it where it ends."""
        if request.cancelled:
            self._end(request, "cancelled")
            return
        assert request.sampler is not None
        if token is None:
            try:
                token = request.sampler.choose(logits_V, request.tokens[-1:] or request.prompt)
            except Exception as error:  # this request fails, the others go on
                request.error = f"{type(error).__name__}: {error}"
                self._end(request, "error")
                return
        if token in self.eos:
            self._end(request, "stop")
            return
        request.tokens.append(token)
        request.on_token(token)
        room = self.context - len(request.prompt)
        if len(request.tokens) >= min(request.sampling.max_tokens, room):
            self._end(request, "length")

    def _end(self, request: Request, reason: Reason) -> None:
        request.reason, request.cache = reason, None
        request.on_token(None)

    def _drop_cancelled(self) -> None:
        """Take requests that were given up out of the queue, wherever they stand."""
        kept: deque[Request] = deque()
        gone: list[Request] = []
        with self._lock:
            for request in self.waiting:
                (gone if request.cancelled else kept).append(request)
            self.waiting = kept
        for request in gone:
            self._end(request, "cancelled")

    def _drop_ended(self) -> None:
        """Take ended and cancelled rows out of the batch."""
        for request in self.batch:
            if request.cancelled and request.reason is None:
                self._end(request, "cancelled")
        rows = [row for row, request in enumerate(self.batch) if request.reason is None]
        if len(rows) == len(self.batch):
            return
        self.batch = [self.batch[row] for row in rows]
        if not self.batch:
            self.cache = None
            self.graphs.forget()
            return
        self.graphs.release(self.cache)
        needed = max(request.length for request in self.batch)
        rows_keep(self.cache, rows, length(self.cache) - needed)
