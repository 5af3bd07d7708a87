"""Sums of x xᵀ over groups of rows, float32, and their upper halves.

On a GPU 16-bit rows go to a kernel that makes the lower triangles of all groups in one launch
(quant/kernels/syrk.py); elsewhere each group is one product. Either way every product of two
inputs and every sum is float32's; only the order of summation differs.
"""

from __future__ import annotations

import torch

from models.device import has_kernels

MIRRORED_AT_ONCE = 1024  # rows


def zero_sums(groups: int, size: int, device: torch.device) -> torch.Tensor:
    """float32 [groups, size, size]; begun while a layer runs, to be changed afterwards too."""
    with torch.inference_mode(False):
        return torch.zeros((groups, size, size), device=device)


def add_products(
    hessian_EKK: torch.Tensor, inputs_PK: torch.Tensor, begin_E: torch.Tensor, end_E: torch.Tensor
) -> None:
    """hessian[e] += Σ x xᵀ over rows begin_E[e]:end_E[e] of contiguous `inputs_PK`.

    Only lower triangles count until `made_symmetric`.
    """
    if has_kernels(inputs_PK) and inputs_PK.element_size() == 2:
        from quant.kernels.syrk import add_lower

        add_lower(hessian_EKK, inputs_PK, begin_E, end_E)
        return
    for hessian, begin, end in zip(hessian_EKK, begin_E.tolist(), end_E.tolist(), strict=True):
        rows = inputs_PK[begin:end].float()
        hessian.addmm_(rows.T, rows)


def whole_range(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin and end, int64 [1], of one group of all `rows`; written where they are, so that
    nothing waits for a GPU."""
    begin = torch.zeros(1, dtype=torch.int64, device=rows.device)
    return begin, torch.full_like(begin, len(rows))


def made_symmetric(hessian_BKK: torch.Tensor) -> torch.Tensor:
    """The same tensors, what lies above their diagonals replaced by what lies below."""
    size = hessian_BKK.shape[-1]
    for start in range(0, size, MIRRORED_AT_ONCE):
        stop = min(size, start + MIRRORED_AT_ONCE)
        block = hessian_BKK[..., start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
        hessian_BKK[..., start:stop, stop:] = hessian_BKK[..., stop:, start:stop].mT
    return hessian_BKK
