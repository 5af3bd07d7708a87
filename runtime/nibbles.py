"""The order of torch's own int4 product for CPUs, and what is kept in it.

`_weight_int4pack_mm_for_cpu` takes bfloat16 inputs and multiplies in float32,

    w_nk = (nibble − 8) · s_nG + z_nG,    G = k // 32, 64, 128 or 256

from bytes of two codes each: blocks of B rows (64 with AVX-512, 32 with AVX2), in a block a line
of B/2 bytes for each column, n in the low and n + B/2 in the high halves. The order is found by
packing row numbers, not assumed. Everything narrow fits into it, 64 rows by 64 rows:

    4 bits   as it is: z = 0
    3 bits   nibbles of 3 bits, w = (c − 4) · s: z = 4s. Kept as three quarters of the words, whose
             spare fourth bits hold the last quarter: word i of the quarters
             Q0 Q1 Q2 Q3 becomes Q_i | bit_i(Q3) << 3; some ten operations on whole words undo it
    NVFP4    E2M1 nibbles; for a product each becomes two, |2v| and |2v| where v < 0 (0..12), as two
             groups' halves of 16 columns: Σ v·s·x = Σ |2v|·s·(x/2) − Σ [v<0]|2v|·s·x, exact in
             float32 but for the sum itself

Sizes stay what they were on disk. Refused: the zero points beside every scale that the product
wants, kept for good (4 % of a 3-bit weight); they are made for each call, 1/128 of the work.
"""

from __future__ import annotations

from functools import cache

import torch

from runtime.scratch import Scratch
from runtime.storage import Storage

ROWS = 64  # that are reordered together
GROUPS = (32, 64, 128, 256)  # what the product knows
THREES, SPARE = 0x77777777, 0x11111111


@cache
def row_order() -> list[int]:
    """Rows of a block in the order of its nibbles, B of them; none where there is no such product.

    Without AVX2 it is a plain loop, slower than decoding.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return []
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return []
    row = torch.arange(ROWS, dtype=torch.uint8).unsqueeze(1).expand(ROWS, 2)
    column = torch.arange(2, dtype=torch.uint8).expand(ROWS, 2)
    found = 16 * _nibbles(to_order(row // 16)) + _nibbles(to_order(row % 16))
    block = int((_nibbles(to_order(column)) == 0).cumprod(0).sum())  # the first column's line
    if block not in (32, 64):
        return []
    order = found[:block]
    lines = found.view(ROWS // block, 2, block)
    first = torch.arange(0, ROWS, block).view(-1, 1, 1)
    if not torch.equal(lines, (order + first).expand_as(lines)):
        return []
    return [int(number) for number in order]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Both halves of every byte, low first, flat."""
    flat = packed.flatten()
    return torch.stack((flat & 15, flat >> 4), 1).flatten()


def to_order(codes_NK: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K] -> the product's bytes [N, K/2], 64 rows by 64 rows."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
    return packed


def fits(storage: Storage) -> bool:
    """Whether weights so stored can be kept in this order."""
    if storage.height % ROWS or not row_order():
        return False
    if storage.kind == "nvfp4":
        return storage.columns % 16 == 0
    return (
        storage.kind == "int"
        and storage.bits in (3, 4)
        and not storage.zero_points
        and storage.scale_dtype == torch.bfloat16
        and storage.block[1] in GROUPS
        and storage.columns % storage.block[1] == 0
    )


def are_formed(storage: Storage) -> bool:
    """Whether the product's nibbles must be made from what is kept, for each call."""
    return storage.kind == "nvfp4" or storage.bits == 3


def kept(storage: Storage, codes_NK: torch.Tensor) -> torch.Tensor:
    """uint8 codes [64, K] -> int32 words as they are kept, as many as before."""
    words = to_order(codes_NK).view(torch.int32).flatten()
    if storage.bits == 4:
        return words
    quarters = words.view(4, -1)
    bit = torch.arange(3, dtype=torch.int32).unsqueeze(1)
    return (quarters[:3] | (((quarters[3] >> bit) & SPARE) << 3)).flatten()


def nibble_words(storage: Storage, words: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Kept words [blocks of 64 rows, ...] -> int32 words of nibbles [blocks, 8·K]."""
    if storage.bits == 4:
        return words
    planes = words.view(words.shape[0], 3, -1)
    size = words.shape[0], planes.shape[2]
    quarters = scratch.take("quarters", (size[0], 4, size[1]), torch.int32)
    bits = scratch.take("bits", size, torch.int32)
    torch.bitwise_and(planes, THREES, out=quarters[:, :3])
    last = quarters[:, 3]
    torch.bitwise_right_shift(planes[:, 0], 3, out=last).bitwise_and_(SPARE)
    for place in (1, 2):
        torch.bitwise_right_shift(planes[:, place], 3 - place, out=bits)
        last |= bits.bitwise_and_(SPARE << place)
    return quarters.view(size[0], -1)


def doubled(words: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """E2M1 nibbles -> those of |2v|, then of |2v| where v < 0, by turns of 16 columns."""
    turns = words.view(-1, 16 * len(row_order()) // 8)
    size = turns.shape[0], turns.shape[1]
    out = scratch.take("doubled", (size[0], 2, size[1]), torch.int32)
    low = scratch.take("low", size, torch.int32)
    more = scratch.take("more", size, torch.int32)
    chosen = scratch.take("chosen", size, torch.int32)
    torch.bitwise_and(turns, 0x33333333, out=low)  # the low exponent bit and the mantissa: 0..3
    torch.bitwise_right_shift(low, 1, out=more).bitwise_and_(low)  # 1 where that is 3
    # |2v| is low, and where the high exponent bit is set 4 + 2·low + 2·more
    torch.add(low, more, alpha=2, out=more).add_(0x44444444)
    torch.bitwise_right_shift(turns, 2, out=chosen).bitwise_and_(SPARE).mul_(15)
    torch.add(low, more.bitwise_and_(chosen), out=out[:, 0])
    torch.bitwise_right_shift(turns, 3, out=chosen).bitwise_and_(SPARE).mul_(15)
    torch.bitwise_and(out[:, 0], chosen, out=out[:, 1])
    return out


def doubled_inputs(x_TK: torch.Tensor) -> torch.Tensor:
    """[T, K] -> [T, 2K], what the nibbles of `doubled` are multiplied with."""
    turns = x_TK.view(x_TK.shape[0], -1, 1, 16)
    return torch.cat((turns * 0.5, -turns), 2).view(x_TK.shape[0], -1)


def scales_and_zeros(storage: Storage, scale_GN: torch.Tensor) -> torch.Tensor:
    """bfloat16 pairs (s, z) [G, N, 2] as the product wants them; `scale_GN` as stored."""
    if storage.kind == "nvfp4":
        index = scale_GN.view(torch.uint8).int().flatten()
        words = _pairs_of_e4m3().index_select(0, index)
    elif storage.bits == 4:
        words = scale_GN.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)
    else:  # 4s is s with its exponent greater by 2
        words = scale_GN.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)
        words.mul_(0x10001).add_(0x1000000)
    return words.view(torch.bfloat16).view(*scale_GN.shape, 2)


@cache
def _pairs_of_e4m3() -> torch.Tensor:
    """Byte of a scale -> (s, 8s) as one word."""
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
    return torch.stack((scale, scale * 8), 1).view(torch.int32).flatten()
