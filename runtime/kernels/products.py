"""The product with packed weights in Triton: BT tokens of one expert times BN rows of its matrix.

    y[n, t] = Σ_g s[n, g] · Σ_{k in g} value[n, k] · x[t, k]

One kernel for every format and number of tokens. Weights are decoded in registers into exactly the
places where the tensor cores' instruction (m16n8k16, weights as the 16 rows, tokens as the 8
columns) wants its first operand, so that nothing passes through shared memory and a weight costs
about one instruction: runtime/kernels/order.py has the order of bits that makes this possible. A
word holds two codes side by side, in the low bits of two bfloat16 numbers; one logical operation
(three inputs) puts 128 above them, one fused multiply-add in bfloat16 makes the exact value:

    3, 4 bits   (word >> s) & 0x000f000f | 0x43004300 = 128 + code, less 128 + zero. Of 3 bits two
                codes fit in the seven of the mantissa: 128 + 8·code, times 1/8, less 16 + zero
    E2M1, E4M3  sign, exponent and mantissa to their places: the value times 2^-126 or 2^-120,
                multiplied back; E2M1 times its group's E4M3 scale is exact in bfloat16 too

Scales of integer and FP8 groups are applied to the float32 sums. Weights are thus used before
rounding to bfloat16; results differ from those of decoded weights by less than those do from
float32.

A program has one or two warps and asks for the next words of its rows before it works on these:
with a sixteenth of a multiprocessor's registers each, enough are on their way at any time to keep
the memory busy. Inputs come from the first cache; they are as large as the weights of 16 rows
only where there are three tokens to an expert.
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
    """pair · factor + offset of both bfloat16 numbers of words; results are exact by design.

    The interpreter (DOT float32) has no bfloat16 and no assembly.
    """
    if DOT == tl.bfloat16:  # noqa: SIM300 - the constant stands second
        made = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, factor, offset],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        lo = (pair << 16).to(tl.float32, bitcast=True) * (factor << 16).to(tl.float32, bitcast=True)
        lo = (lo + (offset << 16).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        high: tl.constexpr = -65536
        hi = (pair & high).to(tl.float32, bitcast=True)
        hi = hi * (factor & high).to(tl.float32, bitcast=True)
        hi = (hi + (offset & high).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        made = ((lo >> 16) & 0xFFFF) | (hi & high)
    return made


@triton.jit
def numbers(pair, factor, offset, DOT: tl.constexpr):
    """Words of two bfloat16 -> number · factor + offset, the two along a new last dimension."""
    pair = fused(pair, factor, offset, DOT)
    if DOT == tl.bfloat16:  # noqa: SIM300 - the constant stands second
        lo = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
        hi = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        lo = (pair << 16).to(tl.float32, bitcast=True)
        hi = (pair & -65536).to(tl.float32, bitcast=True)
    return tl.join(lo, hi)


@triton.jit
def twice(value: tl.constexpr):
    """A bfloat16 constant, given by its bits, in both halves of a word."""
    word: tl.constexpr = value * 65537 - (value >> 15) * (1 << 32)
    return tl.full((1, 1), word, tl.int32)


@triton.jit
def decoded(x0, x1, x2, x3, ones, mask, mask_high, s, p: tl.constexpr, FORMAT: tl.constexpr,
            DOT: tl.constexpr):  # fmt: skip
    """Pair p of all words of a span: [BN, 16, 2], columns 32p + 2·word + half."""
    if FORMAT == INT3:
        step: tl.constexpr = 3 * (p % 5)
        word = x0 if p < 5 else (x1 if p < 10 else x2)
        if p == 15:
            bits = ((x0 >> 15) & 0x00010001) | ones
            bits = ((x1 >> 14) & 0x00020002) | bits
            bits = ((x2 >> 13) & 0x00040004) | bits
            value = numbers(bits, twice(0x3F80), twice(0xC304), DOT)  # · 1 − 132
        elif step % 2 == 0:
            bits = ((word >> step) & mask) | ones
            value = numbers(bits, twice(0x3F80), twice(0xC304), DOT)
        else:
            bits = ((word >> (step - 3)) & mask_high) | ones
            value = numbers(bits, twice(0x3E00), twice(0xC1A0), DOT)  # / 8 − 20
    else:
        PAIRS: tl.constexpr = 2 if FORMAT == FP8 else 4
        q: tl.constexpr = p // PAIRS
        i: tl.constexpr = p % PAIRS
        word = x0 if q == 0 else (x1 if q == 1 else (x2 if q == 2 else x3))
        if FORMAT == INT4:
            bits = ((word >> (4 * i)) & mask) | ones
            value = numbers(bits, twice(0x3F80), twice(0xC308), DOT)  # · 1 − 136
        elif FORMAT == NVFP4:
            bits = ((word << (12 - 4 * i)) & -2147450880) | (
                ((word << 6) if i == 0 else ((word << 2) if i == 1 else (word >> (4 * i - 6))))
                & 0x01C001C0
            )
            value = numbers(bits, s, twice(0x8000), DOT)
        else:
            bits = ((word << (8 - 8 * i)) & -2147450880) | (
                ((word << 4) if i == 0 else (word >> 4)) & 0x07F007F0
            )
            value = numbers(bits, twice(0x7B80), twice(0x8000), DOT)  # · 2^120
    return value


@triton.jit
def laid_out(value, ROWS: tl.constexpr):
    """32 columns in two instructions' order: a lane's 8 in sequence are 4 of each one's 16."""
    split = tl.reshape(value, (ROWS, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 3, 1, 2, 4)), (ROWS, 32))


