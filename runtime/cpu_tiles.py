"""Tiles of one matrix in bfloat16 on a CPU: the same values as `decode_rows`, in fewer passes.

A pass over a tile costs by its bytes, and products and roundings in bfloat16 three times those in
float32 (measured: 0.145 ns a weight to scale bfloat16, 0.05 to scale float32 and 0.08 to round it).
So codes become the bytes 16·(code − 8), or FP8's bits those of float16, with whole words at a time;
then float32, scaled in place and rounded once. Memory for tiles is kept (runtime/scratch.py).
"""

from __future__ import annotations

import torch

from runtime.packed import PackedWeights
from runtime.scratch import Scratch
from runtime.storage import Storage

FLIP, HIGH = -0x77777778, -0x0F0F0F10  # 0x88888888 and 0xF0F0F0F0 as int32


class CpuTiles:
    """Decoders of 4-bit integers and FP8."""

    def __init__(self) -> None:
        self.scratch = Scratch()

    def supports(self, storage: Storage) -> bool:
        """Symmetric 4 bits and FP8, in blocks that divide a row."""
        if storage.columns % storage.block[1]:
            return False
        four_bits = storage.kind == "int" and storage.bits == 4 and not storage.zero_points
        return storage.kind == "fp8" or (four_bits and storage.columns % 8 == 0)

    def rows(self, weights: PackedWeights, expert: int, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of matrix `expert`, bfloat16 [rows, K]; overwritten by the next call."""
        storage = weights.storage
        size = stop - start, storage.columns
        codes = weights.codes[expert, start:stop]
        values = self.scratch.take("values", size, torch.float32)
        if storage.kind == "fp8":
            values.copy_(self._halves(codes, size))
            unit = 256.0
        else:
            values.copy_(self._bytes(codes, size))
            unit = 1 / 16
        scale = weights.row_scales(torch.tensor([expert]), start, stop)[0].float() * unit
        values.view(size[0], storage.groups, -1).mul_(scale.unsqueeze(2))
        return self.scratch.take("tile", size, torch.bfloat16).copy_(values)

    def _halves(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """FP8 as float16: the code's bits as those of a half are its value / 256."""
        bits = self.scratch.take("bits", size, torch.int16).copy_(codes.view(torch.int8))
        return bits.mul_(128).bitwise_and_(-0x4001).view(torch.float16)

    def _bytes(self, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Nibbles as int8, 16·(code − 8): a flipped top bit makes them two's complement."""
        pairs = self.scratch.take("pairs", (size[0], size[1] // 8), torch.int32)
        torch.bitwise_xor(codes, FLIP, out=pairs)
        spread = self.scratch.take("spread", (size[0], size[1] // 2), torch.int16)
        spread.copy_(pairs.view(torch.uint8))
        words = spread.view(torch.int32)
        high = self.scratch.take("high", words.shape, torch.int32)
        torch.bitwise_left_shift(words, 8, out=high)  # two bytes of a pair: low code, high code
        words.bitwise_left_shift_(4).bitwise_or_(high).bitwise_and_(HIGH)
        return words.view(torch.int8)
