"""The scale search of quant/rounding.py: a group's weights are read once, all steps tried on them.

A program holds SIZE x BR weights, columns along the first axis, so that a sum over a group stays
mostly within a thread. Candidates, their order and what wins a tie are quant/rounding.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from quant.grid import Grid
from quant.kernels.grid import STORED, kind_of, nearest, stored
from quant.kernels.products import transposed

TILE = 4096  # weights of a program


@triton.jit
def search_steps(
    weight, importance, divisors, factors, step, zero,
    rows, columns, levels,
    CANDIDATES: tl.constexpr, ROUNDS: tl.constexpr,
    KIND: tl.constexpr, DTYPE: tl.constexpr, WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Weights [B, K, N] -> steps, and zero points, [B, G, N]; programs (rows, groups, B)."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    group = tl.program_id(1)
    index = tl.program_id(2).to(tl.int64)
    inside = row < rows
    k = group * SIZE + tl.arange(0, SIZE)
    weight += index * columns * rows
    w = tl.load(weight + k[:, None] * rows + row[None, :], mask=inside[None, :], other=0.0)
    h = tl.full([SIZE], 1.0, tl.float32)
    if WEIGHTED:
        h = tl.load(importance + index * columns + k)
    divisor = tl.load(divisors + index) if KIND == 2 else 1.0
    half = levels // 2 + 0.0
    top = levels - 1.0
    low = tl.min(w, axis=0)
    high = tl.max(w, axis=0)
    amax = tl.maximum(-low, high)
    best = tl.full([BR], float("inf"), tl.float32)
    step_best = tl.full([BR], 1.0, tl.float32)
    zero_best = tl.zeros([BR], tl.float32)
    if KIND == 2:
        plain = amax / 6.0
    elif KIND == 0:
        plain = tl.where(high > -low, -amax / half, amax / half)
    else:
        plain = amax / half
    for number in range(0, CANDIDATES):
        factor = tl.load(factors + number)
        if KIND == 1:
            below = tl.minimum(low, 0.0)
            above = tl.maximum(high, 0.0)
            s = stored((above - below) * (factor / top), divisor, KIND, DTYPE)
            at = (-below * factor / s + 12582912.0) - 12582912.0
            at = tl.minimum(tl.maximum(at, 0.0), top)
            best, step_best, zero_best = _offer(
                w, h, amax, s, at, best, step_best, zero_best, divisor, half, top, KIND, DTYPE
            )
            for middle in tl.static_range(2):
                best, step_best, zero_best = _offer(
                    w, h, amax, plain * factor, tl.zeros([BR], tl.float32) + (half - middle),
                    best, step_best, zero_best, divisor, half, top, KIND, DTYPE,
                )  # fmt: skip
        else:
            for sign in tl.static_range(2 if KIND == 0 else 1):
                best, step_best, zero_best = _offer(
                    w, h, amax, plain * (factor if sign == 0 else -factor), zero_best,
                    best, step_best, zero_best, divisor, half, top, KIND, DTYPE,
                )  # fmt: skip
    for _ in range(0, ROUNDS):
        values = _values(w, step_best, zero_best, half, top, KIND)
        weighted = values * h[:, None]
        norm = tl.sum(weighted * values, axis=0)
        fitted = tl.sum(weighted * w, axis=0) / tl.where(norm > 0, norm, 1.0)
        best, step_best, zero_best = _offer(
            w, h, amax, tl.where(norm > 0, fitted, step_best), zero_best,
            best, step_best, zero_best, divisor, half, top, KIND, DTYPE,
        )  # fmt: skip
    at = (index * tl.num_programs(1) + group) * rows + row
    tl.store(step + at, step_best, mask=inside)
    if KIND == 1:
        tl.store(zero + at, zero_best, mask=inside)


@triton.jit
def _values(w, step, zero, half, top, KIND: tl.constexpr):
    reciprocal = 1.0 / step
    x = w * reciprocal[None, :]
    if KIND == 1:
        return nearest(x, -zero[None, :], (top - zero)[None, :], KIND)
    else:
        return nearest(x, -half, half - 1.0, KIND)


@triton.jit
def _offer(
    w, h, amax, step, zero, best, step_best, zero_best, divisor, half, top,
    KIND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Take `step` where it errs less. A group of zeros keeps the step 1, stored as it can."""
    step = stored(tl.where(amax > 0, step, 1.0), divisor, KIND, DTYPE)
    miss = w - _values(w, step, zero, half, top, KIND) * step[None, :]
    error = tl.sum(miss * miss * h[:, None], axis=0)
    better = error < best
    return (
        tl.where(better, error, best),
        tl.where(better, step, step_best),
        tl.where(better, zero, zero_best),
    )


def searched_steps(
    weight_BNK: torch.Tensor,
    grid: Grid,
    importance_BK: torch.Tensor | None,
    factors: Sequence[float],
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """quant/rounding.py's, for groups of its KERNEL_GROUPS: candidate `factors` of the plain step,
    then `rounds` of least squares."""
    batch, rows, columns = weight_BNK.shape
    size = grid.scheme.group_size
    assert size is not None
    weight_BKN = transposed(weight_BNK)
    step = weight_BKN.new_empty(batch, columns // size, rows)
    zero = None if grid.scheme.symmetric else torch.empty_like(step)
    search_steps[triton.cdiv(rows, TILE // size), columns // size, batch](
        weight_BKN, step if importance_BK is None else importance_BK.contiguous(),
        step if grid.global_scale_B is None else grid.global_scale_B.contiguous(),
        torch.tensor(factors, device=step.device), step, step if zero is None else zero,
        rows, columns, grid.levels, CANDIDATES=len(factors), ROUNDS=rounds,
        KIND=kind_of(grid), DTYPE=STORED[grid.scale_dtype], WEIGHTED=importance_BK is not None,
        SIZE=size, BR=TILE // size, num_warps=1,
    )  # fmt: skip
    return step.mT, None if zero is None else zero.mT
