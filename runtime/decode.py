"""From packed codes to weights, a few rows at a time, with torch alone.

    w = round((code − zero) · scale)      the product in float32, rounded once to the compute type

Speed on a CPU is a matter of how many passes over how many bytes. Codes become floats by tables:
4 bits take 16 bits of the stream as index, 3 bits take 12 (four codes each), and one entry
of the table is four finished bfloat16 values, copied as one 64-bit word. Measured on one core
(EPYC, AVX-512): 0.3 ns a weight to index 3-bit streams, 0.13 to look up, 0.16 to scale, beside
0.11 for the product with one token; compressed-tensors' own unpacking takes about 20.

Integer codes and bfloat16 scales are multiplied in bfloat16: both factors are exact, so this is
the float32 product rounded once.
"""

from __future__ import annotations

from functools import cache

import torch

from models.dequantize import FP4_VALUES, unpack_bits
from runtime.packed import PackedWeights
from runtime.storage import Storage

# an entry of a table as one element, by its bytes: gathering those is one move each
WORD = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
SHIFTS = (0, 12, 24, 36)


def decode_rows(
    weights: PackedWeights, experts: torch.Tensor, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows start..stop of the matrices `experts` (int64 [c]) as `dtype` [c, stop − start, K]."""
    storage = weights.storage
    assert weights.repacked is None, weights.repacked
    codes = weights.codes[experts, start:stop]
    if storage.kind == "plain":
        return codes.to(dtype)
    scale = weights.row_scales(experts, start, stop)
    exact = dtype == scale.dtype == torch.bfloat16 and storage.kind == "int"
    narrow = exact or (storage.kind == "nvfp4" and dtype == torch.bfloat16)
    values = code_values(
        storage, codes.reshape(-1, storage.code_width), dtype if narrow else torch.float32
    ).view(*codes.shape[:2], storage.columns)
    if storage.zero_points:
        zeros = weights.zero_point[experts, start:stop].to(values.dtype)
        grouped(values, storage).sub_(spread(zeros, storage))
    if storage.kind == "fp8" and codes.device.type == "cpu":
        scale = scale.float() * 256
    blocks, factors = grouped(values, storage), spread(scale, storage)
    if values.dtype == dtype:  # formed in float32 where a factor has it, rounded once
        torch.mul(blocks, factors, out=blocks)
        return values
    return blocks.mul_(factors).view_as(values).to(dtype)


def grouped(values: torch.Tensor, storage: Storage) -> torch.Tensor:
    """[..., K] -> [..., groups, block] where blocks divide K, else itself."""
    block = storage.block[1]
    return values if storage.columns % block else values.view(*values.shape[:-1], -1, block)


def spread(table: torch.Tensor, storage: Storage) -> torch.Tensor:
    """[..., groups] in the form that `grouped` values are multiplied with."""
    block = storage.block[1]
    if storage.columns % block:
        return table.repeat_interleave(block, -1)[..., : storage.columns]
    return table.unsqueeze(-1)


def code_values(storage: Storage, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [rows, width] as floats [rows, K], before zero points and scales.

    Symmetric integers come centred (code − 2^(bits−1)); FP8 on a CPU comes divided by 256.
    """
    if storage.kind == "nvfp4":
        return look_up(codes.view(torch.int16), e2m1_table(dtype, codes.device), dtype)
    if storage.kind == "fp8":
        if codes.device.type != "cpu":
            return codes.to(dtype)
        # the code's bits as those of a float16 are its value / 256 (models/dequantize.py)
        half = codes.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001)
        return half.view(torch.float16).to(dtype)
    bits, columns = storage.bits, storage.columns
    offset = 0 if storage.zero_points else 1 << (bits - 1)
    if bits == 3 and columns % 32 == 0:
        table = code_table(3, 12, offset, dtype, codes.device)
        return table.index_select(0, twelve_bits(codes)).view(dtype).view(-1, columns)
    if bits == 4:
        table = code_table(4, 16, offset, dtype, codes.device)
        return look_up(codes.view(torch.int16), table, dtype)[:, :columns].contiguous()
    if bits == 8:
        values = codes.view(torch.uint8)[:, :columns].to(dtype)
        return values.sub_(offset) if offset else values
    return unpack_bits(codes, bits, columns).to(dtype).sub_(offset)


def raw_codes(storage: Storage, codes: torch.Tensor) -> torch.Tensor:
    """Integer and NVFP4 codes of rows [N, width] as uint8 [N, K], as they are stored."""
    if storage.bits == 4:
        pairs = codes.view(torch.uint8).unsqueeze(-1)
        nibbles = torch.cat((pairs & 15, pairs >> 4), dim=-1)
        return nibbles.view(codes.shape[0], -1)[:, : storage.columns]
    return unpack_bits(codes, storage.bits, storage.columns).to(torch.uint8)


def look_up(index: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Every 16 bits of a row as one entry of four values: [rows, width] -> [rows, 4·width]."""
    places = index.flatten().int().bitwise_and_(0xFFFF)
    return table.index_select(0, places).view(dtype).view(index.shape[0], -1)


def twelve_bits(codes: torch.Tensor) -> torch.Tensor:
    """int32 words, three for 32 codes of 3 bits -> indices of four codes each, int64, flat.

    48 bits (three 16-bit halves) are widened to 64, so that four shifts give four indices.
    """
    halves = codes.view(torch.int16).view(-1, 3)
    words = torch.nn.functional.pad(halves, (0, 1)).view(torch.int64)
    shifts = torch.tensor(SHIFTS, device=codes.device)
    return (words >> shifts).bitwise_and_(0xFFF).view(-1)


@cache
def code_table(
    bits: int, index_bits: int, offset: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Entry i: the index_bits // bits codes of i, lowest bits first, less `offset`; one word."""
    index = torch.arange(1 << index_bits, device=device)
    codes = [(index >> shift) & ((1 << bits) - 1) for shift in range(0, index_bits, bits)]
    return _as_words(torch.stack(codes, 1).sub_(offset).to(dtype))


@cache
def e2m1_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Entry i: the four E2M1 values of 16 bits, lowest nibble first; one word."""
    index = torch.arange(1 << 16, device=device)
    values = torch.tensor(FP4_VALUES, device=device)
    return _as_words(torch.stack([values[(index >> s) & 15] for s in (0, 4, 8, 12)], 1).to(dtype))


def _as_words(table: torch.Tensor) -> torch.Tensor:
    return table.view(WORD[table.shape[1] * table.element_size()]).flatten()
