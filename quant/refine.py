"""Group by group, better codes and scales than one pass of GPTQ leaves.

GPTQ decides every column once, under scales chosen before any error was known. Here each group g
of input channels is solved again with all others held. With R = W − Q, its best real-valued
weights are

    t = w_g + H_gg⁻¹ sum_{others o} H_go r_o,

and any new codes cost (t − q_g) H_gg (t − q_g)ᵀ more than t itself: the problem GPTQ solves, of
size g. It is solved for several steps around the current one (least squares given the codes, times
`FACTORS`), then single codes are moved to their best value given the rest. A row keeps the
candidate that costs least, its present state among them, so the error never rises.

On a GPU the candidates are made from the present step, which saves a product for each group, and
the pull is found for several groups at once in TF32 (quant/kernels/refinement.py).

Refused: moving the codes alone (60 % of the gain), and whole-matrix restarts with other scales
(their gain fades with the number of groups).

Source: block coordinate descent on the GPTQ objective, after QuantEase (2309.01885).
"""

from __future__ import annotations

import torch

from models.device import has_kernels
from quant.columns import rounded_in_order
from quant.factor import Factor, factorise
from quant.grid import Grid

FACTORS = (1.0, 0.95, 1.05, 0.9, 1.1)
KERNEL_GROUP = 128  # the largest group kernels refine


def refine(
    weight_BKN: torch.Tensor,
    values_BKN: torch.Tensor,
    step_BGN: torch.Tensor,
    zero_BGN: torch.Tensor | None,
    hessian_BKK: torch.Tensor,
    grid: Grid,
    sweeps: int,
) -> None:
    """Improve grid values and stored steps in place; zero points stay."""
    groups = step_BGN.shape[1]
    size = weight_BKN.shape[1] // groups
    if has_kernels(weight_BKN) and size <= KERNEL_GROUP:
        from quant.kernels import refinement

        refinement.refine(
            weight_BKN, values_BKN, step_BGN, zero_BGN, hessian_BKK, grid, sweeps, FACTORS
        )
        return
    factors = group_factors(hessian_BKK, size)
    spread = step_BGN.repeat_interleave(size, dim=1)
    residual = weight_BKN - values_BKN * spread
    for _ in range(sweeps):
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            own = hessian_BKK[:, columns, columns].contiguous()
            pull = hessian_BKK[:, columns] @ residual - own @ residual[:, columns]
            state = _Group(
                weight_BKN[:, columns] + solve(factors[group], pull),
                own,
                factors[group],
                None if zero_BGN is None else zero_BGN[:, group : group + 1],
                grid,
            )
            values, step = state.improved(values_BKN[:, columns], step_BGN[:, group])
            values_BKN[:, columns], step_BGN[:, group] = values, step
            residual[:, columns] = weight_BKN[:, columns] - values * step.unsqueeze(1)


def group_factors(hessian_BKK: torch.Tensor, size: int) -> list[Factor]:
    """Factor of each diagonal block of `size` channels, all found in one batch."""
    batch = len(hessian_BKK)
    blocks = hessian_BKK.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [B, G, g, G, g]
    own = blocks.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)  # [G, B, g, g]
    factor, _ = factorise(own.reshape(-1, size, size))
    split = (
        part.unflatten(0, (-1, batch))
        for part in (factor.order_BK, factor.upper_BKK, factor.pivots_BK)
    )
    return [Factor(*parts) for parts in zip(*split, strict=True)]


def solve(factor: Factor, right_BKN: torch.Tensor) -> torch.Tensor:
    """H⁻¹ times the columns of `right`."""
    index_B = torch.arange(len(right_BKN), device=right_BKN.device).unsqueeze(1)
    x = torch.linalg.solve_triangular(
        factor.upper_BKK, right_BKN[index_B, factor.order_BK], upper=True, unitriangular=True
    )
    x = x / factor.pivots_BK.unsqueeze(2)
    x = torch.linalg.solve_triangular(factor.upper_BKK.mT, x, upper=False, unitriangular=True)
    return torch.empty_like(x).index_put_((index_B, factor.order_BK), x)


class _Group:
    """One group of every row and expert: targets [B, g, N] under its own Hessian [B, g, g]."""

    def __init__(
        self,
        target: torch.Tensor,
        hessian: torch.Tensor,
        factor: Factor,
        zero: torch.Tensor | None,
        grid: Grid,
    ) -> None:
        self.target, self.hessian, self.factor = target, hessian, factor
        self.zero, self.grid = zero, grid
        self.pulled = hessian @ target
        self.constant = (self.pulled * target).sum(1)

    def fitted(self, values: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The better of `step` and the stored least-squares step of these values, and its cost."""
        square = ((self.hessian @ values) * values).sum(1)
        product = (self.pulled * values).sum(1)
        best = self.grid.stored(torch.where(square > 0, product / square, step))
        cost = square * step * step - 2 * product * step
        best_cost = square * best * best - 2 * product * best
        better = best_cost < cost
        total = torch.where(better, best_cost, cost) + self.constant
        return torch.where(better, best, step), total

    def improved(
        self, values: torch.Tensor, step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cheapest of the present codes and of GPTQ's under each candidate step."""
        rows = step.shape[1]
        step, cost = self.fitted(values, step)
        tried = torch.cat([self.grid.stored(step * factor) for factor in FACTORS], dim=1)
        zero = None if self.zero is None else self.zero.repeat(1, 1, len(FACTORS))
        target = self.target.repeat(1, 1, len(FACTORS))
        found, costs = rounded_in_order(target, tried.unsqueeze(1), zero, self.factor, self.grid)
        for number in range(len(FACTORS)):
            columns = slice(number * rows, (number + 1) * rows)
            better = costs[:, columns] < cost
            cost = torch.where(better, costs[:, columns], cost)
            step = torch.where(better, tried[:, columns], step)
            values = torch.where(better.unsqueeze(1), found[:, :, columns], values)
        values = self.descended(values, step)
        return values, self.fitted(values, step)[0]

    def descended(self, values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Each code in turn at its best given the others."""
        error = self.target - values * step.unsqueeze(1)
        slope = self.hessian @ error
        change = torch.empty_like(error)
        moved = torch.empty_like(values)
        for j in range(values.shape[1]):
            here = slope[:, j]
            if j:
                here = here + (self.hessian[:, j : j + 1, :j] @ change[:, :j]).squeeze(1)
            diagonal = self.hessian[:, j, j].unsqueeze(1)
            best = self.target[:, j] - error[:, j] + here / diagonal
            zero = None if self.zero is None else self.zero[:, 0]
            moved[:, j] = self.grid.nearest(best / step, zero)
            change[:, j] = (values[:, j] - moved[:, j]) * step
        return moved
