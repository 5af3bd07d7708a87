"""Sums over predicted tokens, by sample: everything an evaluation reports is made of them.

One line of `samples.jsonl` is one sample (sums, not means, so that lines can be added):

    {"sample": 3, "domain": "code", "tokens": 511, "nll": .., "reference_nll": .., "kl": ..,
     "agree": 402}

Besides, by the number of tokens a prediction could see (1, 2-3, 4-7, ...), sums over all samples:
losses that grow with the context show there. Sums are float64; KL values are kept (float32) for
their 99th percentile.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch

from evals.intervals import ratio_intervals
from models.processes import Processes

MAX_BUCKETS = 32  # powers of two of context length


class Tally:
    """Sums of nll, reference nll, kl and agreement for every sample and context length."""

    def __init__(self, domain_S: list[int], domains: list[str]) -> None:
        self.domain = np.asarray(domain_S, dtype=np.int64)
        self.domains = domains
        samples = len(domain_S)
        self.count = np.zeros(samples, dtype=np.int64)
        self.nll, self.reference_nll, self.kl, self.agree = np.zeros((4, samples))
        self.by_batch: list[np.ndarray] = []  # by context: count, nll, kl, agree
        self.kl_values: list[np.ndarray] = []

    def begin_batch(self) -> None:
        """What `add` is given from now on is of another batch."""
        self.by_batch.append(np.zeros((4, MAX_BUCKETS)))

    def gather(self, processes: Processes) -> None:
        """Add what the other processes saw: samples that this one has not, in any order; sums by
        context in the order of the batches."""
        names = ("count", "nll", "reference_nll", "kl", "agree")
        by_process = processes.gather([getattr(self, name) for name in names])
        for name, *parts in zip(names, *by_process, strict=True):
            setattr(self, name, np.sum(parts, axis=0))
        self.by_batch = processes.gather_dealt(self.by_batch)
        self.kl_values = [part for parts in processes.gather(self.kl_values) for part in parts]

    @property
    def by_context(self) -> np.ndarray:
        """Sums over all batches by number of tokens seen: [4, MAX_BUCKETS]."""
        return np.sum(self.by_batch, axis=0)

    def add(
        self,
        sample_N: torch.Tensor,
        context_N: torch.Tensor,
        nll_N: torch.Tensor,
        reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Predictions of tokens of `sample_N`, each made from `context_N` tokens (>= 1).

        `reference`: its nll, the kl to it and whether the most likely tokens agree, all [N].
        """
        sample = sample_N.cpu().numpy().astype(np.int64)
        bucket = np.floor(np.log2(context_N.cpu().numpy())).astype(np.int64)
        nll = nll_N.double().cpu().numpy()
        size, by_context = len(self.count), self.by_batch[-1]
        self.count += np.bincount(sample, minlength=size)
        self.nll += np.bincount(sample, weights=nll, minlength=size)
        by_context[0] += np.bincount(bucket, minlength=MAX_BUCKETS)
        by_context[1] += np.bincount(bucket, weights=nll, minlength=MAX_BUCKETS)
        if reference is None:
            return
        reference_nll, kl, agree = (part.double().cpu().numpy() for part in reference)
        self.reference_nll += np.bincount(sample, weights=reference_nll, minlength=size)
        self.kl += np.bincount(sample, weights=kl, minlength=size)
        self.agree += np.bincount(sample, weights=agree, minlength=size)
        by_context[2] += np.bincount(bucket, weights=kl, minlength=MAX_BUCKETS)
        by_context[3] += np.bincount(bucket, weights=agree, minlength=MAX_BUCKETS)
        self.kl_values.append(kl.astype(np.float32))

    def result(self, with_reference: bool) -> dict[str, Any]:
        """The evaluation as CONTRACT's JSON has it, with intervals and context lengths besides."""
        every = np.ones(len(self.count), dtype=bool)
        result = {"tokens": int(self.count.sum()), **self._numbers(every, with_reference)}
        result["by_domain"] = {
            name: {"tokens": int(self.count[mine].sum()), **self._numbers(mine, with_reference)}
            for index, name in enumerate(self.domains)
            if self.count[mine := self.domain == index].sum()
        }
        values = np.concatenate(self.kl_values) if self.kl_values else None
        result["kl_p99"] = None if values is None else float(np.percentile(values, 99))
        result["by_position"] = self._positions(with_reference)
        return result

    def samples(self, with_reference: bool) -> bytes:
        """The lines of samples.jsonl; samples in which nothing was predicted are left out."""
        lines = []
        for i in np.flatnonzero(self.count):
            row: dict[str, Any] = {
                "sample": int(i),
                "domain": self.domains[self.domain[i]],
                "tokens": int(self.count[i]),
                "nll": float(self.nll[i]),
            }
            if with_reference:
                row["reference_nll"] = float(self.reference_nll[i])
                row["kl"] = float(self.kl[i])
                row["agree"] = int(self.agree[i])
            lines.append(json.dumps(row) + "\n")
        return "".join(lines).encode()

    def _positions(self, with_reference: bool) -> list[dict[str, Any]]:
        count, nll, kl, agree = self.by_context
        return [
            {
                "context": [2**i, 2 ** (i + 1) - 1],
                "tokens": int(count[i]),
                "nll": float(nll[i] / count[i]),
                "kl": float(kl[i] / count[i]) if with_reference else None,
                "top1_agreement": float(agree[i] / count[i]) if with_reference else None,
            }
            for i in np.flatnonzero(count).tolist()
        ]

    def _numbers(self, rows: np.ndarray, with_reference: bool) -> dict[str, Any]:
        tokens = int(self.count[rows].sum())
        nll = float(self.nll[rows].sum()) / tokens
        columns = {"perplexity": self.nll[rows]}
        numbers: dict[str, Any] = {"nll": nll, "perplexity": perplexity(nll)}
        if with_reference:
            reference_nll = float(self.reference_nll[rows].sum()) / tokens
            numbers |= {
                "reference": {"nll": reference_nll, "perplexity": perplexity(reference_nll)},
                "kl": float(self.kl[rows].sum()) / tokens,
                "top1_agreement": float(self.agree[rows].sum()) / tokens,
            }
            columns |= {"kl": self.kl[rows], "top1_agreement": self.agree[rows]}
        else:
            numbers |= {"reference": None, "kl": None, "top1_agreement": None}
        found = ratio_intervals(
            columns, self.count[rows], self.domain[rows], {"perplexity": perplexities}
        )
        numbers["intervals"] = found and {name: list(pair) for name, pair in found.items()}
        return numbers


def perplexity(nll: float) -> float:
    """exp(nll), infinite where that overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def perplexities(nll: np.ndarray) -> np.ndarray:
    """exp of each, infinite where that overflows."""
    with np.errstate(over="ignore"):
        return np.exp(nll)
