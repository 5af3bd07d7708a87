"""FP8 blocks to the compute type, many matrices in one launch.

    w[n, k] = code[n, k] * scale[n // bn, k // bk]        rounded once

A layer of 256 experts is 768 matrices: a launch for each would cost as much as the work. Matrices
of one shape go together, found through a table of addresses. A value that is not finite, a NaN
code or a broken scale, sets the flag of its matrix, so that checking costs no further pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 128
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _dequantize(
    table,
    flags,
    rows,
    columns,
    out_stride,
    scale_columns,
    OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    matrix = tl.program_id(1)
    across = tl.cdiv(columns, COLUMNS)
    top = (tl.program_id(0) // across) * ROWS
    row = top + tl.arange(0, ROWS)[:, None]
    left = (tl.program_id(0) % across) * COLUMNS
    column = left + tl.arange(0, COLUMNS)[None, :]
    codes = tl.load(table + matrix * 3).to(tl.pointer_type(tl.float8e4nv))
    scales = tl.load(table + matrix * 3 + 1).to(tl.pointer_type(tl.float32))
    out = tl.load(table + matrix * 3 + 2).to(tl.pointer_type(OUT))
    if ALIGNED:  # of addresses from a table the compiler knows nothing: it would go byte by byte
        codes = tl.multiple_of(codes, 16)
        out = tl.multiple_of(out, 16)
    inside = (row < rows) & (column < columns)
    code = tl.load(codes + row.to(tl.int64) * columns + column, mask=inside, other=0.0)
    if BLOCK_ROWS % ROWS == 0 and BLOCK_COLUMNS % COLUMNS == 0:  # the tile lies in one block
        scale = tl.load(scales + (top // BLOCK_ROWS) * scale_columns + left // BLOCK_COLUMNS)
    else:
        place = (row // BLOCK_ROWS) * scale_columns + column // BLOCK_COLUMNS
        scale = tl.load(scales + place, mask=inside, other=0.0)
    value = code.to(tl.float32) * scale
    tl.store(out + row.to(tl.int64) * out_stride + column, value.to(OUT), mask=inside)
    finite = tl.abs(value) <= FLOAT32_MAX  # false for a NaN
    broken = 1 - tl.min(tl.min(finite.to(tl.int32), 1), 0)
    if broken != 0:
        tl.store(flags + matrix, 1)


OUT_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def dequantize(
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], block: tuple[int, int]
) -> torch.Tensor:
    """(E4M3 codes [N, K], float32 scales [ceil(N/bn), ceil(K/bk)], out [N, K]) of each matrix.

    All on one GPU and of one shape; codes and scales contiguous, the rows of all `out` equally
    far apart. Returns uint8 flags by matrix, 1 where a value is not finite (`out` holds it).
    """
    codes, scales, first = matrices[0]
    rows, columns = codes.shape
    for each, factors, out in matrices:
        assert each.shape == out.shape == codes.shape
        assert each.is_contiguous()
        assert factors.is_contiguous()
        assert factors.shape == scales.shape
        assert factors.dtype == torch.float32
        assert out.stride() == first.stride()
        assert out.stride(1) == 1
    addresses = [[part.data_ptr() for part in matrix] for matrix in matrices]
    table = torch.tensor(addresses, dtype=torch.int64).to(codes.device, non_blocking=True)
    flags = torch.zeros(len(matrices), dtype=torch.uint8, device=codes.device)
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    _dequantize[(tiles, len(matrices))](
        table,
        flags,
        rows,
        columns,
        first.stride(0),
        scales.shape[1],
        OUT=OUT_TYPES[first.dtype],
        BLOCK_ROWS=block[0],
        BLOCK_COLUMNS=block[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ALIGNED=all(code % 16 == 0 and out % 16 == 0 for code, _, out in addresses),
    )
    return flags
