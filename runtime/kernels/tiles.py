"""How large the blocks of a product are, by format and by how many tokens an expert has.

Measured on an H200 (docs/benchmarks.md, docs/log.md), in two ways to multiply:

    one warp     blocks of 8 tokens and more, weights times 16 x 8 x 16. The next words are asked
                 for into registers
    four warps   blocks of 16 tokens and more by a warpgroup's instruction: weights from registers,
                 inputs from shared memory in the order `turned` makes, words copied ahead. Only
                 where that instruction is, compute capability 9, and only where blocks are full
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from runtime.kernels.decoding import FP8, INT3, INT4, NVFP4


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one product."""

    tokens: int
    rows: int
    warps: int = 1
    stages: int = 1  # of words copied ahead, by four warps
    columns: int = 0  # a step's; 0: the longest that the format and the matrix allow
    fence: bool = False  # keeps the compiler from moving the loads of the next words
    registers: int | None = None  # at most

    @property
    def is_wide(self) -> bool:
        """Whether a warpgroup multiplies."""
        return self.warps > 1

    @property
    def fixed(self) -> dict[str, int | bool]:
        """What the kernel is compiled for besides the format."""
        options: dict[str, int | bool] = {
            "BT": self.tokens, "BN": self.rows, "WARPS": self.warps, "FENCE": self.fence,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip
        if self.registers:
            options["maxnreg"] = self.registers
        return options


# one token an expert to eight: as many warps as registers allow, 16 on each quarter of an SM
FEW = Tile(8, 16, fence=True, registers=128)
# of experts and more than one token there are more programs than an H200 runs at once, and with W4
# 18 warps in shorter steps then do more than 16 in longer ones; of one token the longer steps do
FEW_IN_WAVES = {INT4.value: Tile(8, 16, columns=256, fence=True, registers=112)}
SOME = Tile(16, 32)
MANY = Tile(32, 32)
# where there are warpgroups, instead of MANY
WIDE: dict[int, Tile] = {
    INT3.value: Tile(32, 128, warps=4, stages=2),
    INT4.value: Tile(32, 128, warps=4, stages=3, columns=128),
    NVFP4.value: Tile(32, 128, warps=4, stages=3, columns=128),
    FP8.value: Tile(64, 128, warps=4, stages=3, columns=128),
}


def tiles(code: int, device: torch.device) -> tuple[Tile, ...]:
    """The blocks that a format may be multiplied in on a device, those for few tokens first."""
    return FEW, SOME, WIDE[code] if is_hopper(device) else MANY


def tile_for(code: int, device: torch.device, average: int, *, waves: bool = False) -> Tile:
    """The first that holds the average number of tokens an expert has, or the last; `waves` where
    there are more programs than run at once."""
    usable = tiles(code, device)
    tile = next((tile for tile in usable if average <= tile.tokens), usable[-1])
    return FEW_IN_WAVES.get(code, FEW) if waves and tile is FEW else tile


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device has warpgroups and overlapping launches as they were measured."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def ahead(device: torch.device) -> dict[str, bool]:
    """What makes a launch overlap with the one before it (runtime/kernels/routed.py)."""
    return {"AHEAD": True, "launch_pdl": True} if is_hopper(device) else {}
