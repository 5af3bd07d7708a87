"""The factor of one block of a Hessian, and the Hessian brought into an order.

A block is eliminated from its last column to its first (quant/factor.py), the inverse of U
beside it, as registers of one program:

    A −= u ⊗ A_p,   V −= u ⊗ V_p,   u = A_·p / A_pp  over the columns left

With `PIVOT` the next p is the column whose remaining pivot is smallest, else the next one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.factor import Factor
from quant.kernels.products import exact_products

BLOCK = 128
WIDE = 1024  # entries of a program that brings rows into order


@triton.jit
def eliminate(
    matrix, pivots, inverse, order, matrix_b, matrix_row, pivots_b,
    COUNT: tl.constexpr, SIDE: tl.constexpr, PIVOT: tl.constexpr,
):  # fmt: skip
    """Symmetric [COUNT, COUNT] blocks, of which the part on and above the diagonal is read, become
    unit upper triangular U in their order; D likewise. `inverse` [B, SIDE, SIDE], by channel:
    D⁻¹ U⁻¹, the row of a channel's own pivot. `order` [B, SIDE] only with PIVOT."""
    index = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, SIDE)
    c = tl.arange(0, SIDE)
    low = tl.minimum(r[:, None], c[None, :])
    high = tl.maximum(r[:, None], c[None, :])
    matrix += index * matrix_b
    inside = (r[:, None] < COUNT) & (c[None, :] < COUNT)
    a = tl.load(matrix + low * matrix_row + high, mask=inside, other=0.0)
    v = tl.where(r[:, None] == c[None, :], 1.0, 0.0)
    alive_r = r < COUNT
    alive_c = c < COUNT
    place_r = r
    place_c = c
    scale_r = tl.full([SIDE], 1.0, tl.float32)
    diagonal = tl.sum(tl.where(r[:, None] == c[None, :], a, 0.0), axis=0)
    for step in range(0, COUNT):
        place = COUNT - 1 - step
        p = place
        if PIVOT:
            p = tl.argmin(tl.where(alive_c, diagonal, float("inf")), axis=0)
        is_row = r == p
        is_column = c == p
        row = tl.sum(tl.where(is_row[:, None], a, 0.0), axis=0)
        beside = tl.sum(tl.where(is_row[:, None], v, 0.0), axis=0)
        column = tl.sum(tl.where(is_column[None, :], a, 0.0), axis=1)
        pivot = tl.sum(tl.where(is_column, row, 0.0), axis=0)
        alive_r = alive_r & (r != p)
        alive_c = alive_c & (c != p)
        u = tl.where(alive_r, column / pivot, 0.0)
        a -= u[:, None] * tl.where(alive_c, row, 0.0)[None, :]
        a = tl.where(is_column[None, :] & alive_r[:, None], u[:, None], a)
        v -= u[:, None] * beside[None, :]
        scale_r = tl.where(is_row, 1.0 / pivot, scale_r)
        tl.store(pivots + index * pivots_b + place, pivot)
        if PIVOT:
            diagonal = tl.sum(tl.where(r[:, None] == c[None, :], a, 0.0), axis=0)
            place_r = tl.where(is_row, place, place_r)
            place_c = tl.where(is_column, place, place_c)
            tl.store(order + index * SIDE + place, p.to(tl.int64))
    out = tl.where(place_r[:, None] < place_c[None, :], a, 0.0)
    out = tl.where(place_r[:, None] == place_c[None, :], 1.0, out)
    tl.debug_barrier()
    tl.store(matrix + place_r[:, None] * matrix_row + place_c[None, :], out, mask=inside)
    at = (index * SIDE + r[:, None]) * SIDE + c[None, :]
    tl.store(inverse + at, v * scale_r[:, None])


@triton.jit
def in_order(matrix, order, out, columns, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """out[i, j] = matrix[order[i], order[j]] above the diagonal and in its blocks, else 0."""
    i = tl.program_id(0)
    j = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    index = tl.program_id(2).to(tl.int64)
    matrix += index * columns * columns
    out += index * columns * columns + i * columns
    order += index * columns
    row = tl.load(order + i) * columns
    inside = j < columns
    channel = tl.load(order + j, mask=inside, other=0)
    kept = inside & (j >= i // BLOCK * BLOCK)
    tl.store(out + j, tl.load(matrix + row + channel, mask=kept, other=0.0), mask=inside)


def factorise(hessian_BKK: torch.Tensor) -> tuple[Factor, torch.Tensor]:
    """quant/factor.py's. More than one block of columns: in descending order of the diagonal."""
    batch, columns, _ = hessian_BKK.shape
    if columns <= BLOCK:
        factor, _ = factor_with_inverse(hessian_BKK)
        return factor, _positive(factor.pivots_BK)
    diagonal = hessian_BKK.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    upper = torch.empty_like(hessian_BKK)
    in_order[columns, triton.cdiv(columns, WIDE), batch](
        hessian_BKK, order, upper, columns, BLOCK=BLOCK, WIDE=WIDE, num_warps=4
    )
    pivots = hessian_BKK.new_empty(batch, columns)
    solver = hessian_BKK.new_empty(batch, BLOCK, BLOCK)
    with exact_products():
        for start in reversed(range(0, columns, BLOCK)):
            stop = min(start + BLOCK, columns)
            panel = upper[:, :stop, start:stop]
            if stop < columns:
                later = upper[:, start:stop, stop:] * pivots[:, None, stop:]
                panel.baddbmm_(upper[:, :stop, stop:], later.mT, alpha=-1)
            count = stop - start
            eliminate[batch,](
                panel[:, start:], pivots[:, start:], solver, order,
                upper.stride(0), upper.stride(1), columns,
                COUNT=count, SIDE=BLOCK, PIVOT=False, num_warps=8,
            )  # fmt: skip
            if start:
                above = panel[:, :start]
                above.copy_(above @ solver[:, :count, :count].mT)
    return Factor(order, upper, pivots), _positive(pivots)


def factor_with_inverse(blocks_BKK: torch.Tensor) -> tuple[Factor, torch.Tensor]:
    """Factors of matrices of one block, smallest pivot first from the end, and D⁻¹ U⁻¹ [B, K, K]
    by channel (row: of the channel's own pivot)."""
    batch, count, _ = blocks_BKK.shape
    assert count <= BLOCK
    side = max(16, triton.next_power_of_2(count))
    upper = blocks_BKK.contiguous().clone()
    pivots = upper.new_empty(batch, count)
    inverse = upper.new_empty(batch, side, side)
    order = torch.empty(batch, side, dtype=torch.int64, device=upper.device)
    eliminate[batch,](
        upper, pivots, inverse, order, upper.stride(0), upper.stride(1), count,
        COUNT=count, SIDE=side, PIVOT=True, num_warps=8 if side == BLOCK else 4,
    )  # fmt: skip
    return Factor(order[:, :count], upper, pivots), inverse[:, :count, :count]


def _positive(pivots_BK: torch.Tensor) -> torch.Tensor:
    """A factor is sound when its pivots are: what is not finite in it reaches one of them."""
    return (torch.isfinite(pivots_BK) & (pivots_BK > 0)).all(1)
