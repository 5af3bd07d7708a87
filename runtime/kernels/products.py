"""The product with packed weights in Triton: BT tokens of one expert times BN rows of its matrix.

    y[n, t] = Σ_k w[n, k] · x[t, k]        w = bfloat16(value · scale), sums in float32

One kernel for every format and number of tokens. A weight is rounded as in the decoded model, so
that what is computed differs from it in nothing but the order of sums. Weights are decoded in
registers (runtime/kernels/decoding.py) into exactly the places where the tensor cores' instruction
wants its first operand: nothing passes through shared memory, and two weights cost about four
instructions; runtime/kernels/order.py has the order of bits that makes this possible.

WARPS 1: m16n8k16, weights as the 16 rows, tokens as the 8 columns. A program asks for the next
words of its rows before it works on these, so that enough are on their way to keep the memory busy
(FENCE: the compiler would move those loads behind the arithmetic that should hide them). Inputs
come from the first cache, which the weights are kept out of.

WARPS 4: the warpgroup's instruction, 64 rows of weights, inputs from shared memory, where their
columns stand as `turned` (triton_kernel.py) leaves them. Words and inputs of the next steps are
copied ahead by Triton's own pipeline (num_stages).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.decoding import (
    FP8,
    INT4,
    NVFP4,
    decoded,
    far,
    group_scale,
    halves,
    linear_decoded,
    linear_factors,
    row_scale,
    scaled,
)


@triton.jit
def laid_out(words, ROWS: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, 16] words of two bfloat16 -> [ROWS, 32], in the order of two instructions.

    A lane's eight columns in sequence are four of each instruction's sixteen.
    """
    split = tl.reshape(halves(words, DOT), (ROWS, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 3, 1, 2, 4)), (ROWS, 32))