@triton.jit
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
    SPANS: tl.constexpr = K // SPAN
    words = codes + matrix_row[:, None] * (K * BITS // 32)
    words += tl.arange(0, 16)[None, :]
    inputs = x + (pair // top_k).to(tl.int64)[:, None] * K + tl.arange(0, 32)[None, :]
    TILES: tl.constexpr = SPAN // 32
    PER: tl.constexpr = TILES if SIZE == 0 or FORMAT == NVFP4 else SIZE // 32  # tiles a scale
    if FORMAT == FP8 and SIZE == 128:
        per = (PART + ROW_BLOCK - 1) // ROW_BLOCK
        scale_row = expert * (N // PART) * per + row // PART * per + row % PART // ROW_BLOCK
    else:
        scale_row = matrix_row
    if FORMAT == NVFP4:
        j = tl.arange(0, 4)[None, :]
        scales = scale + matrix_row[:, None] * (K // 64) + j * 0
    total = tl.zeros((BN, BT), tl.float32)
    n0 = tl.load(words)
    n1 = tl.load(words + 16) if PLANES > 1 else n0
    n2 = tl.load(words + 32) if PLANES > 2 else n0
    n3 = tl.load(words + 48) if PLANES > 3 else n0
    for span in range(SPANS):
        x0, x1, x2, x3 = n0, n1, n2, n3
        words += tl.where(span + 1 < SPANS, PLANES * 16, 0)
        n0 = tl.load(words)
        n1 = tl.load(words + 16) if PLANES > 1 else n0
        n2 = tl.load(words + 32) if PLANES > 2 else n0
        n3 = tl.load(words + 48) if PLANES > 3 else n0
        for g in tl.static_range(TILES // PER):
            part = total if PER == TILES and SIZE != SPAN else tl.zeros((BN, BT), tl.float32)
            for t in tl.static_range(PER):
                s = ones
                if FORMAT == NVFP4:
                    if t % 2 == 0:
                        four = tl.load(scales + span * (SPAN // 64) + (g * PER + t) // 2)
                    byte = (four >> (j // 2 * 8 + t % 2 * 16)) & 0xFF
                    # E4M3's bits as bfloat16: · 2^-120, here · 2^118 (2^8 are left to the end)
                    s = fused(byte * 0x00100010, twice(0x7F00), twice(0x8000), DOT)
                    s = fused(s, twice(0x7700), twice(0x8000), DOT)
                    s = tl.reshape(tl.broadcast_to(s[:, :, None], (BN, 4, 4)), (BN, 16))
                value = decoded(
                    x0, x1, x2, x3, ones, code_mask, code_mask_high, s, g * PER + t, FORMAT, DOT
                )
                x_TK = tl.load(inputs + span * SPAN + (g * PER + t) * 32)
                part = tl.dot(laid_out(value, BN), tl.trans(laid_out(x_TK.to(DOT), BT)), part)
            if PER == TILES and SIZE != SPAN:
                total = part
            else:
                group = (span * SPAN + g * PER * 32) // SIZE
                at = scale + scale_row.to(tl.int64) * (K // SIZE) + group
                total += part * tl.load(at).to(tl.float32)[:, None]
    if FORMAT == NVFP4:
        whole = tl.load(global_scale + expert * (N // PART) + row // PART)
        total *= (256.0 / whole)[:, None]
    elif SIZE == 0:
        total *= tl.load(scale + scale_row).to(tl.float32)[:, None]
    at = out + pair.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask[:, None] & valid[None, :])
