"""quant/grid.py inside a kernel: rounding to the grid, and steps as they are stored.

Adding and taking away 1.5 · 2^23 rounds a float32 to an integer, ties to even, in two additions
(the conversion instruction runs at a quarter of their rate); values are clamped in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.grid import Grid

INT, INT_WITH_ZERO, NVFP4 = 0, 1, 2
KINDS = {"int": INT, "nvfp4": NVFP4}
STORED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23


def kind_of(grid: Grid) -> int:
    """How a kernel names this grid."""
    return KINDS[grid.scheme.kind] if grid.scheme.symmetric else INT_WITH_ZERO


@triton.jit
def nearest(x, low, high, KIND: tl.constexpr):
    """The grid value nearest to x: an integer of [low, high], or ±{0, .5, 1, 1.5, 2, 3, 4, 6}."""
    if KIND == 2:
        size = tl.minimum(tl.abs(x), 6.0)
        fine = (tl.minimum(size, 2.0) * 2.0 + MAGIC) - MAGIC
        middle = (tl.minimum(tl.maximum(size, 2.0), 4.0) - 2.0 + MAGIC) - MAGIC
        coarse = ((tl.maximum(size, 4.0) - 4.0) * 0.5 + MAGIC) - MAGIC
        found = fine * 0.5 + middle + coarse * 2.0
        return tl.where(x < 0, -found, found)
    else:
        return tl.minimum(tl.maximum(x + MAGIC, low + MAGIC), high + MAGIC) - MAGIC


@triton.jit
def stored(step, divisor, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """A step as a reader will see it: never zero, finite; positive where zero points or blocks
    make it so."""
    if KIND == 2:
        scale = tl.minimum(tl.maximum(tl.abs(step) * divisor, 0.001953125), 448.0)
        bits = scale.to(tl.int32, bitcast=True)  # three bits of mantissa, ties to even
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        subnormal = ((scale * 512.0 + MAGIC) - MAGIC) * 0.001953125
        scale = tl.where(scale < 0.015625, subnormal, bits.to(tl.float32, bitcast=True))
        return scale / divisor
    else:
        if KIND == 1:
            step = tl.abs(step)
        if tl.float32 == DTYPE:
            rounded = step
        elif tl.float16 == DTYPE:
            rounded = tl.minimum(tl.maximum(step, -65504.0), 65504.0).to(tl.float16)
            rounded = rounded.to(tl.float32)
        else:
            bits = step.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            rounded = bits.to(tl.float32, bitcast=True)
        smallest = 6.103515625e-05 if tl.float16 == DTYPE else 1.1754943508222875e-38
        return tl.where(rounded == 0, smallest, rounded)