@triton.jit
def laid_out_wide(words, ROWS: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, 16] words of two bfloat16 -> [ROWS, 32] as a warpgroup's instruction has them.

    A lane's four words belong to four groups of eight columns.
    """
    split = tl.reshape(halves(words, DOT), (ROWS, 4, 4, 2))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3)), (ROWS, 32))


@triton.jit
def span_words(words, PLANES: tl.constexpr):
    """The words of a span, read once: past the first cache, where the inputs are to stay."""
    n0 = tl.load(words, cache_modifier=".cg")
    n1 = tl.load(words + 16, cache_modifier=".cg") if PLANES > 1 else n0
    n2 = tl.load(words + 32, cache_modifier=".cg") if PLANES > 2 else n0
    n3 = tl.load(words + 48, cache_modifier=".cg") if PLANES > 3 else n0
    return n0, n1, n2, n3


@triton.jit
def step_inputs(inputs, column):
    """128 columns of the tokens, 32 at a time, as words of two."""
    at = inputs + column // 2
    return tl.load(at), tl.load(at + 16), tl.load(at + 32), tl.load(at + 48)


@triton.jit
def in_place(value, BN: tl.constexpr, WARPS: tl.constexpr):
    """Rows as lanes and warps loaded them -> as the instruction's operand has them: no move."""
    split = tl.reshape(value, (BN // (16 * WARPS), 2, WARPS, 8, 32))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3, 4)), (BN, 32))


# every number of tokens would otherwise be compiled as 1, a multiple of 16, or neither
@triton.jit(do_not_specialize=["rows", "top_k"])
def packed_rows(
    x, codes, scale, global_scale, out,
    slots, block_expert,
    rows, N, top_k, ones, code_mask, code_mask_high,
    K: tl.constexpr, PART: tl.constexpr, FORMAT: tl.constexpr, SIZE: tl.constexpr,
    ROW_BLOCK: tl.constexpr, PLAN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, SPAN: tl.constexpr,
    LINEAR: tl.constexpr, WARPS: tl.constexpr, FENCE: tl.constexpr, AHEAD: tl.constexpr = False,
):  # fmt: skip
    """BT tokens (8 and more) of one expert times BN rows.

    PLAN 0: one matrix, rows of x in order. 1: block m is routed pair m alone, `block_expert` the
    ids. 2: blocks as runtime/kernels/routed.py makes them.
    DOT is bfloat16; float32 for Triton's interpreter, which multiplies bfloat16 as integers.
    """
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1)
    slot = tl.arange(0, BT)
    expert = 0
    # tokens and rows beyond the last are others once more: loads need no mask, stores have one
    if PLAN == 0:
        valid = m * BT + slot < rows
        pair = tl.minimum(m * BT + slot, rows - 1)
    elif PLAN == 1:
        expert = tl.load(block_expert + m).to(tl.int32)
        valid = slot < 1
        pair = m + slot * 0
    else:
        any_pair = tl.load(slots + m * BT)
        if any_pair >= rows:
            return
        expert = tl.load(block_expert + m)
        pair = tl.load(slots + m * BT + slot)
        valid = pair < rows
        pair = tl.where(valid, pair, any_pair)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(row, N - 1)
    matrix_row = (expert * N + row).to(tl.int64)
    BITS: tl.constexpr = 4 if FORMAT == NVFP4 else FORMAT
    PLANES: tl.constexpr = SPAN * BITS // 512
    GROUP: tl.constexpr = WARPS > 1
    WIDE: tl.constexpr = FORMAT == NVFP4 or scale.dtype.element_ty != tl.bfloat16
    words = codes + matrix_row[:, None] * (K * BITS // 32)
    words += tl.arange(0, 16)[None, :]
    if GROUP:
        tiles = x + (pair // top_k).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    else:
        inputs = x + (pair // top_k).to(tl.int64)[:, None] * (K // 2)
        inputs += tl.arange(0, 16)[None, :]
    if FORMAT == NVFP4:
        j = tl.arange(0, 4)[None, :]
        scales = scale + matrix_row[:, None] * (K // 64) + j * 0
        by = 1.0 / tl.load(global_scale + expert * (N // PART) + row // PART)[:, None]
        if LINEAR:
            by *= 1.9807040628566084e28  # 2^94
        s0, s1 = tl.load(scales), tl.load(scales + 1)
    else:
        if FORMAT == FP8 and ROW_BLOCK > 1:
            per = (PART + ROW_BLOCK - 1) // ROW_BLOCK
            scale_row = expert * (N // PART) * per + row // PART * per + row % PART // ROW_BLOCK
        else:
            scale_row = matrix_row
        scales = scale + scale_row.to(tl.int64) * (K // SIZE)
        s0 = row_scale(scales, 0, SIZE, WIDE)
    total = tl.zeros((BN, BT), tl.float32)
    if not GROUP:
        n0, n1, n2, n3 = span_words(words, PLANES)
    for span in range(K // SPAN):
        if not GROUP:
            w0, w1, w2, w3 = n0, n1, n2, n3
            words += tl.where((span + 1) * SPAN < K, PLANES * 16, 0)
            n0, n1, n2, n3 = span_words(words, PLANES)
        else:
            w0, w1, w2, w3 = span_words(words + span * PLANES * 16, PLANES)
        if not GROUP:
            i0, i1, i2, i3 = step_inputs(inputs, span * SPAN)
        if FENCE:
            tl.debug_barrier()
        for step in tl.static_range(SPAN // 128):
            # what the next 128 columns need, the first once more after the last
            column = span * SPAN + step * 128
            after = tl.where(column + 128 < K, column + 128, 0)
            if GROUP:
                x_TK = tl.load(tiles + column)
            else:
                x0, x1, x2, x3 = i0, i1, i2, i3
            if not GROUP and step * 128 + 128 < SPAN:
                i0, i1, i2, i3 = step_inputs(inputs, column + 128)
            s = s0
            if FORMAT == NVFP4:
                s_high = s1
                s0, s1 = tl.load(scales + after // 64), tl.load(scales + after // 64 + 1)
            else:
                s0 = row_scale(scales, after, SIZE, WIDE)
            for t in tl.static_range(4):
                if FORMAT == NVFP4:
                    four = s if t < 2 else s_high
                    factor = group_scale(four, j // 2 * 8 + t % 2 * 16, by, BN)
                elif t * 32 % SIZE == 0 and t > 0:
                    factor = row_scale(scales, column + t * 32, SIZE, WIDE)
                elif t == 0:
                    factor = s
                if LINEAR and FORMAT <= INT4:
                    if t * 32 % SIZE == 0:
                        low_by, high_by, offset = linear_factors(factor, FORMAT, DOT)
                    value = linear_decoded(
                        w0, w1, w2, w3, low_by, high_by, offset, 4 * step + t, FORMAT, DOT
                    )
                else:
                    value = decoded(
                        w0, w1, w2, w3, ones, code_mask, code_mask_high, 4 * step + t, FORMAT,
                        LINEAR, DOT,
                    )  # fmt: skip
                    if LINEAR and FORMAT == FP8 and t * 32 % SIZE == 0:
                        factor = far(factor, WIDE, DOT)
                    value = scaled(value, factor, WIDE, DOT)
                if GROUP:
                    weight = in_place(laid_out_wide(value, BN, DOT), BN, WARPS)
                    if t == 0:
                        v0 = weight
                    elif t == 1:
                        v1 = weight
                    elif t == 2:
                        v2 = weight
                else:
                    weight = laid_out(value, BN, DOT)
                    x_TK = x0 if t == 0 else (x1 if t == 1 else (x2 if t == 2 else x3))
                    total = tl.dot(weight, tl.trans(laid_out(x_TK, BT, DOT)), total)
            if GROUP:
                four_pairs = tl.join(tl.join(v0, v2), tl.join(v1, weight))  # [BN, 32, 2, 2]
                four_pairs = tl.reshape(tl.permute(four_pairs, (0, 2, 3, 1)), (BN, 128))
                total = tl.dot(four_pairs, tl.trans(x_TK.to(DOT)), total)
    if LINEAR:
        total *= 4294967296.0
    place = tl.arange(0, BN)
    if GROUP:
        place = (
            place // (16 * WARPS) * (16 * WARPS)
            + place // 8 % 2 * (8 * WARPS)
            + (place // 16 % WARPS * 8)
            + place % 8
        )
    row = tl.program_id(0) * BN + place
    at = out + pair.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < N)[:, None] & valid[None, :])
