"""The product with packed weights in Triton: BT tokens of one expert times BN rows of its matrix.

    y[n, t] = Σ_k w[n, k] · x[t, k]        w = bfloat16(value · scale), sums in float32

One kernel for every format and number of tokens. A weight is rounded as in the decoded model, so
that what is computed differs from it in nothing but the order of sums. Weights are decoded in
registers into exactly the places where the tensor cores' instruction (m16n8k16, weights as the 16
rows, tokens as the 8 columns) wants its first operand: nothing passes through shared memory, and
two weights cost about four instructions; runtime/kernels/order.py has the order of bits that makes
this possible. A word holds two codes side by side, in the low bits of two bfloat16 numbers; one
logical operation (three inputs) puts 128 above them, one fused multiply-add in bfloat16 makes the
exact value, and one multiplication rounds its product with the scale:

    3, 4 bits   (word >> s) & 0x000f000f | 0x43004300 = 128 + code, less 128 + zero. Of 3 bits two
                codes fit in the seven of the mantissa: 128 + 8·code, times 1/8, less 16 + zero
    E2M1, E4M3  sign, exponent and mantissa to their places: the value times 2^-126 or 2^-120,
                multiplied back. Their scales are float32, so is the product with them

A program is one warp and asks for the next words of its rows before it works on these, so that
enough are on their way to keep the memory busy (docs/log.md: where the compiler moves those loads,
a third of the speed is gone). Inputs come from the first cache, which the weights are kept out of.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT3, INT4, NVFP4, FP8 = (tl.constexpr(value) for value in (3, 4, 16, 8))
ONES = 0x43004300  # two bfloat16 128
# masks of a code in the lowest bits of a half, and of the one above it (3 bits); with ONES they
# come as arguments: an instruction holds one constant, the compiler would make two of it
MASKS = {3: (0x00070007, 0x00380038), 4: (0x000F000F, 0), 16: (0, 0), 8: (0, 0)}


@triton.jit
def fused(pair, factor, offset, DOT: tl.constexpr):
    """pair · factor + offset of both bfloat16 numbers of words.

    The interpreter (DOT float32) has no bfloat16 and no assembly.
    """
    if DOT == tl.bfloat16:  # noqa: SIM300 - the constant stands second
        made = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, offset],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        made = rounded(
            low(pair) * low(factor) + low(offset), high(pair) * high(factor) + high(offset), DOT
        )
    return made


@triton.jit
def low(pair):
    """The lower bfloat16 of words as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    """The upper one."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(lo, hi, DOT: tl.constexpr):
    """Two float32 -> words of two bfloat16, to the nearest, ties to even."""
    if DOT == tl.bfloat16:  # noqa: SIM300
        made = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [lo, hi],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        bits = lo.to(tl.int32, bitcast=True)
        bits_high = hi.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits_high += 0x7FFF + ((bits_high >> 16) & 1)
        made = ((bits >> 16) & 0xFFFF) | (bits_high & -65536)
    return made


@triton.jit
def scaled(pair, scale, WIDE: tl.constexpr, DOT: tl.constexpr):
    """pair · scale rounded once; `scale` is float32 where WIDE, else words of a bfloat16 twice."""
    if WIDE:
        made = rounded(low(pair) * scale, high(pair) * scale, DOT)
    else:
        made = fused(pair, scale, twice(0x8000), DOT)
    return made


@triton.jit
def halves(pair, DOT: tl.constexpr):
    """Words of two bfloat16 -> the two, along a new last dimension."""
    if DOT == tl.bfloat16:  # noqa: SIM300
        lo = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
        hi = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        lo, hi = low(pair), high(pair)
    return tl.join(lo, hi)


@triton.jit
def twice(value: tl.constexpr):
    """A bfloat16 constant, given by its bits, in both halves of a word."""
    word: tl.constexpr = value * 65537 - (value >> 15) * (1 << 32)
    return tl.full((1, 1), word, tl.int32)


@triton.jit
def decoded(x0, x1, x2, x3, ones, mask, mask_high, p: tl.constexpr, FORMAT: tl.constexpr,
            DOT: tl.constexpr):  # fmt: skip
    """Pair p of all words of a span as two bfloat16: columns 32p + 2·word + half."""
    if FORMAT == INT3:
        step: tl.constexpr = 3 * (p % 5)
        word = x0 if p < 5 else (x1 if p < 10 else x2)
        if p == 15:
            bits = ((x0 >> 15) & 0x00010001) | ones
            bits = ((x1 >> 14) & 0x00020002) | bits
            bits = ((x2 >> 13) & 0x00040004) | bits
            value = fused(bits, twice(0x3F80), twice(0xC304), DOT)  # · 1 − 132
        elif step % 2 == 0:
            bits = ((word >> step) & mask) | ones
            value = fused(bits, twice(0x3F80), twice(0xC304), DOT)
        else:
            bits = ((word >> (step - 3)) & mask_high) | ones
            value = fused(bits, twice(0x3E00), twice(0xC1A0), DOT)  # / 8 − 20
    else:
        PAIRS: tl.constexpr = 2 if FORMAT == FP8 else 4
        q: tl.constexpr = p // PAIRS
        i: tl.constexpr = p % PAIRS
        word = x0 if q == 0 else (x1 if q == 1 else (x2 if q == 2 else x3))
        if FORMAT == INT4:
            bits = ((word >> (4 * i)) & mask) | ones
            value = fused(bits, twice(0x3F80), twice(0xC308), DOT)  # · 1 − 136
        elif FORMAT == NVFP4:
            bits = ((word << (12 - 4 * i)) & -2147450880) | (
                ((word << 6) if i == 0 else ((word << 2) if i == 1 else (word >> (4 * i - 6))))
                & 0x01C001C0
            )
            value = fused(bits, twice(0x7E80), twice(0x8000), DOT)  # · 2^126
        else:
            bits = ((word << (8 - 8 * i)) & -2147450880) | (
                ((word << 4) if i == 0 else (word >> 4)) & 0x07F007F0
            )
            value = fused(bits, twice(0x7B80), twice(0x8000), DOT)  # · 2^120
    return value


@triton.jit
def laid_out(words, ROWS: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, 16] words of two bfloat16 -> [ROWS, 32], in the order of two instructions.

    A lane's eight columns in sequence are four of each instruction's sixteen.
    """
    split = tl.reshape(halves(words, DOT), (ROWS, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 3, 1, 2, 4)), (ROWS, 32))


