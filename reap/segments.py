"""Sums over cells on a GPU, the same bits every time.

A scatter-add there is not reproducible. So what is to be added is sorted by cell, stably, and each
cell is one segment of a reduction. Nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Segments:
    """N values by the cell each belongs to."""

    order_N: torch.Tensor
    ends: torch.Tensor  # int64 [cells + 1]: where the cells' values begin and end, once sorted

    @classmethod
    def of(cls, cell_N: torch.Tensor, num_cells: int) -> Segments:
        """Of cell numbers; those from `num_cells` on are left out."""
        sorted_N, order_N = torch.sort(cell_N, stable=True)
        every = torch.arange(num_cells + 1, device=cell_N.device, dtype=cell_N.dtype)
        return cls(order_N, torch.searchsorted(sorted_N, every))

    def count(self) -> torch.Tensor:
        """Values of each cell."""
        return self.ends.diff()

    def sorted(self, values_N: torch.Tensor) -> torch.Tensor:
        """Values by cell, as `reduced` takes them."""
        return values_N[self.order_N]

    def reduced(self, sorted_N: torch.Tensor, how: str) -> torch.Tensor:
        """The "sum" or "max" of each cell's values, 0 where there is none."""
        return torch.segment_reduce(sorted_N, how, offsets=self.ends, initial=0.0, unsafe=True)
