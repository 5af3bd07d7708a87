"""Sums of x xᵀ over the rows of many groups in one launch: the lower triangles of Hessians.

    H[e] += Σ_{n in group e} x_n x_nᵀ        x bfloat16 or float16, products and sums float32

One program makes one tile of ROWS x COLUMNS of one H and runs over all rows of its group; tiles
above the diagonal are never started, which halves the work of a product of matrices. Programs of
one group follow each other, so that its rows come from L2.

Refused: one product a group (one launch each, both triangles, and a float32 temporary of the size
of H); torch's grouped product, which cannot add in float32; gathering a token's row by its index
inside the loop (82 ms instead of 62 + 4 for the gather before, for the 256 experts of a
DeepSeek-V3.2 layer and 65,536 tokens: an address that was loaded cannot be loaded from in time).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS, STEP = 128, 64
WIDE = 4096  # columns from which tiles are twice as high
WARPS, STAGES = 8, 4


@triton.jit
def syrk_kernel(
    hessian_ptr,  # float32 [E, K, K]
    inputs_ptr,  # [P, K], by group
    begin_ptr,  # int64 [E]: where each group's rows begin
    end_ptr,  # int64 [E]: and end
    size,  # K
    stride,  # elements between rows of inputs
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of both tile sides
):
    group = tl.program_id(1)
    begin = tl.load(begin_ptr + group)
    end = tl.load(end_ptr + group)
    if begin == end:
        return
    # tiles are numbered along the rows of the triangle: row i has (i + 1) * ratio of them
    ratio: tl.constexpr = ROWS // COLUMNS
    tile = tl.program_id(0)
    down = ((tl.sqrt(8.0 * (tile // ratio) + 1.0) - 1.0) * 0.5).to(tl.int32)
    if ratio * down * (down + 1) // 2 > tile:  # the root is that of a float32
        down -= 1
    if ratio * (down + 1) * (down + 2) // 2 <= tile:
        down += 1
    across = tile - ratio * down * (down + 1) // 2
    left_C = down * ROWS + tl.arange(0, ROWS)
    right_C = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    step_N = tl.arange(0, STEP)
    for start in range(begin, end, STEP):
        inside_N = start + step_N < end
        x_N = inputs_ptr + (start + step_N) * stride
        if EVEN:
            left_mask, right_mask = inside_N[:, None], inside_N[:, None]
        else:
            left_mask = inside_N[:, None] & (left_C < size)[None, :]
            right_mask = inside_N[:, None] & (right_C < size)[None, :]
        left = tl.load(x_N[:, None] + left_C[None, :], mask=left_mask, other=0.0)
        right = tl.load(x_N[:, None] + right_C[None, :], mask=right_mask, other=0.0)
        total = tl.dot(tl.trans(left), right, total)
    place = hessian_ptr + group.to(tl.int64) * size * size
    place = place + left_C[:, None].to(tl.int64) * size + right_C[None, :]
    if EVEN:
        tl.store(place, tl.load(place) + total)
    else:
        inside = (left_C < size)[:, None] & (right_C < size)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def add_lower(
    hessian_EKK: torch.Tensor, inputs_PK: torch.Tensor, begin_E: torch.Tensor, end_E: torch.Tensor
) -> None:
    """Add Σ x xᵀ over rows begin_E[e]:end_E[e] of `inputs_PK` to the lower triangle of each of
    contiguous float32 [E, K, K]. What lies above the diagonal becomes meaningless."""
    groups, size, _ = hessian_EKK.shape
    assert inputs_PK.stride(1) == 1
    assert hessian_EKK.is_contiguous()
    rows = 2 * COLUMNS if size >= WIDE and size % (2 * COLUMNS) == 0 else COLUMNS
    down = triton.cdiv(size, rows)
    tiles = rows // COLUMNS * down * (down + 1) // 2
    syrk_kernel[(tiles, groups)](
        hessian_EKK,
        inputs_PK,
        begin_E.contiguous(),
        end_E.contiguous(),
        size,
        inputs_PK.stride(0),
        ROWS=rows,
        COLUMNS=COLUMNS,
        STEP=STEP,
        EVEN=size % rows == 0,
        num_warps=WARPS,
        num_stages=STAGES,
    )
