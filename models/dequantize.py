"""The arithmetic of decoding: unpack a chunk of rows to float32, times its scales, round once.

    w[n, k] = (unpack(q)[n, k] − zero[n, k // bk]) · scale[n // bn, k // bk]

Block (bn, bk) need not divide the shape: the last block row and column are simply shorter. Rows
are done in chunks that stay in a CPU's cache, so decoding needs the result and a few megabytes,
never a float32 copy of the whole (transformers' and compressed-tensors' own decoders make one or
two).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

CHUNK_ELEMENTS = 1 << 19  # 2 MB of float32
GPU_CHUNK_ELEMENTS = 1 << 24  # there, starting an operation costs more than a cache saves
# E2M1: sign, two exponent bits, one mantissa bit
FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of `shape`: the last two dimensions in blocks, rounded up."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def float_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32. uint8 ones are E8M0 exponents: 2^(byte − 127), 255 is NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def unpack_eight_bits(stored: torch.Tensor) -> torch.Tensor:
    """FP8 or INT8 values as float32.

    torch converts E4M3 one value at a time on a CPU. Shifted into the bits of a float16 the same
    code is the value / 256 (exponent bias 15 in place of 7, subnormals included), and float16 to
    float32 is one instruction for eight: about ten times as fast. E4M3's only special code, NaN,
    comes out as 480, which no other code gives.
    """
    if stored.dtype != torch.float8_e4m3fn or stored.device.type != "cpu":
        return stored.float()
    half = (stored.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
    values = half.view(torch.float16).float().mul_(256)
    if values.numel():
        low, high = values.aminmax()
        if low == -480 or high == 480:
            return stored.float()
    return values


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """[rows, bytes] uint8, two E2M1 a byte with the low nibble first -> float32 [rows, 2·bytes]."""
    values = torch.tensor(FP4_VALUES, dtype=torch.float32, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=1)
    return pairs.index_select(0, packed.flatten().int()).view(packed.shape[0], -1)


def unpack_bits(
    words: torch.Tensor, bits: int, columns: int, per_word: int | None = None
) -> torch.Tensor:
    """Codes 0..2^bits−1 as float32 [rows, columns] from int32 words [rows, width].

    Value i occupies bits [i·bits, (i+1)·bits) of the row's LSB-first stream and may straddle two
    words; with `per_word`, that many values a word and none straddles (compressed-tensors up to
    0.17). Widths that divide a byte go by bytes.
    """
    rows = words.shape[0]
    if bits == 8:
        return words.view(torch.uint8).view(rows, -1)[:, :columns].float()
    if bits == 4:
        byte = torch.arange(256, device=words.device)
        pairs = torch.stack((byte & 15, byte >> 4), dim=1).float()
        index = words.view(torch.uint8).flatten().int()
        return pairs.index_select(0, index).view(rows, -1)[:, :columns]
    value = torch.arange(columns, device=words.device)
    if per_word is None:
        word, offset = value * bits // 32, value * bits % 32
    else:
        word, offset = value // per_word, value % per_word * bits
    stream = words.long() & 0xFFFFFFFF
    low = stream[:, word] >> offset
    following = (word + 1).clamp(max=words.shape[1] - 1)
    straddles = offset + bits > 32
    high = torch.where(straddles, stream[:, following] << (32 - offset), 0)
    return ((low | high) & ((1 << bits) - 1)).float()


def scaled_blocks(
    stored: torch.Tensor,
    unpack: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor,
    shape: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    *,
    zero: torch.Tensor | float = 0.0,
    group_of_column: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode `stored` [..., rows, width] to `dtype` [..., rows, columns] = `shape`.

    `scale` is float32 of shape blocks_of(shape, block); `zero` is a number or shaped like it.
    """
    out = torch.empty(shape, dtype=dtype, device=stored.device)
    rows, columns = shape[-2:]
    block_rows = min(block[0], rows)
    chunk = CHUNK_ELEMENTS if stored.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, chunk // max(1, columns * block_rows)) * block_rows
    flat_out = out.view(-1, rows, columns)
    flat_in = stored.reshape(-1, *stored.shape[-2:])
    flat_scale = scale.reshape(-1, *scale.shape[-2:])

    def per_column(table: torch.Tensor) -> torch.Tensor:
        if group_of_column is not None:
            return table[:, group_of_column]
        return table.repeat_interleave(block[1], dim=1)[:, :columns]

    for matrix, source, scales in zip(flat_out, flat_in, flat_scale, strict=True):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            work = unpack(source[start:stop])
            first, last = start // block_rows, -(-stop // block_rows)
            if isinstance(zero, torch.Tensor):
                work = work - per_column(zero[start:stop])
            elif zero:
                work = work.sub_(zero)
            factors = per_column(scales[first:last])
            if block_rows > 1:
                whole = (stop - start) // block_rows
                body = work[: whole * block_rows].view(whole, block_rows, columns)
                body.mul_(factors[:whole, None, :])
                work[whole * block_rows :].mul_(factors[whole:])
            else:
                work.mul_(factors)
            matrix[start:stop].copy_(work)
    return out
