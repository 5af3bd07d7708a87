"""DeepSeek sparse attention's indexer where it decides nothing, and where its scores do not fit.

The indexer scores every key for every query, [B, S, heads, T] in float32, and lets the attention
see the `index_topk` best. transformers computes that whatever the length. `Indexer` stands in for
it, over the same weights:

- up to `index_topk` keys all of them are chosen, so they are named without scoring (at 2,048
  tokens the scores are three quarters of DeepSeek-V3.2's attention; nothing changes, to the bit)
- where the scores of all queries would take more than `SCORES_AT_ONCE`, queries go in slices

A slice is what decoding does with transformers' own module: it gets new queries and keys and asks
its cache for the keys so far, so the scoring itself is never written a second time.

Source: transformers' DeepseekV32Indexer and GlmMoeDsaIndexer, which share this interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SCORES_AT_ONCE = 1 << 29  # float32 scores: 2 GiB


class KeysSoFar:
    """The part of transformers' cache that an indexer uses."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """Add keys [B, s, D] and return all, [B, S, D]."""
        self.keys.append(keys)
        return torch.cat(self.keys, dim=1)


class FirstKey:
    """The same part, of a cache that holds one key: every matrix is run, next to nothing scored."""

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """The first of keys [B, S, D]."""
        return keys[:, :1]


class Indexer(nn.Module):
    """Stands in for `original`, whose submodules it shares under the same names.

    While one of them is watched (a calibration that wants the inputs of its matrices) all are run
    also where every key is chosen, and only the first key is scored.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._modules = original._modules  # the very dict: who replaces one, replaces it in both
        # a tuple hides the same parameters a second time
        self._original: tuple[Any] = (original,)
        self.scores_at_once = SCORES_AT_ONCE

    def forward(
        self,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """[B, S, D] and the mask [B, S, T] -> int32 indices of the chosen keys [B, S, topk]."""
        original = self._original[0]
        batch, queries, keys = attention_mask.shape
        if past_key_values is not None:  # decoding keeps its own cache
            return original(
                hidden_states,
                q_resid,
                position_embeddings,
                attention_mask,
                position_ids,
                past_key_values=past_key_values,
            )
        if keys <= original.index_topk:
            if any(child._forward_pre_hooks for child in self.children()):
                original(
                    hidden_states,
                    q_resid,
                    position_embeddings,
                    attention_mask[..., :1],
                    position_ids,
                    past_key_values=FirstKey(),
                )
            every = torch.arange(keys, dtype=torch.int32, device=hidden_states.device)
            return every.expand(batch, queries, keys)
        step = max(1, self.scores_at_once // (batch * original.n_heads * keys))
        cache = KeysSoFar() if step < queries else None
        width = min(original.index_topk, keys)
        found = []
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            seen = keys if cache is None else rows.stop
            cos, sin = position_embeddings
            chosen = original(
                hidden_states[:, rows],
                q_resid[:, rows],
                (cos[:, rows], sin[:, rows]),
                attention_mask[:, rows, :seen],
                position_ids,
                past_key_values=cache,
            )
            if chosen.shape[-1] < width:  # fewer keys so far: naming one twice chooses it once
                again = chosen[..., -1:].expand(*chosen.shape[:-1], width - chosen.shape[-1])
                chosen = torch.cat([chosen, again], dim=-1)
            found.append(chosen)
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)
