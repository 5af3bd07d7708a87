"""The factor of one block of a Hessian, and the Hessian brought into an order.

A block is factorised from its last column to its first, sixteen columns at a time: products bring
what the columns to the right of them explain,

    v_ik = A_ik − sum_{j>k} v_ij U_kj,      U_ik = v_ik / D_k,     D_k = v_kk,

then the sixteen's own [16, 16] part is eliminated column by column, the inverse of its factor
beside it, by which all rows follow. Rows of the identity appended to the block's own turn into
(D⁻¹ U⁻¹)ᵀ, by which the rows above the block are solved in one product. Products are of three TF32
each, which is float32's accuracy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.factor import Factor
from quant.kernels.products import exact_products

BLOCK = 128
SUB = 16
FEW_ROWS = 512  # up to here smaller tiles keep the GPU busy
WIDE = 8192  # entries of a program that brings rows into order


@triton.jit
def eliminate(
    matrix, pivots, inverse, work, matrix_b, matrix_row, pivots_b,
    COUNT: tl.constexpr, SIDE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Symmetric [COUNT, COUNT] blocks, of which the part on and above the diagonal is read, become
    unit upper triangular U, D goes to `pivots` and (D⁻¹ U⁻¹)ᵀ to `inverse` [B, SIDE, SIDE].
    `work` [B, 3 SIDE² + SUB²]: v, then U, then the sixteen columns' own part of v."""
    index = tl.program_id(0).to(tl.int64)
    matrix += index * matrix_b
    pivots += index * pivots_b
    inverse += index * SIDE * SIDE
    work += index * (3 * SIDE * SIDE + SUB * SUB)
    upper = work + 2 * SIDE * SIDE
    corner = upper + SIDE * SIDE
    r = tl.arange(0, 2 * SIDE)[:, None]
    own = tl.arange(0, SUB)
    for back in range(0, SIDE, SUB):
        first = SIDE - SUB - back
        k = first + own[None, :]
        given = (r <= k) & (k < COUNT)
        v = tl.load(matrix + r * matrix_row + k, mask=given, other=0.0)
        v = tl.where(r - SIDE == k, 1.0, v)
        for block in range(SIDE - back, SIDE, SUB):
            past = tl.load(work + r * SIDE + block + own[None, :])
            row = tl.load(upper + k * SIDE + block + own[:, None])
            v -= tl.dot(past, row, input_precision="tf32x3")
        tl.store(
            corner + (r - first) * SUB + own[None, :], v, mask=(r >= first) & (r < first + SUB)
        )
        tl.debug_barrier()
        low = tl.minimum(own[:, None], own[None, :])
        high = tl.maximum(own[:, None], own[None, :])
        a = tl.load(corner + low * SUB + high)
        a = tl.where((low == high) & (first + high >= COUNT), 1.0, a)
        w = tl.where(low == high, 1.0, 0.0)
        d = tl.full([SUB], 1.0, tl.float32)
        for step in range(0, SUB):
            p = SUB - 1 - step
            is_row = own[:, None] == p
            row = tl.sum(tl.where(is_row, a, 0.0), axis=0)
            beside = tl.sum(tl.where(is_row, w, 0.0), axis=0)
            column = tl.sum(tl.where(own[None, :] == p, a, 0.0), axis=1)
            pivot = tl.sum(tl.where(own == p, row, 0.0), axis=0)
            u = tl.where(own < p, column / pivot, 0.0)
            a -= u[:, None] * row[None, :]
            w -= u[:, None] * beside[None, :]
            d = tl.where(own == p, pivot, d)
        tl.store(pivots + first + own, d, mask=first + own < COUNT)
        u = tl.dot(v, tl.trans(w / d[:, None]), input_precision="tf32x3")
        tl.store(work + r * SIDE + k, u * d[None, :])
        found = tl.where(r < k, u, tl.where(r == k, 1.0, 0.0))
        tl.store(upper + r * SIDE + k, found, mask=r < SIDE)
        tl.store(inverse + (r - SIDE) * SIDE + k, u, mask=r >= SIDE)
        tl.debug_barrier()
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    found = tl.load(upper + i * SIDE + j)
    tl.store(matrix + i * matrix_row + j, found, mask=(i < COUNT) & (j < COUNT))