@triton.jit
def group_scale(four, shift, by, BN: tl.constexpr):
    """E4M3 scales, four to a word [BN, 4]: the one at `shift` times `by` for [BN, 16] words."""
    e4m3 = (((four >> shift) & 0xFF) << 20).to(tl.float32, bitcast=True)  # · 2^-120
    found = e4m3 * 1.329227995784916e36 * by
    return tl.reshape(tl.broadcast_to(found[:, :, None], (BN, 4, 4)), (BN, 16))


@triton.jit
def row_scale(scales, column, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Scales of the rows for the group of `column`, as `scaled` wants them, [BN, 1]."""
    found = tl.load(scales + column // SIZE)
    if WIDE:
        found = found.to(tl.float32)
    else:
        found = (found.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
    return found[:, None]


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


# every number of tokens would otherwise be compiled as 1, a multiple of 16, or neither
@triton.jit(do_not_specialize=["rows", "top_k"])
def packed_rows(
    x, codes, scale, global_scale, out,
    slots, block_expert,
    rows, N, top_k, ones, code_mask, code_mask_high,
    K: tl.constexpr, PART: tl.constexpr, FORMAT: tl.constexpr, SIZE: tl.constexpr,
    ROW_BLOCK: tl.constexpr, PLAN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """BT tokens (8 and more) of one expert times BN rows.

    PLAN 0: one matrix, rows of x in order. 1: block m is routed pair m alone, `block_expert` the
    ids. 2: blocks as runtime/kernels/routed.py makes them.
    DOT is bfloat16; float32 for Triton's interpreter, which multiplies bfloat16 as integers.
    """
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
    mask = row < N
    row = tl.minimum(row, N - 1)
    matrix_row = (expert * N + row).to(tl.int64)
    BITS: tl.constexpr = 4 if FORMAT == NVFP4 else FORMAT
    PLANES: tl.constexpr = SPAN * BITS // 512
    WIDE: tl.constexpr = FORMAT == NVFP4 or scale.dtype.element_ty != tl.bfloat16
    words = codes + matrix_row[:, None] * (K * BITS // 32)
    words += tl.arange(0, 16)[None, :]
    inputs = x + (pair // top_k).to(tl.int64)[:, None] * (K // 2) + tl.arange(0, 16)[None, :]
    if FORMAT == NVFP4:
        j = tl.arange(0, 4)[None, :]
        scales = scale + matrix_row[:, None] * (K // 64) + j * 0
        by = 1.0 / tl.load(global_scale + expert * (N // PART) + row // PART)[:, None]
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
    n0, n1, n2, n3 = span_words(words, PLANES)
    for span in range(K // SPAN):
        w0, w1, w2, w3 = n0, n1, n2, n3
        words += tl.where((span + 1) * SPAN < K, PLANES * 16, 0)
        n0, n1, n2, n3 = span_words(words, PLANES)
        i0, i1, i2, i3 = step_inputs(inputs, span * SPAN)
        for step in tl.static_range(SPAN // 128):
            # what the next 128 columns need, the first once more after the last
            column = span * SPAN + step * 128
            after = tl.where(column + 128 < K, column + 128, 0)
            x0, x1, x2, x3 = i0, i1, i2, i3
            if step * 128 + 128 < SPAN:
                i0, i1, i2, i3 = step_inputs(inputs, column + 128)
            s = s0
            if FORMAT == NVFP4:
                s_high = s1
                s0, s1 = tl.load(scales + after // 64), tl.load(scales + after // 64 + 1)
            else:
                s0 = row_scale(scales, after, SIZE, WIDE)
            for t in tl.static_range(4):
                value = decoded(
                    w0, w1, w2, w3, ones, code_mask, code_mask_high, 4 * step + t, FORMAT, DOT
                )
                if FORMAT == NVFP4:
                    four = s if t < 2 else s_high
                    factor = group_scale(four, j // 2 * 8 + t % 2 * 16, by, BN)
                elif t * 32 % SIZE == 0 and t > 0:
                    factor = row_scale(scales, column + t * 32, SIZE, WIDE)
                elif t == 0:
                    factor = s
                value = scaled(value, factor, WIDE, DOT)
                x_TK = x0 if t == 0 else (x1 if t == 1 else (x2 if t == 2 else x3))
                total = tl.dot(laid_out(value, BN, DOT), tl.trans(laid_out(x_TK, BT, DOT)), total)
    at = out + pair.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask[:, None] & valid[None, :])
