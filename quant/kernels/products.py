"""Products on a GPU: their precision, the energy of rows, and transposes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

STRIP = 1024  # columns of an energy's product
TILE = 64  # side of what a program transposes


@contextmanager
def tf32_products() -> Iterator[None]:
    """float32 products by TF32 tensor cores: operands cut to ten bits, float32 sums."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@triton.jit
def add_row_products(left, right, total, rows, width, right_b, right_row,
                     BR: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """total[b, n] += sum_k left[b, n, k] right[b, n, k]; left contiguous."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    index = tl.program_id(1).to(tl.int64)
    inside = row < rows
    left += index * rows * width
    right += index * right_b
    found = tl.zeros([BR, WIDE], tl.float32)
    for start in range(0, width, WIDE):
        k = start + tl.arange(0, WIDE)
        mask = inside[:, None] & (k < width)[None, :]
        a = tl.load(left + row[:, None] * width + k[None, :], mask=mask, other=0.0)
        b = tl.load(right + row[:, None] * right_row + k[None, :], mask=mask, other=0.0)
        found += a * b
    at = total + index * rows + row
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, before + tl.sum(found, axis=1), mask=inside)


@triton.jit
def transpose(matrix, out, rows, columns, SIDE: tl.constexpr):
    """[B, rows, columns] -> [B, columns, rows], both contiguous."""
    index = tl.program_id(2).to(tl.int64) * rows * columns
    i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(matrix + index + i[:, None] * columns + j[None, :], mask=mask, other=0.0)
    at = out + index + j[:, None] * rows + i[None, :]
    tl.store(at, tile.T, mask=(j < columns)[:, None] & (i < rows)[None, :])


def transposed(matrix_BNK: torch.Tensor) -> torch.Tensor:
    """[B, N, K] -> [B, K, N], contiguous."""
    batch, rows, columns = matrix_BNK.shape
    out = matrix_BNK.new_empty(batch, columns, rows)
    transpose[triton.cdiv(rows, TILE), triton.cdiv(columns, TILE), batch](
        matrix_BNK.contiguous(), out, rows, columns, SIDE=TILE, num_warps=4
    )
    return out


def energy(rows_BNK: torch.Tensor, hessian_BKK: torch.Tensor) -> torch.Tensor:
    """r H rᵀ of every row, [B, N], from the half of H above its blocks' diagonal."""
    batch, rows, columns = rows_BNK.shape
    rows_BNK = rows_BNK.contiguous()
    total = rows_BNK.new_zeros(batch, rows)
    for start in range(0, columns, STRIP):
        strip = slice(start, start + STRIP)
        own = rows_BNK[:, :, strip]
        with tf32_products():
            product = own @ hessian_BKK[:, strip, strip]
            if start:
                product.baddbmm_(rows_BNK[:, :, :start], hessian_BKK[:, :start, strip], alpha=2)
        add_row_products[triton.cdiv(rows, 8), batch](
            product, own, total, rows, own.shape[2], own.stride(0), own.stride(1),
            BR=8, WIDE=128, num_warps=4,
        )  # fmt: skip
    return total
