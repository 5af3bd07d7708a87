"""What a refinement does around the rounding of a group, each one pass over [g, N] of it.

With P = H_g· R, X = H_gg⁻¹ P, the codes' values q and step s, a group's best real-valued weights
are t = s q + X (quant/refine.py), and the present codes cost X·P. Candidates are made from the
present step, without fitting it first as the CPU does: every group leaves with a fitted one.

All are [B, g, N] with N contiguous; strides of weights of the batch are arguments where a group is
a slice of something larger. Products with the group's own matrices are formed where their results
are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.grid import Grid
from quant.kernels import columns
from quant.kernels.elimination import factor_with_inverse
from quant.kernels.grid import STORED, kind_of, stored
from quant.kernels.products import tf32_products

ROWS, PART = 64, 32  # rows of a program; columns of a step of its product
FAR = 512  # columns whose pull is found by one product


@triton.jit
def aim(
    values, pull, inverse, step, divisors, factors, target, tried, cost,
    rows, values_b, pull_b, inverse_b, step_b, CANDIDATES: tl.constexpr, COUNT: tl.constexpr,
    KIND: tl.constexpr, DTYPE: tl.constexpr,
    SIDE: tl.constexpr, PART: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`target` t and `cost` [B, N] of the present codes; `tried` [B, 1 + candidates, N]: the step,
    then times each factor."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    index = tl.program_id(1).to(tl.int64)
    inside = row < rows
    values += index * values_b
    pull += index * pull_b
    inverse += index * inverse_b
    target += index * COUNT * rows
    k = tl.arange(0, SIDE)
    solved = tl.zeros([SIDE, BR], tl.float32)
    for start in range(0, COUNT, PART):
        part = start + tl.arange(0, PART)
        own = (k < COUNT)[:, None] & (part < COUNT)[None, :]
        left = tl.load(inverse + k[:, None] * COUNT + part[None, :], mask=own, other=0.0)
        right = _tile(pull, part, row, rows, COUNT)
        solved = tl.dot(left, right, solved, input_precision="tf32x3")
    now = tl.load(step + index * step_b + row, mask=inside, other=1.0)
    t = _tile(values, k, row, rows, COUNT) * now[None, :] + solved
    at = k[:, None] * rows + row[None, :]
    tl.store(target + at, t, mask=(k < COUNT)[:, None] & inside[None, :])
    present = tl.sum(solved * _tile(pull, k, row, rows, COUNT), axis=0)
    tl.store(cost + index * rows + row, present, mask=inside)
    divisor = tl.load(divisors + index) if KIND == 2 else 1.0
    tried += index * (1 + CANDIDATES) * rows + row
    tl.store(tried, now, mask=inside)
    for number in range(0, CANDIDATES):
        one = stored(now * tl.load(factors + number), divisor, KIND, DTYPE)
        tl.store(tried + (1 + number) * rows, one, mask=inside)


@triton.jit
def _tile(matrix, k, row, rows, COUNT: tl.constexpr):
    mask = (k < COUNT)[:, None] & (row < rows)[None, :]
    return tl.load(matrix + k[:, None] * rows + row[None, :], mask=mask, other=0.0)


@triton.jit
def choose(
    values, found, target, tried, cost, costs, coupling, base, extra, step,
    rows, values_b, coupling_b, CANDIDATES: tl.constexpr, COUNT: tl.constexpr,
    SIDE: tl.constexpr, PART: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The cheapest of the present values and the candidates `found` [B, candidates, g, N]:
    its step [B, N], base = step · values, and extra_j = sum_i (t − base)_i H_ij / H_jj, by which
    a code alone would move."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    index = tl.program_id(1).to(tl.int64)
    inside = row < rows
    values += index * values_b
    target += index * COUNT * rows
    coupling += index * coupling_b
    base += index * COUNT * rows
    extra += index * COUNT * rows
    found += index * CANDIDATES * COUNT * rows
    tried += index * (1 + CANDIDATES) * rows + row
    costs += index * CANDIDATES * rows + row
    best = tl.load(cost + index * rows + row, mask=inside, other=0.0)
    taken = tl.full([BR], -1, tl.int32)
    for number in range(0, CANDIDATES):
        one = tl.load(costs + number * rows, mask=inside, other=0.0)
        better = one < best
        best = tl.where(better, one, best)
        taken = tl.where(better, number, taken)
    wide = tl.load(tried + (1 + taken) * rows, mask=inside, other=1.0)
    tl.store(step + index * rows + row, wide, mask=inside)
    shift = tl.maximum(taken, 0) * COUNT * rows
    k = tl.arange(0, SIDE)
    slope = tl.zeros([SIDE, BR], tl.float32)
    for start in range(0, COUNT, PART):
        part = start + tl.arange(0, PART)
        at = part[:, None] * rows + row[None, :]
        mask = (part < COUNT)[:, None] & inside[None, :]
        new = mask & (taken >= 0)[None, :]
        old = mask & (taken < 0)[None, :]
        q = tl.load(found + at + shift[None, :], mask=new, other=0.0).to(tl.float32)
        q += tl.load(values + at, mask=old, other=0.0)
        rounded = q * wide[None, :]
        tl.store(base + at, rounded, mask=mask)
        error = tl.load(target + at, mask=mask, other=0.0) - rounded
        own = (k < COUNT)[:, None] & (part < COUNT)[None, :]
        left = tl.load(coupling + part[None, :] * COUNT + k[:, None], mask=own, other=0.0)
        slope = tl.dot(left, error, slope, input_precision="tf32x3")
    at = k[:, None] * rows + row[None, :]
    tl.store(extra + at, slope, mask=(k < COUNT)[:, None] & inside[None, :])


@triton.jit
def settle(
    weight, values, target, hessian, chosen, step, divisors, residual, change,
    rows, weight_b, hessian_b, step_b, COUNT: tl.constexpr,
    KIND: tl.constexpr, DTYPE: tl.constexpr, CHANGE: tl.constexpr,
    SIDE: tl.constexpr, PART: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The better of the chosen step and the least-squares one of the moved values, and with it
    the residual w − step · value, in place; `change` is what it changed by. `hessian` is H_gg;
    `weight`, `values` and `residual` have the same strides."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    index = tl.program_id(1).to(tl.int64)
    inside = row < rows
    weight += index * weight_b
    values += index * weight_b
    residual += index * weight_b
    target += index * COUNT * rows
    hessian += index * hessian_b
    change += index * COUNT * rows
    k = tl.arange(0, SIDE)
    product = tl.zeros([SIDE, BR], tl.float32)
    for start in range(0, COUNT, PART):
        part = start + tl.arange(0, PART)
        own = (k < COUNT)[:, None] & (part < COUNT)[None, :]
        left = tl.load(hessian + k[:, None] * COUNT + part[None, :], mask=own, other=0.0)
        right = _tile(values, part, row, rows, COUNT)  # exact in TF32
        product = tl.dot(left, right, product, input_precision="tf32")
    now = tl.load(chosen + index * rows + row, mask=inside, other=1.0)
    q = _tile(values, k, row, rows, COUNT)
    square = tl.sum(q * product, axis=0)
    missed = _tile(target, k, row, rows, COUNT) - q * now[None, :]
    slope = tl.sum(missed * product, axis=0)
    some = square > 0
    fitted = now + tl.where(some, slope / tl.where(some, square, 1.0), 0.0)
    divisor = tl.load(divisors + index) if KIND == 2 else 1.0
    best = stored(fitted, divisor, KIND, DTYPE)
    moved = now - best
    best = tl.where(moved * (2 * slope + moved * square) < 0, best, now)
    tl.store(step + index * step_b + row, best, mask=inside)
    rest = _tile(weight, k, row, rows, COUNT) - q * best[None, :]
    at = k[:, None] * rows + row[None, :]
    mask = (k < COUNT)[:, None] & inside[None, :]
    if CHANGE:
        tl.store(change + at, rest - _tile(residual, k, row, rows, COUNT), mask=mask)
    tl.store(residual + at, rest, mask=mask)


def refine(
    weight_BKN: torch.Tensor,
    values_BKN: torch.Tensor,
    step_BGN: torch.Tensor,
    zero_BGN: torch.Tensor | None,
    hessian_BKK: torch.Tensor,
    grid: Grid,
    sweeps: int,
    factors: tuple[float, ...],
) -> None:
    """quant/refine.py's, for groups of at most 128 columns. The pull is found for several groups
    at once, and corrected after each."""
    groups = step_BGN.shape[1]
    size = weight_BKN.shape[1] // groups
    at_once = max(1, FAR // size)
    state = _State.of(weight_BKN, values_BKN, step_BGN, zero_BGN, hessian_BKK, grid, factors)
    for _ in range(sweeps):
        for first in range(0, groups, at_once):
            last = min(first + at_once, groups)
            with tf32_products():
                pull = hessian_BKK[:, first * size : last * size] @ state.residual
            for group in range(first, last):
                mine, rest = pull[:, (group - first) * size :].split(
                    [size, (last - group - 1) * size], dim=1
                )
                change = state.improve(group, mine, changes=group + 1 < last)
                if change is not None:
                    rows = slice((group + 1) * size, last * size)
                    own = slice(group * size, (group + 1) * size)
                    with tf32_products():
                        rest.baddbmm_(hessian_BKK[:, rows, own], change)


@dataclass(slots=True)
class _State:
    """What is being refined, and what each group needs: its own Hessian, that one's inverse and
    factor, and H_ij / H_jj, by which codes are moved one by one."""

    weight: torch.Tensor
    values: torch.Tensor
    residual: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor | None
    own: torch.Tensor  # [B, G, g, g], as the next three
    inverse: torch.Tensor
    upper: torch.Tensor
    coupling: torch.Tensor
    order: torch.Tensor  # int32 [B, G, g]
    pivots: torch.Tensor  # [B, G, g]
    natural: torch.Tensor  # int32 [1, g]
    factors: torch.Tensor
    divisors: torch.Tensor
    grid: Grid

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        values: torch.Tensor,
        step: torch.Tensor,
        zero: torch.Tensor | None,
        hessian: torch.Tensor,
        grid: Grid,
        factors: tuple[float, ...],
    ) -> _State:
        batch, groups, _ = step.shape
        size = weight.shape[1] // groups
        shape = (batch, groups, size, size)
        own = torch.empty(shape, device=weight.device)
        for group in range(groups):
            at = slice(group * size, (group + 1) * size)
            own[:, group] = hessian[:, at, at]
        factor, inverse = factor_with_inverse(own.view(-1, size, size))
        return cls(
            weight=weight,
            values=values,
            residual=torch.addcmul(
                weight.unflatten(1, (groups, size)),
                values.unflatten(1, (groups, size)),
                step.unsqueeze(2),
                value=-1,
            ).flatten(1, 2),
            step=step,
            zero=zero,
            own=own,
            inverse=inverse.view(shape),
            upper=factor.upper_BKK.view(shape),
            coupling=own / own.diagonal(dim1=2, dim2=3).unsqueeze(2),
            order=factor.order_BK.to(torch.int32).view(shape[:3]),
            pivots=factor.pivots_BK.view(shape[:3]),
            natural=torch.arange(size, dtype=torch.int32, device=weight.device)[None].expand(
                batch, -1
            ),
            factors=torch.tensor(factors, device=weight.device),
            divisors=step if grid.global_scale_B is None else grid.global_scale_B.contiguous(),
            grid=grid,
        )

    def improve(self, group: int, pull: torch.Tensor, *, changes: bool) -> torch.Tensor | None:
        """Codes and step of one group, given its pull [B, g, N]; by what the residual changed."""
        batch, size, rows = pull.shape
        tries = len(self.factors)
        at = slice(group * size, (group + 1) * size)
        values, step = self.values[:, at], self.step[:, group]
        zero = None if self.zero is None else self.zero[:, group]
        where = (triton.cdiv(rows, ROWS), batch)
        side = max(16, triton.next_power_of_2(size))
        sizes = {"COUNT": size, "SIDE": side, "PART": min(PART, side), "BR": ROWS, "num_warps": 8}
        kinds = {"KIND": kind_of(self.grid), "DTYPE": STORED[self.grid.scale_dtype]}
        inverse, coupling, own = (
            part[:, group] for part in (self.inverse, self.coupling, self.own)
        )
        target = pull.new_empty(batch, size, rows)
        tried = pull.new_empty(batch, 1 + tries, rows)
        cost, costs = pull.new_empty(batch, rows), pull.new_zeros(batch, tries, rows)
        aim[where](
            values, pull, inverse, step, self.divisors, self.factors, target, tried, cost,
            rows, values.stride(0), pull.stride(0), inverse.stride(0), step.stride(0),
            CANDIDATES=tries, **kinds, **sizes,
        )  # fmt: skip
        found = torch.empty(batch, tries, size, rows, dtype=torch.float16, device=pull.device)
        errors = pull.new_empty(batch, tries, size, rows)
        columns.launch(
            target, None, tried[:, 1:], zero, self.order[:, group], self.upper[:, group],
            self.grid, size=None, pivots=self.pivots[:, group], cost=costs,
            values=found, errors=errors,
        )  # fmt: skip
        base, extra, chosen = (torch.empty_like(part) for part in (target, target, cost))
        choose[where](
            values, found, target, tried, cost, costs, coupling, base, extra, chosen,
            rows, values.stride(0), coupling.stride(0), CANDIDATES=tries, **sizes,
        )  # fmt: skip
        errors = errors.view(-1)[: base.numel()].view(base.shape)
        columns.launch(
            base, extra, chosen, zero, self.natural, coupling, self.grid, size=None,
            values=values.unsqueeze(1), errors=errors.unsqueeze(1),
        )  # fmt: skip
        settle[where](
            self.weight[:, at], values, target, own, chosen, step, self.divisors,
            self.residual[:, at], errors, rows, self.weight.stride(0), own.stride(0),
            step.stride(0), CHANGE=changes, **kinds, **sizes,
        )  # fmt: skip
        return errors if changes else None
