"""A block of columns rounded in order, one thread for each few rows of the weight.

Rows do not see each other and columns are rows in memory, so a thread keeps sixteen targets and
sixteen errors of its rows in registers and walks down the block; the factor's entries are the same
for all threads. What the block's earlier columns bring to the sixteen is a product of tensor cores
(TF32), left in the sixteen's own place among the errors until those are known.

    target_j = base_j + extra_j + sum_{i<j in block} error_i U_ij
    error_j  = base_j − step value_j,        cost += D_j (target_j − step value_j)²

`base` is the weight and `extra` what blocks before this one bring. The candidates of a refinement
are the same with several steps for one base; moving single codes is the same with
U_ij = H_ij / H_jj (quant/kernels/refinement.py).
"""

# Triton takes tuples that grow while a loop is unrolled
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.factor import Factor
from quant.grid import Grid
from quant.kernels.grid import kind_of, nearest
from quant.kernels.products import tf32_products

FAR = 512  # columns that the errors before them reach by one product
BLOCK = 128
SUB = 16
PRECISION = "tf32"
ROWS = 128  # of a program; four for each thread of its one warp


@triton.jit
def _within(column, COUNT: tl.constexpr, SUB: tl.constexpr):
    """The column, or the last one of a block that is not a multiple of SUB."""
    if COUNT % SUB == 0:
        return column
    else:
        return tl.minimum(column, COUNT - 1)


