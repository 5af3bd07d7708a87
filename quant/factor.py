"""The factor of a Hessian that rounding column by column wants, and the order of the columns.

For a damped Hessian H and an order of its columns, H = U D Uᵀ with U unit upper triangular and D
diagonal. The error of rounding W to Q is then, with E = W − Q,

    tr(E H Eᵀ)  =  sum_j  D_j · |e_j + sum_{i<j} e_i U_ij|²,

so each column is rounded after adding the errors already made, and D_j is what an error there will
cost. One factorisation, no inverse.

The order is part of the factorisation. Elimination runs from the last column to the first and
each step takes the column whose remaining pivot is smallest: columns whose errors cost least go
last, where nothing is left to make up for them, the costly ones first. That is the Hessian's
diagonal in descending order ("static activation order") when channels are uncorrelated, and gives
a smaller error when they are not. Groups and scales stay where they are; readers see no order.

On a GPU the order is the diagonal's: it is known beforehand, so that the factorisation is one of
blocks (quant/kernels/elimination.py). Picking pivots is one column after the other, 7,168 dependent
steps of several launches; what the order costs in error is printed by benchmarks/gptq_gpu.py.

Refused: the inverse form (Cholesky, inverse, Cholesky again: twice the work and a worse condition),
and the diagonal order on a CPU, where picking costs little (its error on the demo model's experts
at W3A16 is 5 % larger).

Source: LDL form of GPTQ (Frantar et al., 2210.17323; QuIP 2307.13304, theorem 1); rounding as
Babai's nearest plane, whose error bound the smallest-pivot order minimises greedily
(Chen et al., 2507.18553).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.device import has_kernels

BLOCK = 64
DAMPING_RETRIES = (1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True)
class Factor:
    """H[order][:, order] = U diag(D) Uᵀ of each matrix of a batch."""

    order_BK: torch.Tensor  # int64
    upper_BKK: torch.Tensor  # unit upper triangular, rows and columns in the order
    pivots_BK: torch.Tensor  # D, in the order

    @property
    def importance_BK(self) -> torch.Tensor:
        """D by input channel: what an error in that channel costs after the others made up."""
        return torch.empty_like(self.pivots_BK).scatter_(1, self.order_BK, self.pivots_BK)


def factorise(hessian_BKK: torch.Tensor) -> tuple[Factor, torch.Tensor]:
    """Factors of symmetric matrices, float32, and which of them (bool [B]) were positive definite.

    The factor of a matrix that was not is meaningless.
    """
    if has_kernels(hessian_BKK):
        from quant.kernels import elimination

        return elimination.factorise(hessian_BKK)
    return factorise_by_pivots(hessian_BKK)


def factorise_by_pivots(hessian_BKK: torch.Tensor) -> tuple[Factor, torch.Tensor]:
    """The same in the order of smallest pivots, on any device."""
    batch, columns, _ = hessian_BKK.shape
    device = hessian_BKK.device
    rows_B = torch.arange(batch, device=device).unsqueeze(1)
    lower = hessian_BKK.new_zeros(hessian_BKK.shape)  # [B, step, channel]: rows of Lᵀ
    picked = torch.empty(batch, columns, dtype=torch.int64, device=device)
    smallest = hessian_BKK.new_full((batch,), torch.inf)
    rest = hessian_BKK  # Schur complement of what is left
    left = torch.arange(columns, device=device).expand(batch, columns)  # its channels
    for start in range(0, columns, BLOCK):
        panel, local, dead, pivots = _eliminate(rest, min(BLOCK, columns - start))
        stop = start + panel.shape[1]
        picked[:, start:stop] = left.gather(1, local)
        lower[:, start:stop].scatter_(2, left.unsqueeze(1).expand_as(panel), panel)
        smallest = torch.minimum(smallest, pivots)
        keep = (~dead).nonzero()[:, 1].view(batch, -1)
        narrow = panel[
            rows_B.unsqueeze(1),
            torch.arange(stop - start, device=device)[None, :, None],
            keep.unsqueeze(1),
        ]
        rest = rest[rows_B.unsqueeze(2), keep.unsqueeze(2), keep.unsqueeze(1)]
        rest = torch.baddbmm(rest, narrow.mT, narrow, alpha=-1)
        left = left.gather(1, keep)
    order = picked.flip(1)
    # rows of Lᵀ are steps: in the order, the last step is the first column
    root = lower.flip(1).gather(2, order.unsqueeze(1).expand_as(lower)).mT.contiguous()
    diagonal = root.diagonal(dim1=1, dim2=2).clone()
    good = torch.isfinite(smallest) & (smallest > 0) & torch.isfinite(root).all(-1).all(-1)
    return Factor(order, root.div_(diagonal.unsqueeze(1)), diagonal.square()), good


def _eliminate(
    rest_BRR: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` steps on `rest`: rows of Lᵀ [B, count, R], the channels picked [B, count], which
    are dead now [B, R], and the smallest pivot [B]."""
    batch, size, _ = rest_BRR.shape
    index_B = torch.arange(batch, device=rest_BRR.device)
    panel = rest_BRR.new_zeros(batch, count, size)
    local = torch.empty(batch, count, dtype=torch.int64, device=rest_BRR.device)
    dead = torch.zeros(batch, size, dtype=torch.bool, device=rest_BRR.device)
    diagonal = rest_BRR.diagonal(dim1=1, dim2=2).clone()
    smallest = rest_BRR.new_full((batch,), torch.inf)
    for step in range(count):
        pivot, pick = diagonal.min(dim=1)
        smallest = torch.minimum(smallest, pivot)
        row = rest_BRR[index_B, pick]
        if step:
            past = panel[:, :step]
            row = row - (past[index_B, :, pick].unsqueeze(1) @ past).squeeze(1)
        row = (row * pivot.rsqrt().unsqueeze(1)).masked_fill_(dead, 0.0)
        row[index_B, pick] = pivot.sqrt()
        panel[:, step], local[:, step] = row, pick
        dead[index_B, pick] = True
        diagonal = (diagonal - row.square()).masked_fill_(dead, torch.inf)
    return panel, local, dead, smallest


