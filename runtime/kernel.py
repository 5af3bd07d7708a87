"""What computes from packed weights: one interface, one implementation here that runs anywhere.

`TorchKernel` decodes tiles that stay in a core's cache and multiplies them with oneDNN's or
cuBLAS's own product; what decodes them on a CPU is in runtime/compiled_tiles.py and
runtime/cpu_tiles.py. The fast ones are in runtime/kernels/ (Triton) and runtime/humming.py;
runtime/choice.py chooses, once, when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.compiled_tiles import CompiledTiles
from runtime.cpu_tiles import CpuTiles
from runtime.decode import decode_rows
from runtime.packed import PackedWeights
from runtime.scratch import Scratch
from runtime.storage import Storage
from runtime.workers import Workers

TILE_CPU = 1 << 19  # weights decoded at a time: 1 MB of bfloat16, a core's second cache
TILE_BF16 = 1 << 21  # where `Tiles` decode: oneDNN wants some hundred rows at once
SPLIT = 1 << 18  # of those a thread: waking one for fewer costs more than it saves
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


class Tiles(Protocol):
    """What decodes rows to bfloat16 on a CPU, in fewer passes than `decode_rows`."""

    name: str

    def supports(self, storage: Storage) -> bool:
        """Whether rows so stored can be decoded."""
        ...

    def ready(self, storage: Storage) -> bool:
        """Whether they really can: asked before the first product, of what is supported."""
        ...

    def write(self, weights: PackedWeights, expert: int, start: int, out_RK: torch.Tensor) -> None:
        """Rows from `start` on of matrix `expert`."""
        ...


class TorchKernel:
    """Decode a tile, multiply, forget it."""

    name = "torch"

    def __init__(self, compiled: CompiledTiles | None = None) -> None:
        self.tiles: Sequence[Tiles] = [CpuTiles()] if compiled is None else [compiled, CpuTiles()]
        self.scratch = Scratch()
        self.workers = Workers()

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

    def title(self, storage: Storage) -> str:
        """What decodes weights so stored on a CPU in bfloat16, for the log."""
        return next((tiles.name for tiles in self.tiles if tiles.supports(storage)), self.name)

    def _tiles(self, storage: Storage) -> Tiles | None:
        for tiles in self.tiles:
            if tiles.supports(storage) and tiles.ready(storage):
                return tiles
        return None

    def _by_tiles(self, weights: PackedWeights, expert: int, x_MK: torch.Tensor) -> torch.Tensor:
        storage = weights.storage
        height, columns = storage.height, storage.columns
        tiles = self._tiles(storage) if in_bf16(x_MK) else None
        step = max(1, (tile_weights(x_MK) if tiles is None else TILE_BF16) // columns)
        out_MN = x_MK.new_empty(x_MK.shape[0], height)
        if tiles is None:
            which = torch.full((1,), expert, device=x_MK.device)
            for start in range(0, height, step):
                stop = min(start + step, height)
                tile = decode_rows(weights, which, start, stop, x_MK.dtype)[0]
                out_MN[:, start:stop] = F.linear(x_MK, tile)
            return out_MN

        def rows(first: int, last: int) -> None:
            for start in range(first, last, step):
                stop = min(start + step, last)
                tile = self.scratch.take("tile", (stop - start, columns), x_MK.dtype)
                tiles.write(weights, expert, start, tile)
                out_MN[:, start:stop] = F.linear(x_MK, tile)

        self.workers.run(rows, height, height * columns // SPLIT)
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
            rows = slice(starts[some[0]], ends[some[-1]])
            if at_once == 1:
                out_PN[rows] = self._by_tiles(weights, some[0], x_PK[rows])
                continue
            tile = self._matrices(weights, some, x_PK)
            offs = torch.tensor([ends[e] - rows.start for e in some], dtype=torch.int32)
            out_PN[rows] = F.grouped_mm(x_PK[rows], tile.transpose(1, 2), offs=offs.to(x_PK.device))
        return out_PN

    def _matrices(
        self, weights: PackedWeights, experts: list[int], x_PK: torch.Tensor
    ) -> torch.Tensor:
        """Some whole matrices in the type of x, [len(experts), N, K]."""
        storage = weights.storage
        tiles = self._tiles(storage) if in_bf16(x_PK) else None
        if tiles is None:
            which = torch.tensor(experts, device=x_PK.device)
            return decode_rows(weights, which, 0, storage.height, x_PK.dtype)
        size = len(experts), storage.height, storage.columns
        all_of_it = self.scratch.take("tile", size, x_PK.dtype)
        for tile, expert in zip(all_of_it, experts, strict=True):
            tiles.write(weights, expert, 0, tile)
        return all_of_it

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]."""
        which = torch.tensor([expert], device=weights.codes.device)
        return decode_rows(weights, which, 0, weights.storage.height, dtype)[0]


def tile_weights(x: torch.Tensor) -> int:
    """How many weights to decode at a time for inputs like `x`."""
    return TILE_CPU if x.device.type == "cpu" else TILE_GPU


def in_bf16(x: torch.Tensor) -> bool:
    """Whether `Tiles` can be multiplied with `x`."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16
