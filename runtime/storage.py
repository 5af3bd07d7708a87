"""How a weight is held while it runs: the tensors of the file, and what they mean.

A `Storage` describes the matrices of one Linear, or of all experts of a layer, that are kept as
they lie on disk (docs/formats.md). [E, N, K] = [experts, out, in]; a Linear has E = 1.

| kind  | codes                       | scales                               | weight |
|---|---|---|---|
| plain | model's type [E, N, K]      |                                      | code |
| int   | I32 [E, N, ceil(bits·K/32)] | [E, N, ceil(K/g)]                   | (code−zero)·scale |
| nvfp4 | U8 [E, N, K/2]             | F8_E4M3 [E, N, K/16], F32 [E, parts] | v · (scale / global) |
| fp8   | F8_E4M3 [E, N, K]           | [E, parts·ceil(n/bn), ceil(K/bk)]    | code · scale |

Gate and up of an expert are joined along N (`parts` = 2, n = N / parts), so that one matrix
product serves both; each part keeps its own scale rows, for 128 need not divide n. Zero points,
packed down the columns on disk, are held as bytes: 1/128 of a byte a weight.

What has no row here (MXFP4, FP4 blocks, INT8, act-order, the padded layout of compressed-tensors
up to 0.17) is decoded to the compute type when it is loaded, and the loader says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from models.checkpoint import torch_dtype
from models.source_formats import Source

Kind = Literal["plain", "int", "nvfp4", "fp8"]
NVFP4_GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """One row of the table above, with its sizes. `rows` are those of one part (n)."""

    kind: Kind
    rows: int
    columns: int
    parts: int = 1
    bits: int = 16
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale
    zero_points: bool = False
    code_dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.float32

    @property
    def height(self) -> int:
        """N: rows of all parts."""
        return self.rows * self.parts

    @property
    def scale_rows(self) -> int:
        """Rows of scales of one part."""
        return -(-self.rows // self.block[0])

    @property
    def groups(self) -> int:
        """Columns of scales."""
        return -(-self.columns // self.block[1])

    @property
    def code_width(self) -> int:
        """Columns of the codes' tensor."""
        if self.kind == "int":
            return -(-self.columns * self.bits // 32)
        return self.columns // 2 if self.kind == "nvfp4" else self.columns

    @property
    def title(self) -> str:
        """A short name for logs."""
        if self.kind == "plain":
            return str(self.code_dtype).removeprefix("torch.")
        if self.kind == "int":
            zeros = " with zero points" if self.zero_points else ""
            return f"W{self.bits}A16 (groups of {self.block[1]}{zeros})"
        if self.kind == "nvfp4":
            return "NVFP4"
        by_row = self.block == (1, self.columns)
        return "FP8 by row" if by_row else f"FP8 {self.block[0]}x{self.block[1]}"

    def tensors(self, experts: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, types and shapes of what is held for `experts` matrices."""
        held: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (self.code_dtype, (experts, self.height, self.code_width))
        }
        if self.kind != "plain":
            shape = (experts, self.parts * self.scale_rows, self.groups)
            held["scale"] = (self.scale_dtype, shape)
        if self.zero_points:
            held["zero_point"] = (torch.uint8, (experts, self.height, self.groups))
        if self.kind == "nvfp4":
            held["global_scale"] = (torch.float32, (experts, self.parts))
        return held

    def nbytes(self, experts: int) -> int:
        """Bytes of all that is held."""
        total = 0
        for dtype, shape in self.tensors(experts).values():
            count = 1
            for size in shape:
                count *= size
            total += count * dtype.itemsize
        return total

    def joined(self, parts: int) -> Storage:
        """The same with `parts` matrices of equal shape joined along N."""
        return replace(self, parts=parts)


def storage_of(source: Source, logical: str, dtype: torch.dtype) -> Storage | None:
    """How the [N, K] weight `logical` is held; None where it must be decoded on loading.

    `dtype` is the compute type, in which plain tensors are held.
    """
    stored = source.stored[logical]
    shape = source.shape(logical)
    if len(shape) != 2:
        return None
    rows, columns = shape
    if stored.format == "plain":
        return Storage(kind="plain", rows=rows, columns=columns, code_dtype=dtype)
    if stored.format in ("int_packed", "gptq") and not source.is_reordered(logical):
        bits, group, per_word = source.integer_layout(logical)
        if per_word is not None and 32 % bits:
            return None
        return Storage(
            kind="int",
            rows=rows,
            columns=columns,
            bits=bits,
            block=(1, group),
            zero_points=source.has_zero_points(logical),
            code_dtype=torch.int32,
            scale_dtype=torch_dtype(stored.parts.get("scale") or stored.parts["group_scales"]),
        )
    if stored.format in ("nvfp4", "modelopt"):
        return Storage(
            kind="nvfp4",
            rows=rows,
            columns=columns,
            bits=4,
            block=(1, NVFP4_GROUP),
            code_dtype=torch.uint8,
            scale_dtype=torch.float8_e4m3fn,
        )
    part = "scale" if stored.format == "scaled" else "scale_inv"
    if stored.format not in ("scaled", "fp8_block") or stored.parts["weight"].dtype != "F8_E4M3":
        return None
    scale_dtype = torch_dtype(stored.parts[part])
    return Storage(
        kind="fp8",
        rows=rows,
        columns=columns,
        bits=8,
        block=source.scale_block(logical),
        code_dtype=torch.float8_e4m3fn,
        scale_dtype=scale_dtype if scale_dtype.itemsize > 1 else torch.float32,
    )
