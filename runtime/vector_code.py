"""Machine code that decodes rows: packed codes in, bfloat16 out, one pass and nothing between.

Sixteen codes lie in 2·bits whole bytes, whatever the bits. Eight lanes of 32 bits take two each:

    bytes   --shuffle-->  lane i: the three bytes that hold bits 2·bits·i ..
            --shift, mask-->  even code, odd code            (integers, two a lane)
    integer (code − zero) as float32; E4M3, E2M1: the code's bits, moved, are those of a half that
            is its value / 2^8, / 2^14; a half widens exactly
            --times scale-->  float32  --rounded to nearest even-->  upper 16 bits
    odd | even >> 16  -->  sixteen bfloat16 numbers in their order, one store

numba compiles the loop around it for this machine, once a format, and keeps the result under
~/.cache/thresher/numba (or XDG_CACHE_HOME, or NUMBA_CACHE_DIR). Measured on one core of an EPYC
with AVX2: 0.14 ns a weight (4 bits) to 0.24 (NVFP4), where torch's passes take 0.5 to 0.7. The
block is written in LLVM's vector types, for its vectorizer makes 0.18 (4 bits) to 1.2 (NVFP4) of
the same steps in plain loops.

The one file that imports numba, which takes 0.5 s and 50 MB: it is imported when a model that
wants it is loaded, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pickle import PickleError
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

STEP = 16  # columns a block
EXPONENT = {"fp8": 4, "nvfp4": 2}  # bits of it; a half has 5
WIDER = {"int": 1.0, "fp8": 2.0**8, "nvfp4": 2.0**14}  # what the halves' values are divided by
FAILURES = (NumbaError, RuntimeError)  # of compiling
SIGNATURE = (
    "void(uint8[:, ::1], {}[:, ::1], float32[::1], uint8[:, ::1], uint16[:, ::1], "
    "UniTuple(int64, 7))"
)

BYTE, SHORT, WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)
FLOAT, HALF = ir.FloatType(), ir.HalfType()


def each(kind: Any, values: list[int]) -> Any:
    """A constant vector."""
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def words(value: int) -> Any:
    """The same in eight words."""
    return each(WORD, [value] * 8)


def splat(code: Any, value: Any) -> Any:
    """A value in eight lanes."""
    first = ir.Constant(ir.VectorType(value.type, 8), ir.Undefined)
    first = code.insert_element(first, value, WORD(0))
    return code.shuffle_vector(first, first, words(0))


def windows(code: Any, address: Any, bits: int, columns: list[int], lane: Any) -> tuple[Any, Any]:
    """The bytes from where each column's code begins, a lane each, and the bits before it there."""
    row = ir.VectorType(BYTE, 2 * bits)
    read = code.load(code.inttoptr(address, row.as_pointer()), align=1)
    begins = [divmod(bits * column, 8) for column in columns]
    last = 2 * bits - 1  # bytes beyond it hold no bit that is looked at
    places = [min(byte + more, last) for byte, _ in begins for more in range(lane.width // 8)]
    spread = code.shuffle_vector(read, read, each(WORD, places))
    return code.bitcast(spread, ir.VectorType(lane, len(columns))), [bit for _, bit in begins]


def integers(code: Any, address: Any, bits: int, zero: Any) -> list[Any]:
    """code − zero as float32: of eight even columns, of eight odd ones."""
    pairs, before = windows(code, address, bits, [*range(0, STEP, 2)], WORD)
    pairs = code.lshr(pairs, each(WORD, before))
    zeros, mask = splat(code, zero), words((1 << bits) - 1)
    both = (code.and_(codes, mask) for codes in (pairs, code.lshr(pairs, words(bits))))
    return [code.sitofp(code.sub(codes, zeros), ir.VectorType(FLOAT, 8)) for codes in both]


def halves(code: Any, address: Any, bits: int, exponent: int) -> list[Any]:
    """Sign, exponent, mantissa as those of float16, in float32: even columns, odd columns."""
    columns = [*range(0, STEP, 2), *range(1, STEP, 2)]
    codes, before = windows(code, address, bits, columns, SHORT)
    codes = code.shl(codes, each(SHORT, [16 - bits - bit for bit in before]))  # to the top
    codes = code.ashr(codes, each(SHORT, [5 - exponent] * STEP))
    mask = 0x8000 | ((1 << (bits - 1)) - 1) << (11 + exponent - bits)
    codes = code.bitcast(code.and_(codes, each(SHORT, [mask] * STEP)), ir.VectorType(HALF, STEP))
    sides = [each(WORD, [*range(first, first + 8)]) for first in (0, 8)]
    return [
        code.fpext(code.shuffle_vector(codes, codes, side), ir.VectorType(FLOAT, 8))
        for side in sides
    ]


def rounded(code: Any, values: Any) -> Any:
    """float32 as words whose upper halves are the nearest bfloat16, ties to even."""
    bits = code.bitcast(values, ir.VectorType(WORD, 8))
    odd = code.and_(code.lshr(bits, words(16)), words(1))
    return code.add(bits, code.add(odd, words(0x7FFF)))


@intrinsic(prefer_literal=True)
def block(typing: Any, kind: Any, bits: Any, source: Any, zero: Any, scale: Any, out: Any) -> Any:
    """Sixteen weights from the address `source` to `out`; kind and bits are constants."""
    if not isinstance(kind, types.StringLiteral) or not isinstance(bits, types.IntegerLiteral):
        return None

    def build(context: Any, code: Any, signature: Any, arguments: Any) -> Any:
        _, _, address, offset, factor, target = arguments
        if kind.literal_value == "int":
            values = integers(code, address, bits.literal_value, offset)
        else:
            exponent = EXPONENT[kind.literal_value]
            values = halves(code, address, bits.literal_value, exponent)
        factors = splat(code, factor)
        even, odd = (rounded(code, code.fmul(value, factors)) for value in values)
        pairs = code.or_(code.lshr(even, words(16)), code.and_(odd, words(0xFFFF0000)))
        code.store(pairs, code.inttoptr(target, pairs.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(kind, bits, source, zero, scale, out), build


@intrinsic
def half_value(typing: Any, bits: Any) -> Any:
    """float32 of the float16 with these 16 bits."""

    def build(context: Any, code: Any, signature: Any, arguments: Any) -> Any:
        return code.fpext(code.bitcast(arguments[0], HALF), FLOAT)

    return types.float32(types.uint16), build


@cache
def decoder(kind: str, bits: int, scales: str) -> Callable[..., None]:
    """A compiled function (codes, scale, whole, zero, out, sizes) for rows of one matrix.

        codes  uint8 [N, bytes] of the matrix
        out    uint16 [R, K], bfloat16's bits: the rows
        scale  of the matrix [rows of scales, G]: float32, or the bits of bfloat16 as uint16, of
               float16 as int16, of E4M3 as uint8 (`scales` says which)
        whole  float32 [parts], what E4M3 scales are divided by
        zero   uint8 [N, G] of the matrix, or empty: then `middle` is every group's
        sizes  (first row, the one after the last; rows of a part, of scales of a part, of a block;
               columns of a block; middle)

    A group has 16 columns or more and begins and ends with a byte, the last one too. It runs
    without Python's lock.
    """
    wider = WIDER[kind]

    def decode(codes: Any, scale: Any, whole: Any, zero: Any, out: Any, sizes: Any) -> None:
        start, stop, height, scale_rows, block_rows, group, middle = sizes
        columns, groups = out.shape[1], scale.shape[1]
        factors = np.empty(groups, np.float32)
        for row in range(start, stop):
            part, inside = divmod(row, height)
            stored = scale[part * scale_rows + inside // block_rows]
            for place in range(groups):
                if scales == "float32":
                    factors[place] = stored[place]
                elif scales == "uint16":
                    factors[place] = np.uint32(np.uint32(stored[place]) << 16).view(np.float32)
                elif scales == "int16":
                    factors[place] = half_value(np.uint16(stored[place]))
                else:  # as `halves`; divided as runtime/packed.py does
                    top = np.int16(np.int8(stored[place])) << 7 & 0xBFFF
                    factors[place] = half_value(np.uint16(top)) * np.float32(256) / whole[part]
            source, target = codes[row].ctypes.data, out[row - start].ctypes.data
            for place in range(groups):
                factor = factors[place] * np.float32(wider)
                offset = np.int32(zero[row, place] if zero.size else middle)
                first, end = place * group, min(columns, (place + 1) * group)
                for begin in range(first, end, STEP):
                    column = min(begin, end - STEP)  # the last ones may be written twice
                    address = source + (column * bits >> 3)
                    block(kind, bits, address, offset, factor, target + 2 * column)

    return compiled(decode, SIGNATURE.format(scales))


def compiled(function: Callable[..., None], signature: str) -> Callable[..., None]:
    """The function for this machine; where it cannot be kept on disk it is compiled each time."""
    if not numba.config.CACHE_DIR:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        numba.config.CACHE_DIR = str(Path(root) / "thresher" / "numba")
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except (OSError, RuntimeError, EOFError, PickleError):  # full, unwritable, or damaged
        return numba.njit(signature, **options)(function)
