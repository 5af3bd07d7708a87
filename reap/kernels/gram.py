"""Inner products of what a token's experts gave, for all tokens in one pass.

    G_t[k, l] = w_tk w_tl <o_tk, o_tl>      o bfloat16 or float16, products and sums float32

torch gathers the rows, widens them, weights them and multiplies: each pair's row is moved seven
times. Here it is read once. No atomics: the same inputs give the same bits.

Legend: T tokens, K top_k, P = T * K pairs, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 256  # of the rows that a program holds at once
NARROWEST = 16  # rows of a product of matrices


@triton.jit
def _weighted_products(
    outputs,
    order,
    weights,
    products,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    chosen = choice < TOP_K
    row = tl.load(order + token * TOP_K + choice, mask=chosen, other=0).to(tl.int64)
    weight = tl.load(weights + token * TOP_K + choice, mask=chosen, other=0.0).to(tl.float32)
    total = tl.zeros((CHOICES, CHOICES), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        both = chosen[:, None] & (column < WIDTH)[None, :]
        x = tl.load(outputs + row[:, None] * WIDTH + column[None, :], mask=both, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        total = tl.dot(x, tl.trans(x), total)
    total = total * weight[:, None] * weight[None, :]
    place = products + token * TOP_K * TOP_K + choice[:, None] * TOP_K + choice[None, :]
    tl.store(place, total, mask=chosen[:, None] & chosen[None, :])


def weighted_products(
    outputs_PD: torch.Tensor, order_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """float32 [T, K, K]; row `order_TK[t, k]` of `outputs_PD` is what token t's choice k gave."""
    tokens, top_k = order_TK.shape
    products = torch.empty((tokens, top_k, top_k), device=outputs_PD.device)
    if tokens:
        _weighted_products[(tokens,)](
            outputs_PD.contiguous(),
            order_TK.contiguous(),
            weights_TK.contiguous(),
            products,
            WIDTH=outputs_PD.shape[1],
            TOP_K=top_k,
            CHOICES=max(NARROWEST, triton.next_power_of_2(top_k)),
            COLUMNS=COLUMNS,
            WIDEN=not outputs_PD.is_cuda,  # the interpreter multiplies bfloat16 as integers
        )
    return products
