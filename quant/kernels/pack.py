"""From codes or weights to stored bytes, each weight read once.

    pack_codes    b-bit codes, 32 of them as b words, least significant bits first; NVFP4's nibbles
                  are the case of four bits
    nvfp4         weights and the scales of their blocks of 16 -> nibbles
    fp8_blocks    weights -> E4M3 codes and float32 scales of blocks of 128 x 128

Divisions are those of IEEE: the bytes are the ones that quant/rounding.py and quant/format.py
give on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds, ties to even
GROUPS = 128  # of 32 codes in a program


@triton.jit
def divided(x, by, inverse):
    """x / by as IEEE rounds it, `inverse` being 1 / by rounded: three instructions instead of a
    dozen where many x are divided by one number."""
    ratio = x * inverse
    return tl.fma(tl.fma(-ratio, by, x), inverse, ratio)


@triton.jit
def pack_codes_kernel(
    codes_ptr,  # one byte each, [rows, columns]
    words_ptr,  # int32 [rows, words]
    rows,
    columns,
    words,
    offset,  # added to a code first: 2^(b-1) where codes are signed
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    across = (columns + 31) // 32
    group_G = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    row_G, at_G = group_G // across, group_G % across
    index = tl.arange(0, 32)
    column = at_G[:, None] * 32 + index[None, :]
    there = (row_G < rows)[:, None] & (column < columns)
    code = tl.load(codes_ptr + row_G[:, None] * columns + column, mask=there, other=0)
    code = (code.to(tl.int32) + tl.where(there, offset, 0)) & ((1 << BITS) - 1)
    if 32 % BITS == 0:
        shift = BITS * tl.arange(0, 32 // BITS)[None, None, :]
        total = tl.sum(tl.reshape(code, (GROUPS, BITS, 32 // BITS)) << shift, axis=2)
        place = at_G[:, None] * BITS + tl.arange(0, BITS)[None, :]
        mask = (row_G < rows)[:, None] & (place < words)
        tl.store(words_ptr + row_G[:, None] * words + place, total, mask=mask)
    else:
        for word in tl.static_range(BITS):
            shift = (index * BITS - word * 32)[None, :]
            inside = (shift > -BITS) & (shift < 32)
            up = code << tl.minimum(tl.maximum(shift, 0), 31)
            down = code >> tl.minimum(tl.maximum(-shift, 0), 31)
            part = tl.where(inside, tl.where(shift < 0, down, up), 0)
            total = tl.sum(part, axis=1)  # no two codes share a bit
            place = at_G * BITS + word
            mask = (row_G < rows) & (place < words)
            tl.store(words_ptr + row_G * words + place, total, mask=mask)


@triton.jit
def nvfp4_kernel(
    weight_ptr,  # [batch, rows, columns]
    divisor_ptr,  # float32 [batch]
    scale_ptr,  # float8_e4m3fn as bytes, [batch, rows, columns / 16]
    packed_ptr,  # uint8 [batch, rows, columns / 2]
    rows,
    columns,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * GROUPS
    column = first * 16 + tl.arange(0, GROUPS * 16)
    line_R = batch * rows + row_R
    inside = (row_R < rows)[:, None] & (column < columns)[None, :]
    place = line_R[:, None] * columns + column[None, :]
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.reshape(weight, (ROWS, GROUPS, 16))
    group = first + tl.arange(0, GROUPS)
    code = tl.load(
        scale_ptr + line_R[:, None] * (columns // 16) + group[None, :],
        mask=(row_R < rows)[:, None] & (group < columns // 16)[None, :],
        other=1,
    ).to(tl.int32)
    scale = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    scale = tl.where(code < 8, code.to(tl.float32) * 0.001953125, scale)  # subnormal
    step = tl.div_rn(scale, scale * 0 + tl.load(divisor_ptr + batch))
    inverse = tl.div_rn(step * 0 + 1.0, step)
    ratio = divided(weight, step[:, :, None], inverse[:, :, None])
    size = tl.minimum(tl.abs(ratio), 6.0)
    index = (tl.minimum(size, 2.0) * 2.0 + MAGIC) - MAGIC
    index += (tl.minimum(tl.maximum(size, 2.0), 4.0) - 2.0 + MAGIC) - MAGIC
    index += ((tl.maximum(size, 4.0) - 4.0) * 0.5 + MAGIC) - MAGIC
    nibble = index.to(tl.int32) + tl.where((ratio < 0) & (index > 0), 8, 0)
    pair = tl.reshape(nibble, (ROWS, GROUPS * 8, 2))
    byte = tl.sum(pair << (4 * tl.arange(0, 2))[None, None, :], axis=2)
    half = first * 8 + tl.arange(0, GROUPS * 8)
    tl.store(
        packed_ptr + line_R[:, None] * (columns // 2) + half[None, :],
        byte.to(tl.uint8),
        mask=(row_R < rows)[:, None] & (half < columns // 2)[None, :],
    )


@triton.jit
def fp8_blocks_kernel(
    weight_ptr,  # [batch, rows, columns]
    codes_ptr,  # float8_e4m3fn, the same shape
    scale_ptr,  # float32 [batch, ceil(rows / 128), ceil(columns / 128)]
    rows,
    columns,
):
    batch = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(1) * 128 + tl.arange(0, 128)
    column = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (row_R < rows)[:, None] & (column < columns)[None, :]
    place = (batch * rows + row_R)[:, None] * columns + column[None, :]
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(weight), axis=1), axis=0)
    step = tl.div_rn(amax, amax * 0 + 448.0)
    step = tl.where(step > 0, step, 1.0)
    ratio = divided(weight, step, tl.div_rn(step * 0 + 1.0, step))
    ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
    tl.store(codes_ptr + place, ratio.to(tl.float8e4nv), mask=inside)
    block = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    tl.store(scale_ptr + block + tl.program_id(0), step)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., K] as dense int32 words [..., ceil(K · bits / 32)]: uint8 codes 0..2^bits − 1,
    or int8 codes from −2^(bits−1)."""
    codes = codes.contiguous()
    columns = codes.shape[-1]
    rows = codes.numel() // columns
    packed = torch.empty(
        (*codes.shape[:-1], -(-columns * bits // 32)), dtype=torch.int32, device=codes.device
    )
    offset = 1 << (bits - 1) if codes.dtype == torch.int8 else 0
    programs = triton.cdiv(rows * triton.cdiv(columns, 32), GROUPS)
    pack_codes_kernel[(programs,)](
        codes,
        packed,
        rows,
        columns,
        packed.shape[-1],
        offset,
        BITS=bits,
        GROUPS=GROUPS,
        num_warps=4,
    )
    return packed


def nvfp4(
    weight_BNK: torch.Tensor, divisor_B: torch.Tensor, scale_BNG: torch.Tensor
) -> torch.Tensor:
    """Nibbles uint8 [B, N, K / 2] of weights in bfloat16 or float32 under the float8_e4m3fn scales
    [B, N, K / 16] of their blocks."""
    batch, rows, columns = weight_BNK.shape
    packed = torch.empty((batch, rows, columns // 2), dtype=torch.uint8, device=weight_BNK.device)
    tile_rows, groups = 32, 8
    grid = (triton.cdiv(columns, groups * 16), triton.cdiv(rows, tile_rows), batch)
    nvfp4_kernel[grid](
        weight_BNK.contiguous(),
        divisor_B.float().contiguous(),
        scale_BNG.contiguous().view(torch.uint8),
        packed,
        rows,
        columns,
        ROWS=tile_rows,
        GROUPS=groups,
        num_warps=4,
    )
    return packed


def fp8_blocks(weight_BNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes [B, N, K] and float32 scales [B, ceil(N / 128), ceil(K / 128)] of
    contiguous weights; a block of zeros has the scale 1."""
    batch, rows, columns = weight_BNK.shape
    across, down = triton.cdiv(columns, 128), triton.cdiv(rows, 128)
    weight = weight_BNK.contiguous()
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty((batch, down, across), dtype=torch.float32, device=weight.device)
    fp8_blocks_kernel[(across, down, batch)](weight, codes, scale, rows, columns, num_warps=8)
    return codes, scale
