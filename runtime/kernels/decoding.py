"""Codes -> pairs of bfloat16 weights in registers, rounded as in the decoded model.

A word holds two codes side by side, in the low bits of two bfloat16 numbers (order.py). Two ways:

    plain    one logical operation puts 128 above the codes, one multiply-add in bfloat16 makes the
             exact values, one multiplication rounds their products with the scale
    linear   codes are taken where they stand, as bfloat16 numbers far below 1 (code · 2^-133), and
             one multiply-add, c · (s · 2^101) − zero · s · 2^-32, rounds the weights once: 2^-32 of
             them, and the sums are multiplied by 2^32 at the end. NVFP4 and FP8 save the
             multiplication by which plain decoding brings values up. Half the arithmetic, fewer
             registers, the same weights bit for bit while nothing leaves bfloat16's range
             (`is_linear` looks at the scales)

    3, 4 bits   (word >> s) & 0x000f000f | 0x43004300 = 128 + code, less 128 + zero. Of 3 bits two
                codes fit in the seven of the mantissa: 128 + 8·code, times 1/8, less 16 + zero
    E2M1, E4M3  sign, exponent and mantissa to their places: the value times 2^-126 or 2^-120,
                multiplied back. Their scales are float32, so is the product with them
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.packed import PackedWeights

INT3, INT4, NVFP4, FP8 = (tl.constexpr(value) for value in (3, 4, 16, 8))
ONES = 0x43004300  # two bfloat16 128
# masks of a code in the lowest bits of a half, and of the one above it (3 bits); with ONES they
# come as arguments: an instruction holds one constant, the compiler would make two of it
MASKS = {3: (0x00070007, 0x00380038), 4: (0x000F000F, 0), 16: (0, 0), 8: (0, 0)}
SMALLEST, LARGEST = 2.0**-80, 2.0**20  # scales between which linear decoding is exact


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
            LINEAR: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
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
            value = bits if LINEAR else fused(bits, twice(0x7E80), twice(0x8000), DOT)  # · 2^126
        else:
            bits = ((word << (8 - 8 * i)) & -2147450880) | (
                ((word << 4) if i == 0 else (word >> 4)) & 0x07F007F0
            )
            value = bits if LINEAR else fused(bits, twice(0x7B80), twice(0x8000), DOT)  # · 2^120
    return value


@triton.jit
def far(scale, WIDE: tl.constexpr, DOT: tl.constexpr):
    """A scale of FP8 times 2^88, for codes that are 2^-120 of their value."""
    return (
        scale * 3.0948500982134507e26 if WIDE else fused(scale, twice(0x6B80), twice(0x8000), DOT)
    )


@triton.jit
def linear_factors(scale, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Words of a scale twice -> what codes in the lowest bits and in those above are multiplied by,
    and what is added."""
    low_by = fused(scale, twice(0x7200), twice(0x8000), DOT)  # · 2^(133 - 32)
    if FORMAT == INT3:
        high_by = fused(scale, twice(0x7080), twice(0x8000), DOT)
        offset = fused(scale, twice(0xB080), twice(0x8000), DOT)  # · −4 · 2^-32
    else:
        high_by = fused(scale, twice(0x7000), twice(0x8000), DOT)
        offset = fused(scale, twice(0xB100), twice(0x8000), DOT)  # · −8 · 2^-32
    return low_by, high_by, offset


@triton.jit
def linear_decoded(x0, x1, x2, x3, by, by_high, offset, p: tl.constexpr, FORMAT: tl.constexpr,
                   DOT: tl.constexpr):  # fmt: skip
    """The weights of pair p times 2^-32, by one multiply-add of bits where they stand."""
    if FORMAT == INT3:
        plane: tl.constexpr = p // 5
        place: tl.constexpr = p % 5
        if p == 15:
            bits = ((x0 >> 12) & 0x00080008) | ((x1 >> 11) & 0x00100010)
            bits = ((x2 >> 10) & 0x00200020) | bits
            factor = by_high
        elif place < 4:
            word = x0 if plane == 0 else (x1 if plane == 1 else x2)
            if place >= 2:
                word = word >> 6
            bits = (word & 0x00070007) if place % 2 == 0 else (word & 0x00380038)
            factor = by if place % 2 == 0 else by_high
        elif plane == 0:
            bits = (x0 >> 12) & 0x00070007
            factor = by
        elif plane == 1:
            bits = (x1 >> 11) & 0x000E000E
            factor = fused(by, twice(0x3F00), twice(0x8000), DOT)
        else:
            bits = (x2 >> 10) & 0x001C001C
            factor = fused(by, twice(0x3E80), twice(0x8000), DOT)
    else:
        q: tl.constexpr = p // 4
        word = x0 if q == 0 else (x1 if q == 1 else (x2 if q == 2 else x3))
        if p % 4 >= 2:
            word = word >> 8
        bits = (word & 0x000F000F) if p % 2 == 0 else (word & 0x00F000F0)
        factor = by if p % 2 == 0 else by_high
    return fused(bits, factor, offset, DOT)


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


def is_linear(weights: PackedWeights) -> bool:
    """Whether weights may be decoded the linear way. Asks the host, once a PackedWeights."""
    kind, scale = weights.storage.kind, weights.scale
    if kind == "int" and scale.dtype != torch.bfloat16:
        return False
    if kind == "nvfp4":  # E4M3 scales of groups are never out of range
        scale = weights.global_scale.reciprocal()
    ends = []
    for some in scale.split(8):  # experts; all of them at once could be half a gigabyte
        sizes = some.float().abs()
        ends += [torch.where(sizes > 0, sizes, 1.0).amin(), sizes.amax()]
    sizes = torch.stack(ends)
    return bool((sizes[::2] > SMALLEST).all() & (sizes[1::2] < LARGEST).all())
