"""From weights to codes under steps that are given, and from codes to stored bytes, in one pass.

    round_codes   weights and the steps of their groups -> integer codes or NVFP4's nibbles
    fp8_blocks    weights -> E4M3 codes and float32 scales of blocks of 128 x 128
    pack_codes    b-bit codes, 32 of them as b words, least significant bits first; NVFP4's nibbles
                  are the case of four bits

Divisions are those of IEEE: the bytes are the ones that quant/rounding.py and quant/format.py
give on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.grid import Grid
from quant.kernels.grid import kind_of, nearest

GROUPS = 128  # of 32 codes in a program
TILE_ROWS, TILE_COLUMNS = 32, 128


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
def round_codes_kernel(
    weight_ptr,  # [lines, columns]
    step_ptr,  # float32 [lines, columns / SIZE]
    zero_ptr,  # float32, as steps: zero points where KIND is 1
    codes_ptr,  # int8 or uint8 [lines, columns]
    lines,
    columns,
    levels,
    KIND: tl.constexpr,  # quant/kernels/grid.py
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    line_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * GROUPS
    column = first * SIZE + tl.arange(0, GROUPS * SIZE)
    inside = (line_R < lines)[:, None] & (column < columns)[None, :]
    place = line_R[:, None] * columns + column[None, :]
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.reshape(weight, (ROWS, GROUPS, SIZE))
    group = first + tl.arange(0, GROUPS)
    at = line_R[:, None] * (columns // SIZE) + group[None, :]
    there = (line_R < lines)[:, None] & (group < columns // SIZE)[None, :]
    step = tl.load(step_ptr + at, mask=there, other=1.0)
    inverse = tl.div_rn(step * 0 + 1.0, step)
    ratio = divided(weight, step[:, :, None], inverse[:, :, None])
    if KIND == 2:
        value = nearest(ratio, 0.0, 0.0, KIND)
        size = tl.abs(value)
        index = tl.where(size < 2, size * 2, tl.where(size < 4, size + 2, size * 0.5 + 4))
        code = index + tl.where(value < 0, 8.0, 0.0)
    elif KIND == 1:
        zero = tl.load(zero_ptr + at, mask=there, other=0.0)[:, :, None]
        code = nearest(ratio, -zero, levels - 1 - zero, KIND) + zero
    else:
        code = nearest(ratio, -(levels // 2) * 1.0, (levels // 2 - 1) * 1.0, KIND)
    code = tl.reshape(code, (ROWS, GROUPS * SIZE))
    tl.store(codes_ptr + place, code.to(codes_ptr.dtype.element_ty), mask=inside)


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


def round_codes(
    weight_BNK: torch.Tensor, step_BNG: torch.Tensor, zero_BNG: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """Codes of `Quantized` [B, N, K] of contiguous bfloat16 or float32 weights under float32 steps
    (and zero points); groups of a power of two."""
    columns = weight_BNK.shape[-1]
    size = columns // step_BNG.shape[-1]
    lines = weight_BNK.numel() // columns
    signed = grid.scheme.kind == "int" and zero_BNG is None
    codes = torch.empty(
        weight_BNK.shape, dtype=torch.int8 if signed else torch.uint8, device=weight_BNK.device
    )
    step = step_BNG.contiguous()
    groups = max(1, TILE_COLUMNS // size)
    programs = (triton.cdiv(lines, TILE_ROWS), triton.cdiv(columns, groups * size))
    round_codes_kernel[programs](
        weight_BNK.contiguous(),
        step,
        step if zero_BNG is None else zero_BNG.contiguous(),
        codes,
        lines,
        columns,
        grid.levels,
        KIND=kind_of(grid),
        SIZE=size,
        ROWS=TILE_ROWS,
        GROUPS=groups,
        num_warps=4,
    )
    return codes


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
