"""What lies between and behind the two grouped GEMMs of a MoE layer, each in one pass.

    gated_silu   [P, 2F] -> silu(gate) * up [P, F]
    combine      y_t = sum_k w_tk o_tk [T, D], and with it |o_tk|_2 of every routed row [P]

Both are bound by memory: torch's operations read and write the pairs' rows four times for the
first and, with REAP's norms in float64, five times for the second. Roundings are those of
transformers' operations in the same types (silu is rounded before it is multiplied, a product of
two bfloat16 values before it is added), the first gives torch's very bits; sums over a token's
choices are in float32 and may differ in the order of additions. No atomics: the same inputs give
the same bits.

Legend: T tokens, K top_k, P = T * K pairs, D hidden, F intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

COLUMNS = 1024  # of a row that a program holds at once


@triton.jit
def _gated_silu(up, out, width, COLUMNS: tl.constexpr, AS_TORCH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(up + row * 2 * width + column, mask=inside, other=0.0)
    value = tl.load(up + row * 2 * width + width + column, mask=inside, other=0.0)
    x = gate.to(tl.float32)
    # CUDA's expf and an exact division, as in torch; the interpreter knows only Triton's own
    decayed = libdevice.exp(-x) if AS_TORCH else tl.exp(-x)
    activated = tl.div_rn(x, 1.0 + decayed).to(gate.dtype)
    product = activated.to(tl.float32) * value.to(tl.float32)
    tl.store(out + row * width + column, product.to(gate.dtype), mask=inside)


def gated_silu(up_PF: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row times the second: [P, 2F] -> [P, F], contiguous."""
    rows, double = up_PF.shape
    width = double // 2
    out = up_PF.new_empty(rows, width)
    if rows:
        _gated_silu[(rows, triton.cdiv(width, COLUMNS))](
            up_PF, out, width, COLUMNS=COLUMNS, AS_TORCH=up_PF.is_cuda
        )
    return out


@triton.jit
def _combine(
    outputs,
    weights,
    place,
    total,
    norms,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    chosen = choice < TOP_K
    row = tl.load(place + token * TOP_K + choice, mask=chosen, other=0).to(tl.int64)
    weight = tl.load(weights + token * TOP_K + choice, mask=chosen, other=0.0)
    square = tl.zeros((CHOICES,), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        both = chosen[:, None] & inside[None, :]
        stored = tl.load(outputs + row[:, None] * WIDTH + column[None, :], mask=both, other=0.0)
        x = stored.to(tl.float32)
        if NORMS:
            square += tl.sum(x * x, 1)
        product = x * weight.to(tl.float32)[:, None]
        if weight.dtype == stored.dtype:
            product = product.to(stored.dtype).to(tl.float32)
        summed = tl.sum(product, 0).to(stored.dtype)
        tl.store(total + token * WIDTH + column, summed, mask=inside)
    if NORMS:
        tl.store(norms + row, tl.sqrt(square), mask=chosen)


def combine(
    outputs_PD: torch.Tensor,
    weights_TK: torch.Tensor,
    place_P: torch.Tensor,
    *,
    norms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted sums [T, D] in the outputs' type, and the norms float32 [P] where asked for.

    Row `place_P[t * K + k]` of `outputs_PD` is what token t's choice k gave.
    """
    tokens, top_k = weights_TK.shape
    width = outputs_PD.shape[1]
    total = outputs_PD.new_empty(tokens, width)
    norms_P = torch.empty(len(outputs_PD) if norms else 0, device=total.device)
    if tokens:
        _combine[(tokens,)](
            outputs_PD,
            weights_TK.contiguous(),
            place_P,
            total,
            norms_P,
            WIDTH=width,
            TOP_K=top_k,
            CHOICES=triton.next_power_of_2(top_k),
            COLUMNS=COLUMNS,
            NORMS=norms,
            num_warps=8,
        )
    return total, norms_P if norms else None
