"""Memory for tiles that is kept between calls.

A tile is decoded, multiplied and forgotten thousands of times a second. Where the allocator gives
its memory back to the system in between (it does above some size, and after every
`malloc_trim`), each tile pays for fresh pages: measured, up to twice the time of the decoding.
"""

from __future__ import annotations

import math
import threading

import torch


class Scratch(threading.local):
    """Pieces by name, each as large as the largest asked for so far; one set a thread."""

    def __init__(self) -> None:
        self.pieces: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of this shape; what lay there is lost, also to who took `name` before."""
        nbytes = math.prod(shape) * dtype.itemsize
        piece = self.pieces.get(name)
        if piece is None or piece.numel() < nbytes:
            # inference tensors could not be written to outside inference mode later
            with torch.inference_mode(False):
                piece = self.pieces[name] = torch.empty(nbytes, dtype=torch.uint8)
        return piece[:nbytes].view(dtype).view(shape)
