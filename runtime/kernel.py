"""What computes from packed weights: one interface, one implementation here that runs anywhere.

`TorchKernel` decodes tiles that stay in a core's cache and multiplies them with oneDNN's or
cuBLAS's own product. The fast ones are in runtime/kernels/ (Triton) and runtime/humming.py;
runtime/choice.py chooses, once, when a model is loaded.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.cpu_tiles import CpuTiles
from runtime.decode import decode_rows
from runtime.packed import PackedWeights
from runtime.storage import Storage

TILE_CPU = 1 << 19  # weights decoded at a time: 1 MB of bfloat16, a core's second cache
TILE_BF16 = 1 << 21  # where runtime/cpu_tiles.py decodes: oneDNN wants some hundred rows at once
TILE_GPU = 1 << 26


class Kernel(Protocol):
    """Products with packed weights. M rows of x; P pairs sorted by expert."""

    name: str

    def supports(self, storage: Storage) -> bool:
        """Whether weights so stored can be computed from."""
        ...

    def prepare(self, weights: PackedWeights) -> None:
        """Bring loaded weights into the kernel's own order, in place, expert by expert."""
        ...

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T, [M, N], of the only matrix."""
        ...

    def grouped(
        self, weights: PackedWeights, x_PK: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """x_p · W_e(p)^T, [P, N]; expert e's rows end at offsets_E[e]."""
        ...

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]."""
        ...


class TorchKernel:
    """Decode a tile, multiply, forget it."""

    name = "torch"

    def __init__(self) -> None:
        self.tiles = CpuTiles()

    def supports(self, storage: Storage) -> bool:
        """Everything."""
        return True

    def prepare(self, weights: PackedWeights) -> None:
        """Nothing: it computes from the tensors as they are stored."""

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T, [M, N]."""
        if weights.storage.kind == "plain":
            return F.linear(x_MK, weights.codes[0])
        return self._by_tiles(weights, 0, x_MK)

    def _by_tiles(self, weights: PackedWeights, expert: int, x_MK: torch.Tensor) -> torch.Tensor:
        storage = weights.storage
        height = storage.height
        on_cpu = x_MK.device.type == "cpu" and x_MK.dtype == torch.bfloat16
        fast = on_cpu and self.tiles.supports(storage)
        step = max(1, (TILE_BF16 if fast else tile_weights(x_MK)) // storage.columns)
        which = torch.full((1,), expert, device=x_MK.device)
        out_MN = x_MK.new_empty(x_MK.shape[0], height)
        for start in range(0, height, step):
            stop = min(start + step, height)
            if fast:
                tile = self.tiles.rows(weights, expert, start, stop)
            else:
                tile = decode_rows(weights, which, start, stop, x_MK.dtype)[0]
            out_MN[:, start:stop] = F.linear(x_MK, tile)
        return out_MN

    def grouped(
        self, weights: PackedWeights, x_PK: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """x_p · W_e(p)^T, [P, N]: experts without a row are never decoded."""
        storage = weights.storage
        if storage.kind == "plain":
            return F.grouped_mm(x_PK, weights.codes.transpose(1, 2), offs=offsets_E.int())
        ends = offsets_E.tolist()
        starts = [0, *ends[:-1]]
        hit = [expert for expert, end in enumerate(ends) if end > starts[expert]]
        out_PN = x_PK.new_empty(x_PK.shape[0], storage.height)
        at_once = max(1, tile_weights(x_PK) // (storage.height * storage.columns))
        for first in range(0, len(hit), at_once):
            some = hit[first : first + at_once]
            which = torch.tensor(some, device=x_PK.device)
            if at_once == 1:
                rows = slice(starts[some[0]], ends[some[0]])
                out_PN[rows] = self._by_tiles(weights, some[0], x_PK[rows])
                continue
            tile = decode_rows(weights, which, 0, storage.height, x_PK.dtype)
            rows = slice(starts[some[0]], ends[some[-1]])
            offs = torch.tensor([ends[e] - rows.start for e in some], dtype=torch.int32)
            out_PN[rows] = F.grouped_mm(x_PK[rows], tile.transpose(1, 2), offs=offs.to(x_PK.device))
        return out_PN

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]."""
        which = torch.tensor([expert], device=weights.codes.device)
        return decode_rows(weights, which, 0, weights.storage.height, dtype)[0]


def tile_weights(x: torch.Tensor) -> int:
    """How many weights to decode at a time for inputs like `x`."""
    return TILE_CPU if x.device.type == "cpu" else TILE_GPU
