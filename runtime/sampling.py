"""Which token comes next: the options people expect, by transformers' own processors.

    logits → repetition penalty → / temperature → top-k → min-p → top-p → softmax → draw
    temperature 0 (below 1e-5): the largest, drawn from nothing

Draws are made on the CPU by a generator of the request's own: the same logits and seed give the
same text on every device and whatever else is served beside it. In float32 they do give it; in
bfloat16 the logits themselves hang on the device and the rows of the batch, and a draw may then
fall on the other side of an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.errors import InputError

GREEDY = 1e-5  # temperatures below are 0: logits divided by them would leave float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request is sampled. InputError for values out of range, by their option's name."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, wrong, range_ in (
            ("max_tokens", self.max_tokens < 1, "at least 1"),
            ("temperature", not 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_p", not 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k < -1, "at least 1, or 0 or -1 for all tokens"),
            ("min_p", not 0 <= self.min_p < 1, "0 to below 1"),
            ("repetition_penalty", not 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("stop", any(not text for text in self.stop), "text that is not empty"),
            ("seed", self.seed is not None and not 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
        ):
            if wrong:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {range_}")


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature < GREEDY
        self.penalised = sampling.repetition_penalty != 1
        self.seen_V: torch.Tensor | None = None  # ids of prompt and answer, for the penalty
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.processors = LogitsProcessorList()
        if self.penalised:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self.greedy:
            return
        if sampling.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self.processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.min_p > 0:
            self.processors.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_p < 1:
            self.processors.append(TopPLogitsWarper(sampling.top_p))

    @property
    def is_argmax(self) -> bool:
        """True when the largest logit is taken as it is."""
        return self.greedy and not self.processors

    def choose(self, logits_V: torch.Tensor, new: list[int]) -> int:
        """The next token. `new` are the ids since the last call: the prompt, then one at a time."""
        scores = self.scores(logits_V, new)
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

    def scores(self, logits_V: torch.Tensor, new: list[int]) -> torch.Tensor:
        """Logits [1, V] as all processors leave them."""
        scores = logits_V.float().cpu().unsqueeze(0)
        if self.penalised:
            if self.seen_V is None:
                self.seen_V = torch.zeros(len(logits_V), dtype=torch.bool)
            self.seen_V[new] = True
            # how often an id was seen makes no difference to the processor
            ids = self.seen_V.nonzero().T
        else:
            ids = torch.empty(1, 0, dtype=torch.long)
        return self.processors(ids, scores) if self.processors else scores