@triton.jit
def reduce_panel(
    upper, pivots, columns, stop, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows before `stop` of columns first .. first + BN, less what the columns from `stop` on
    explain: A −= U D Uᵀ. Three TF32 products each, which is float32's accuracy."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = first + tl.program_id(1) * BN + tl.arange(0, BN)
    index = tl.program_id(2).to(tl.int64)
    upper += index * columns * columns
    pivots += index * columns
    inside = (i < stop)[:, None] & (j < stop)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(stop, columns, BK):
        k = start + tl.arange(0, BK)
        known = k < columns
        a = tl.load(
            upper + i[:, None] * columns + k[None, :],
            mask=(i < stop)[:, None] & known[None, :],
            other=0.0,
        )
        b = tl.load(
            upper + j[:, None] * columns + k[None, :],
            mask=(j < stop)[:, None] & known[None, :],
            other=0.0,
        )
        d = tl.load(pivots + k, mask=known, other=0.0)
        total = tl.dot(a * d[None, :], b.T, total, input_precision="tf32x3")
    at = upper + i[:, None] * columns + j[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - total, mask=inside)


@triton.jit
def solve_panel(
    panel, solver, rows, panel_b, panel_row, COUNT: tl.constexpr, SIDE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """panel [rows, COUNT] times solver [SIDE, SIDE], in place and in float32's accuracy."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    index = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, SIDE)
    panel += index * panel_b
    solver += index * SIDE * SIDE
    found = tl.zeros([BM, SIDE], tl.float32)
    for start in range(0, SIDE, BK):
        k = start + tl.arange(0, BK)
        mask = (i < rows)[:, None] & (k < COUNT)[None, :]
        a = tl.load(panel + i[:, None] * panel_row + k[None, :], mask=mask, other=0.0)
        b = tl.load(solver + k[:, None] * SIDE + j[None, :])
        found = tl.dot(a, b, found, input_precision="tf32x3")
    tl.debug_barrier()
    mask = (i < rows)[:, None] & (j < COUNT)[None, :]
    tl.store(panel + i[:, None] * panel_row + j[None, :], found, mask=mask)


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
    """quant/factor.py's, columns in descending order of the diagonal."""
    batch, columns, _ = hessian_BKK.shape
    order, upper = _ordered(hessian_BKK)
    pivots = hessian_BKK.new_empty(batch, columns)
    for start in reversed(range(0, columns, BLOCK)):
        stop = min(start + BLOCK, columns)
        panel = upper[:, :stop, start:stop]
        if stop < columns:
            wide = BLOCK if stop > FEW_ROWS else BLOCK // 2
            reduce_panel[triton.cdiv(stop, wide), triton.cdiv(stop - start, wide), batch](
                upper, pivots, columns, stop, start,
                BM=wide, BN=wide, BK=32, num_warps=8 if wide == BLOCK else 4, num_stages=3,
            )  # fmt: skip
        solver = _eliminated(panel[:, start:], pivots[:, start:stop])
        if start:
            solve_panel[triton.cdiv(start, 64), batch](
                panel, solver, start, panel.stride(0), panel.stride(1),
                COUNT=stop - start, SIDE=solver.shape[1], BM=64, BK=32, num_warps=4,
            )  # fmt: skip
    # what is not finite in a factor reaches one of its pivots
    good = (torch.isfinite(pivots) & (pivots > 0)).all(1)
    return Factor(order, upper, pivots), good


def factor_with_inverse(blocks_BKK: torch.Tensor) -> tuple[Factor, torch.Tensor]:
    """Factors of matrices of at most `BLOCK` columns, and the inverses of the matrices."""
    batch, count, _ = blocks_BKK.shape
    order, upper = _ordered(blocks_BKK)
    pivots = upper.new_empty(batch, count)
    solver = _eliminated(upper, pivots)[:, :count, :count]
    with exact_products():
        inverse = (solver * pivots.unsqueeze(1)) @ solver.mT
    rank = order.argsort(dim=1)
    inverse = inverse.gather(1, rank.unsqueeze(2).expand_as(inverse))
    inverse = inverse.gather(2, rank.unsqueeze(1).expand_as(inverse))
    return Factor(order, upper, pivots), inverse


def _ordered(hessian_BKK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order, and what of the matrices in it a factorisation reads."""
    batch, columns, _ = hessian_BKK.shape
    diagonal = hessian_BKK.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    upper = torch.empty_like(hessian_BKK, memory_format=torch.contiguous_format)
    wide = min(WIDE, triton.next_power_of_2(columns))
    in_order[columns, triton.cdiv(columns, wide), batch](
        hessian_BKK.contiguous(), order, upper, columns, BLOCK=BLOCK, WIDE=wide, num_warps=8
    )
    return order, upper


def _eliminated(block: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """Turns [B, K, K] into U in place and fills D; (D⁻¹ U⁻¹)ᵀ [B, SIDE, SIDE]."""
    batch, count = pivots.shape
    side = max(SUB, triton.next_power_of_2(count))
    inverse = block.new_empty(batch, side, side)
    work = block.new_empty(batch, 3 * side * side + SUB * SUB)
    eliminate[batch,](
        block, pivots, inverse, work, block.stride(0), block.stride(1), pivots.stride(0),
        COUNT=count, SIDE=side, SUB=SUB, num_warps=8 if side == BLOCK else 4,
    )  # fmt: skip
    return inverse
