"""How large the blocks of a product are, by format and by how many tokens are worked on together.

Measured on an H200 (docs/benchmarks.md). Two ways to multiply:

    one to four warps   blocks of 8 tokens and more, weights times 16 x 8 x 16
    wide                blocks of 16 tokens and more by a warpgroup (four warps), weights from
                        registers, inputs from shared memory in the order `turned` makes
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.kernels.decoding import FP8, INT3, INT4, NVFP4


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one product."""

    tokens: int
    rows: int
    warps: int = 1
    stages: int = 1  # 1: the next words are asked for into registers; more: copied ahead
    columns: int = 0  # a step's; 0: the longest that the format and the matrix allow
    wide: bool = False
    fence: bool = False  # keeps the compiler from moving the loads of the next words
    registers: int | None = None

    @property
    def fixed(self) -> dict[str, int | bool]:
        """What the kernel is compiled for besides the format."""
        options: dict[str, int | bool] = {
            "BT": self.tokens, "BN": self.rows, "WARPS": self.warps, "STAGES": self.stages,
            "FENCE": self.fence, "NATURAL": self.wide, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip
        if self.registers:
            options["maxnreg"] = self.registers
        return options


SMALL = (Tile(8, 32), Tile(16, 32), Tile(32, 32))
# by format; the first that holds the average number of tokens an expert is taken, or the last
TILES: dict[int, tuple[Tile, ...]] = {
    INT3.value: SMALL, INT4.value: SMALL, NVFP4.value: SMALL, FP8.value: SMALL
}  # fmt: skip
# of one token, whose experts all differ
ALONE: dict[int, Tile] = {code: Tile(8, 32) for code in TILES}


def tile_for(code: int, average: int) -> Tile:
    """The blocks for so many tokens an expert."""
    fitting = (tile for tile in TILES[code] if average <= tile.tokens)
    return next(fitting, TILES[code][-1])
