"""Tiles of one matrix in bfloat16 on a CPU: the same values as `decode_rows`, in fewer passes.

A pass over a tile costs by its bytes, and products and roundings in bfloat16 three times those in
float32 (measured: 0.145 ns a weight to scale bfloat16, 0.05 to scale float32 and 0.08 to round it).
So codes become narrow numbers, whole words at a time (4 bits: the bytes 16·(code − 8); FP8: the
bits of a float16; 3 bits and NVFP4: table entries of four), then float32, scaled in place, rounded
once. Memory for tiles is kept (runtime/scratch.py).
"""

from __future__ import annotations

import torch

from runtime.decode import code_table, e2m1_table, twelve_bits
from runtime.packed import PackedWeights
from runtime.scratch import Scratch
from runtime.storage import Storage

FLOATS = 1 << 20  # weights in float32 at a time: 4 MB; in less, calls cost more than passes
FLIP, HIGH = -0x77777778, -0x0F0F0F10  # 0x88888888 and 0xF0F0F0F0 as int32


class CpuTiles:
    """Decoders of symmetric 3 and 4 bits, NVFP4 and FP8."""

    name = "torch"

    def __init__(self) -> None:
        self.scratch = Scratch()

    def supports(self, storage: Storage) -> bool:
        """Whole groups and words in a row."""
        if storage.columns % storage.block[1]:
            return False
        if storage.kind == "int":
            unit = {3: 32, 4: 8}.get(storage.bits)
            return unit is not None and storage.columns % unit == 0 and not storage.zero_points
        return storage.kind in ("nvfp4", "fp8")

    def ready(self, storage: Storage) -> bool:
        """There is nothing to get ready."""
        return True

    def write(self, weights: PackedWeights, expert: int, start: int, out: torch.Tensor) -> None:
        """Rows from `start` on of matrix `expert` to out, bfloat16 [rows, K]."""
        rows = max(1, FLOATS // weights.storage.columns)
        for first in range(0, out.shape[0], rows):
            some = out[first : first + rows]
            some.copy_(self._floats(weights, expert, start + first, start + first + len(some)))

    def _floats(self, weights: PackedWeights, expert: int, start: int, stop: int) -> torch.Tensor:
        """The same rows in float32, not yet rounded."""
        storage = weights.storage
        size = stop - start, storage.columns
        codes, unit = weights.codes[expert, start:stop], 1.0
        if storage.kind == "fp8":
            narrow, unit = self._halves("bits", codes), 256.0
        elif storage.kind == "nvfp4":
            words = codes.view(torch.int16)
            places = self.scratch.take("places", words.shape, torch.int32)
            places.copy_(words).bitwise_and_(0xFFFF)
            narrow = self._looked_up(places, e2m1_table(torch.bfloat16, codes.device))
        elif storage.bits == 4:
            narrow, unit = self._bytes(codes, size), 1 / 16
        else:
            table = code_table(3, 12, 4, torch.int8, codes.device)
            narrow = self._looked_up(twelve_bits(codes), table)
        values = self.scratch.take("values", size, torch.float32).copy_(narrow.view(size))
        scale = self.scales(weights, expert, start, stop) * unit
        values.view(size[0], storage.groups, -1).mul_(scale.unsqueeze(2))
        return values

    def scales(self, weights: PackedWeights, expert: int, start: int, stop: int) -> torch.Tensor:
        """Scales of the rows, float32 [rows, groups]; torch converts E4M3 one by one."""
        storage = weights.storage
        if storage.block[0] != 1:
            return weights.row_scales(torch.tensor([expert]), start, stop)[0].float()
        scale = weights.scale[expert, start:stop]
        if storage.kind != "nvfp4":
            return scale.float()
        whole = weights.global_scale[expert].repeat_interleave(storage.rows)[start:stop]
        return self._halves("scales", scale).float().mul_(256).div_(whole.unsqueeze(1))

    def _looked_up(self, places: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The entries of a table of words, as the four values each stands for."""
        words = self.scratch.take("words", (places.numel(),), table.dtype)
        torch.index_select(table, 0, places.view(-1), out=words)
        return words.view(torch.int8 if table.dtype == torch.int32 else torch.bfloat16)

    def _halves(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        """E4M3 as float16: the code's bits as those of a half are its value / 256."""
        bits = self.scratch.take(name, codes.shape, torch.int16).copy_(codes.view(torch.int8))
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
