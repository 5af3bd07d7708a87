"""Which routed pairs a block of a product works on, found without asking the host.

The grid is as large as it could at most be, so that a layer can be captured in a CUDA graph; blocks
that no expert needs return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from runtime.kernels import routed
from runtime.kernels.tiles import Tile


@dataclass(frozen=True, slots=True)
class Plan:
    """`kind` as in products.packed_rows, tensors as in routed.py."""

    kind: int
    slots: torch.Tensor
    expert: torch.Tensor
    padded: torch.Tensor
    blocks: int
    tile: Tile

    @property
    def tokens(self) -> int:
        """BT."""
        return self.tile.tokens


def by_expert(ids_TK: torch.Tensor, num_experts: int, tile: Tile) -> Plan:
    """Pairs by expert, in blocks of the tile's tokens: one launch."""
    pairs, tokens = ids_TK.numel(), tile.tokens
    most = min(pairs, num_experts + pairs // tokens)
    slots, expert, padded = (
        torch.empty(size, dtype=torch.int32, device=ids_TK.device)
        for size in (most * tokens, most, 1)
    )
    chunk = min(1024, max(16, triton.next_power_of_2(pairs)))
    routed.place_pairs[(num_experts,)](
        ids_TK.contiguous(),
        slots,
        expert,
        padded,
        pairs,
        most,
        num_experts,
        BT=tokens,
        FILL=triton.next_power_of_2(tokens),
        CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(-(-pairs // chunk)),
        WIDTH=max(16, triton.next_power_of_2(num_experts + 1)),
    )
    return Plan(2, slots, expert, padded, most, tile)