def damped_factor(
    hessian_BKK: torch.Tensor, damping: float
) -> tuple[torch.Tensor, Factor, torch.Tensor]:
    """Damp and factorise: (H + λ mean(diag H) I, its factor, the λ [B] that was used).

    Channels with a zero diagonal (no token ever moved them) lose their off-diagonal rest, so no
    error reaches them. A matrix that is not positive definite is tried again with λ ten and a
    hundred times as large; where that fails too, or the matrix is not finite or zero, λ is NaN and
    the factor is that of the identity.
    """
    columns = hessian_BKK.shape[-1]
    diagonal = hessian_BKK.diagonal(dim1=1, dim2=2)
    dead = ~(diagonal > 0)
    mean = diagonal.mean(dim=1)
    largest = torch.linalg.vector_norm(hessian_BKK, ord=torch.inf, dim=(1, 2))
    usable = torch.isfinite(largest) & (mean > 0)
    eye = torch.eye(columns, device=hessian_BKK.device)
    damped = hessian_BKK.clone()
    if bool(dead.any()):
        damped.masked_fill_(dead.unsqueeze(1) | dead.unsqueeze(2), 0.0)
    damped[~usable] = eye
    own = damped.diagonal(dim1=1, dim2=2)
    undamped = own.clone()
    unit = torch.where(usable, mean, 0.0).unsqueeze(1)
    used = torch.full_like(mean, torch.nan)
    own.add_(damping * unit)
    factor, good = factorise(damped)
    used[usable & good] = damping
    for raise_by in DAMPING_RETRIES[1:]:
        if bool(good.all()):
            break
        bad = ~good
        own[bad] = undamped[bad] + damping * raise_by * unit[bad]
        again, mended = factorise(damped[bad])
        _replace(factor, bad, again)
        used[bad] = torch.where(mended, damping * raise_by, torch.nan)
        good = good | bad.masked_scatter(bad, mended)
    if not bool(good.all()):
        damped[~good] = eye
        _replace(factor, ~good, factorise(damped[~good])[0])
    return damped, factor, used


def _replace(factor: Factor, where_B: torch.Tensor, by: Factor) -> None:
    factor.order_BK[where_B] = by.order_BK
    factor.upper_BKK[where_B] = by.upper_BKK
    factor.pivots_BK[where_B] = by.pivots_BK
