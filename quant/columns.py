"""The column loop of GPTQ: round in the order of a factor, each column after the errors before it.

    target_j = w_j + sum_{i<j} (w_i − q_i) U_ij,      cost = sum_j D_j (target_j − q_j)²

Left-looking in blocks: one product brings the errors of all earlier blocks to a block's targets,
a vector product those inside it; W is never rewritten. Columns are rows in memory ([K, N]), so
that all rows of a column, and all experts, are one contiguous operation.

On a GPU a block is one kernel, and products are TF32 (quant/kernels/columns.py).

Refused: the right-looking form, which rewrites the rest of W after every block.
"""

from __future__ import annotations

import torch

from models.device import has_kernels
from quant.factor import Factor
from quant.grid import Grid

BLOCK = 64


def rounded_in_order(
    weight_BKN: torch.Tensor,
    step_BGN: torch.Tensor,
    zero_BGN: torch.Tensor | None,
    factor: Factor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid values [B, K, N] of weights [B, K, N] (columns first in memory) under fixed steps and
    zero points [B, G, N], and what they cost: e H eᵀ of each row, [B, N]."""
    if has_kernels(weight_BKN) and grid.scheme.kind in ("int", "nvfp4"):
        from quant.kernels import columns as kernels

        return kernels.rounded_in_order(weight_BKN, step_BGN, zero_BGN, factor, grid)
    batch, columns, _ = weight_BKN.shape
    index_B = torch.arange(batch, device=weight_BKN.device).unsqueeze(1)
    order, upper = factor.order_BK, factor.upper_BKK
    group = order // (columns // step_BGN.shape[1])
    weight = weight_BKN[index_B, order]
    errors = torch.empty_like(weight)
    values = torch.empty_like(weight)
    cost = weight.new_zeros(batch, weight.shape[2])
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        target = weight[:, start:stop]
        if start:
            coupling = upper[:, :start, start:stop].mT
            target = torch.baddbmm(target, coupling, errors[:, :start])
        step = step_BGN[index_B, group[:, start:stop]]
        zero = None if zero_BGN is None else zero_BGN[index_B, group[:, start:stop]]
        for j in range(stop - start):
            column = start + j
            wanted = target[:, j]
            if j:
                inner = upper[:, start:column, column].unsqueeze(1)
                wanted = wanted + (inner @ errors[:, start:column]).squeeze(1)
            value = grid.nearest(wanted / step[:, j], None if zero is None else zero[:, j])
            rounded = value * step[:, j]
            values[:, column] = value
            errors[:, column] = weight[:, column] - rounded
            cost += factor.pivots_BK[:, column].unsqueeze(1) * (wanted - rounded).square_()
    return torch.empty_like(values).index_put_((index_B, order), values), cost
