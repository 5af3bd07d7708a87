"""One token for every row as one CUDA graph: no launch waits for the host.

A forward of a large model is some thousand launches, and at one token a row the host is slower at
making them than the device at running them. Captured once, the same launches are one. A graph
wants every address and shape to stay, so while one is in use keys and values stand in
transformers' static cache: `rows` rows of `capacity` places, of which a mask shows each row its
own. Prompts, and rows that come and go, find them in the growing cache as before
(runtime/cache.py): `step` moves them into the static one when the batch has changed, `release`
moves them back.

Rows beyond the batch repeat its first one: they are routed to the same experts, which costs no
weight read. A batch of 3 runs as 4; the graph is made again when the batch outgrows it, has shrunk
to less than a quarter, or the places are used up. vLLM keeps graphs for many sizes at once; their
caches would be memory that keys should have.

Used where --cuda-graphs asks for it (on an H200 a tiny packed model says the same bits replayed as
launched one by one; no large one was tried). Only on one CUDA device, with kernels that never ask
the host (runtime/experts.py) and caches of the kinds below. What cannot be captured runs as it
would without, and the log says so once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.cache_utils import StaticCache, StaticIndexedLayer, StaticLayer

from runtime.cache import length
from runtime.experts import FusedExperts, PackedExperts
from runtime.load import Loaded

log = logging.getLogger("thresher.graph")
ROOM = 256  # places beyond the longest row when a graph is made
LEAST = 512


class DecodeGraph:
    """A model's forward of [rows, 1] tokens over a static cache, captured on a CUDA device."""

    def __init__(self, loaded: Loaded, rows: int, capacity: int) -> None:
        self.model, self.rows, self.capacity = loaded.model, rows, capacity
        self.cache = StaticCache(config=loaded.model.config, max_cache_len=capacity)
        if any(type(layer) not in (StaticLayer, StaticIndexedLayer) for layer in self.cache.layers):
            raise NotImplementedError("its cache has layers of other kinds than full attention")
        device = loaded.device
        self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.first = torch.zeros_like(self.ids)  # the first place that a row sees
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # where the new keys go
        self.places = torch.arange(capacity, device=device)
        shown = torch.zeros((), dtype=loaded.dtype, device=device)
        self.shown, self.hidden = shown, torch.full_like(shown, torch.finfo(loaded.dtype).min)
        self.logits = self._forward()  # makes the tensors of the cache
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and workspaces made outside a capture
            self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._forward()

    def _forward(self) -> torch.Tensor:
        """Logits [rows, V]; the next call is for the next place."""
        seen = (self.places >= self.first) & (self.places <= self.at)
        mask = torch.where(seen, self.shown, self.hidden)[:, None, None, :]
        out = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.positions += 1
        self.at += 1
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def load(self, cache: Any, lengths_B1: torch.Tensor) -> None:
        """Take the keys of a growing cache, whose rows are padded in front."""
        width = length(cache)
        own = torch.arange(self.rows, device=self.ids.device) % lengths_B1.shape[0]
        own[lengths_B1.shape[0] :] = 0
        for static, growing in zip(self.cache.layers, cache.layers, strict=True):
            static.keys[:, :, :width] = growing.keys[own]
            static.values[:, :, :width] = growing.values[own]
            static.cumulative_length.fill_(width)
            if getattr(growing, "indexer_keys", None) is not None:
                static.indexer_keys[:, :width] = growing.indexer_keys[own]
                static.indexer_cumulative_length.fill_(width)
        self.at.fill_(width)
        self.positions.copy_(lengths_B1[own])
        self.first.copy_(width - lengths_B1[own])

    def run(self, newest_B1: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token a row."""
        batch = newest_B1.shape[0]
        self.ids[:batch] = newest_B1
        self.ids[batch:] = newest_B1[:1]
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        return self.logits[:batch]

    def store(self, cache: Any, batch: int, width: int) -> None:
        """Give the keys back to the growing cache."""
        for static, growing in zip(self.cache.layers, cache.layers, strict=True):
            growing.keys = static.keys[:batch, :, :width].clone()
            growing.values = static.values[:batch, :, :width].clone()
            if getattr(growing, "indexer_keys", None) is not None:
                growing.indexer_keys = static.indexer_keys[:batch, :width].clone()


class Graphs:
    """The graph of a batch: made when it pays, made again when the batch outgrows it."""

    def __init__(self, loaded: Loaded, context: int, *, wanted: bool) -> None:
        self.loaded, self.context = loaded, context
        self.graph: DecodeGraph | None = None
        self.batch = self.width = 0  # of the rows that stand in the graph; 0: none do
        self.refused = refusal(loaded) if wanted else "not asked for"
        if self.refused and wanted:
            log.warning("decoding without CUDA graphs: %s", self.refused)

    def step(
        self, cache: Any, newest_B1: torch.Tensor, lengths_B1: torch.Tensor
    ) -> torch.Tensor | None:
        """Logits [B, V] after one more token a row; None where it has to be done without a graph.

        `lengths_B1` are the tokens that each row has in `cache` and in the graph together.
        """
        if self.refused:
            return None
        batch = newest_B1.shape[0]
        if self.batch and self.graph is not None and self.width == self.graph.capacity:
            self.release(cache)
        if not self.batch:
            width = length(cache)
            try:
                graph = self._graph_for(batch, width)
            except Exception as error:  # whatever a model's code does that no graph can hold
                self.refused = f"{type(error).__name__}: {error}"
                self.graph = None
                log.warning("decoding without CUDA graphs: %s", self.refused)
                return None
            graph.load(cache, lengths_B1)
            self.batch, self.width = batch, width
        assert self.graph is not None
        self.width += 1
        return self.graph.run(newest_B1)

    def release(self, cache: Any) -> None:
        """Bring `cache` up to date before rows of it come or go."""
        if self.batch:
            assert self.graph is not None
            self.graph.store(cache, self.batch, self.width)
            self.batch = 0

    def forget(self) -> None:
        """The batch is over: nothing is brought back."""
        self.batch = 0

    def _graph_for(self, batch: int, width: int) -> DecodeGraph:
        graph = self.graph
        if graph is None or not (batch <= graph.rows <= 4 * batch and width + 1 <= graph.capacity):
            self.graph = graph = None  # its memory first
            rows = 1 << (batch - 1).bit_length()
            wanted = max(LEAST, 1 << (width + ROOM - 1).bit_length())
            graph = DecodeGraph(self.loaded, rows, max(width + 1, min(wanted, self.context)))
            self.graph = graph
        return graph


def refusal(loaded: Loaded) -> str | None:
    """Why a model cannot decode by graphs, as far as can be said beforehand."""
    if loaded.device.type != "cuda":
        return f"it runs on {loaded.device.type}"
    if len({str(device) for device in loaded.placement.values()}) > 1:
        return "it is spread over several devices"
    for module in loaded.model.modules():
        if isinstance(module, PackedExperts) and not isinstance(module.kernel, FusedExperts):
            name = module.kernel.name if module.kernel else "no kernel"
            return f"experts of layer {module.layer} run by {name}, which asks the host for counts"
    return None