@triton.jit
def round_block(
    base, extra, step, zero, order, upper, pivots, values, errors, cost,
    rows, size, low, high,
    base_b, extra_b, step_b, zero_b, order_b, upper_b, pivots_b, values_b, values_c, errors_b,
    errors_c, upper_row,
    COUNT: tl.constexpr, EXTRA: tl.constexpr, COST: tl.constexpr, KIND: tl.constexpr,
    SAME: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`COUNT` columns of `rows` rows. Column j of the block is row order[j] of base and values,
    row j of extra and errors; its step is row order[j] // size + candidate (SAME: row 0 + candidate
    for all). x_b and x_c are the
    strides of a weight of the batch and of a candidate; errors and costs exist per candidate."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = row < rows
    candidate = tl.program_id(1)
    index = tl.program_id(2).to(tl.int64)
    base += index * base_b
    extra += index * extra_b
    step += index * step_b + candidate * rows
    zero += index * zero_b
    order += index * order_b
    upper += index * upper_b
    pivots += index * pivots_b
    values += index * values_b + candidate * values_c
    errors += index * errors_b + candidate * errors_c
    total = tl.zeros([BR], tl.float32)
    ahead = tl.arange(0, SUB)
    if SAME:
        wide = tl.load(step + row, mask=inside, other=1.0)
        reciprocal = 1.0 / wide
    for first in range(0, COUNT, SUB):
        if first > 0:
            brought = tl.zeros([SUB, BR], tl.float32)
            j = _within(first + ahead, COUNT, SUB)
            for block in range(0, first, SUB):
                i = block + ahead
                factors = tl.load(upper + i[None, :] * upper_row + j[:, None])
                past = tl.load(
                    errors + i[:, None] * rows + row[None, :], mask=inside[None, :], other=0.0
                )
                brought = tl.dot(factors, past, brought, input_precision=PRECISION)
            own = (first + ahead < COUNT)[:, None] & inside[None, :]
            tl.store(errors + (first + ahead)[:, None] * rows + row[None, :], brought, mask=own)
            tl.debug_barrier()
        target = ()
        for j in tl.static_range(SUB):
            column = _within(first + j, COUNT, SUB)
            channel = tl.load(order + column)
            here = tl.load(base + channel * rows + row, mask=inside, other=0.0)
            if EXTRA:
                here += tl.load(extra + column * rows + row, mask=inside, other=0.0)
            if first > 0:
                here += tl.load(errors + column * rows + row, mask=inside, other=0.0)
            target = target + (here,)  # noqa: RUF005
        done = ()
        for j in tl.static_range(SUB):
            column = _within(first + j, COUNT, SUB)
            channel = tl.load(order + column)
            wanted = target[j]
            for i in tl.static_range(j):
                above = _within(first + i, COUNT, SUB)
                wanted += done[i] * tl.load(upper + above * upper_row + column)
            at = (channel // size) * rows + row
            if not SAME:
                wide = tl.load(step + at, mask=inside, other=1.0)
                reciprocal = 1.0 / wide
            if KIND == 1:
                least = -tl.load(zero + at, mask=inside, other=0.0)
                value = nearest(wanted * reciprocal, least, least + high, KIND)
            else:
                value = nearest(wanted * reciprocal, low, high, KIND)
            rounded = value * wide
            kept = inside & (first + j < COUNT)
            error = tl.load(base + channel * rows + row, mask=inside, other=0.0) - rounded
            if COST:
                loss = (wanted - rounded) * (wanted - rounded) * tl.load(pivots + column)
                total += tl.where(kept, loss, 0.0)
            tl.store(values + channel * rows + row, value.to(values.dtype.element_ty), mask=kept)
            tl.store(errors + column * rows + row, error, mask=kept)
            done = done + (error,)  # noqa: RUF005
        tl.debug_barrier()
    if COST:
        at = cost + (index * tl.num_programs(1) + candidate) * rows + row
        tl.store(at, total + tl.load(at, mask=inside, other=0.0), mask=inside)


def rounded_in_order(
    weight_BKN: torch.Tensor,
    step_BGN: torch.Tensor,
    zero_BGN: torch.Tensor | None,
    factor: Factor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quant/columns.py's, for grids that kernels know."""
    batch, columns, rows = weight_BKN.shape
    order = factor.order_BK.to(torch.int32)
    upper = factor.upper_BKK
    values, errors = torch.empty_like(weight_BKN), torch.empty_like(weight_BKN)
    cost = weight_BKN.new_zeros(batch, rows)
    for far in range(0, columns, FAR):
        end = min(far + FAR, columns)
        extra = None
        if far:
            with tf32_products():
                extra = upper[:, :far, far:end].mT @ errors[:, :far]
        for start in range(far, end, BLOCK):
            stop = min(start + BLOCK, end)
            if extra is None:  # nothing comes before the first: zeros, not a kernel of its own
                mine = weight_BKN.new_zeros(batch, stop - start, rows)
            else:
                mine = extra[:, start - far : stop - far]
            if start > far:
                coupling, before = upper[:, far:start, start:stop].mT, errors[:, far:start]
                with tf32_products():
                    mine.baddbmm_(coupling, before)
            launch(
                weight_BKN,
                mine,
                step_BGN,
                zero_BGN,
                order[:, start:stop],
                upper[:, start:stop, start:stop],
                grid,
                size=columns // step_BGN.shape[1],
                pivots=factor.pivots_BK[:, start:stop],
                cost=cost,
                values=values.unsqueeze(1),
                errors=errors[:, start:stop].unsqueeze(1),
            )
    return values, cost


def launch(
    base: torch.Tensor,
    extra: torch.Tensor | None,
    step: torch.Tensor,
    zero: torch.Tensor | None,
    order: torch.Tensor,
    upper: torch.Tensor,
    grid: Grid,
    *,
    size: int | None,
    values: torch.Tensor,
    errors: torch.Tensor,
    pivots: torch.Tensor | None = None,
    cost: torch.Tensor | None = None,
) -> None:
    """One block. `values` and `errors` [B, candidates, columns, N] are written, `cost` [B,
    candidates, N] is added to; rows of everything are contiguous, N apart. `size` is that of the
    groups which have the steps, None where all columns are of one."""
    batch, rows, count = base.shape[0], base.shape[-1], order.shape[-1]
    levels = grid.levels
    low, high = (-(levels // 2), levels // 2 - 1) if zero is None else (0, levels - 1)
    where = (triton.cdiv(rows, ROWS), values.shape[1], batch)
    round_block[where](
        base, base if extra is None else extra, step, step if zero is None else zero,
        order, upper, upper if pivots is None else pivots, values, errors,
        values if cost is None else cost,
        rows, size or count, float(low), float(high),
        base.stride(0), 0 if extra is None else extra.stride(0), step.stride(0),
        0 if zero is None else zero.stride(0), order.stride(0), upper.stride(0),
        0 if pivots is None else pivots.stride(0),
        values.stride(0), values.stride(1), errors.stride(0), errors.stride(1), upper.stride(1),
        COUNT=count, EXTRA=extra is not None, COST=cost is not None, KIND=kind_of(grid),
        SAME=size is None, PRECISION=PRECISION, SUB=SUB, BR=ROWS, num_warps=1,
    )  # fmt: skip
