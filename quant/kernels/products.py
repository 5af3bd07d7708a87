"""Products on a GPU: their precision, and the energy of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


STRIP = 1024


def energy(rows_BNK: torch.Tensor, hessian_BKK: torch.Tensor) -> torch.Tensor:
    """r H rᵀ of every row, [B, N], from the half of H above its blocks' diagonal."""
    total = rows_BNK.new_zeros(rows_BNK.shape[:2])
    with tf32_products():
        for start in range(0, rows_BNK.shape[2], STRIP):
            strip = slice(start, start + STRIP)
            own = rows_BNK[:, :, strip]
            product = own @ hessian_BKK[:, strip, strip]
            if start:
                product.baddbmm_(rows_BNK[:, :, :start], hessian_BKK[:, :start, strip], alpha=2)
            total += product.mul_(own).sum(-1)
    return total
