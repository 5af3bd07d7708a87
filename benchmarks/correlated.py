"""Random weights, and Hessians of inputs that are correlated as a model's are."""

from __future__ import annotations

import math

import torch


def correlated(
    batch: int, rows: int, columns: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, N, K] and Hessians per token [B, K, K] of inputs mixed from K / 4 sources,
    with noise, spread channel sizes and a few channels ten times as large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sources = columns // 4
    weights, hessians = [], []
    for _ in range(batch):
        mixing = normal(sources, columns) * torch.rand(sources, 1, generator=generator).square()
        inputs = normal(tokens, sources) @ mixing / math.sqrt(sources)
        inputs = (inputs + 0.2 * normal(tokens, columns)) * torch.exp(0.5 * normal(columns))
        inputs[:, torch.randperm(columns, generator=generator)[: columns // 80 + 1]] *= 10
        weights.append(0.02 * normal(rows, columns) * torch.exp(0.3 * normal(rows, 1)))
        hessians.append(inputs.T @ inputs / tokens)
    return torch.stack(weights), torch.stack(hessians)
