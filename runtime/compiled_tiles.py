"""Tiles of one matrix in bfloat16 on a CPU by machine code: `decode_rows`' values, in one pass.

runtime/vector_code.py decodes; here are the tensors it is handed and the reason where it cannot be
had. Products stay torch's own, so a packed model says the decoded model's words.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from runtime.packed import PackedWeights
from runtime.storage import Storage

log = logging.getLogger("thresher.compiled_tiles")
Arrays = tuple[np.ndarray[Any, Any], ...]  # codes, scales, global scales, zero points
STEP = 16  # columns that are decoded together
# types of scales, and as what numpy, which knows no bfloat16, is shown them
SHOWN = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
}


class CompiledTiles:
    """Decodes integers of 2 to 8 bits, with zero points or without, NVFP4 and FP8.

    `missing` says why nothing is supported where that is so. numba (95 MB of memory, most of it
    LLVM's code) is imported, and a format's decoder compiled, with the first product and not while
    weights are loaded.
    """

    name = "torch, tiles compiled by numba"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype` is the compute type."""
        self.missing = why_not(device, dtype)
        self.decoders: dict[tuple[str, int, torch.dtype], Callable[..., None]] = {}
        self.arrays: WeakKeyDictionary[PackedWeights, tuple[int, Arrays]] = WeakKeyDictionary()

    def supports(self, storage: Storage) -> bool:
        """Groups of 16 columns or more that begin and end with a byte, the last one too."""
        if storage.kind == "plain" or storage.scale_dtype not in SHOWN or self.missing is not None:
            return False
        last = storage.columns - (storage.groups - 1) * storage.block[1]
        widths = (last,) if storage.groups == 1 else (last, storage.block[1])
        return all(width >= STEP and width * storage.bits % 8 == 0 for width in widths)

    def ready(self, storage: Storage) -> bool:
        """Whether the decoder of weights so stored is compiled, now at the latest."""
        return self._decoder(storage) is not None

    def _decoder(self, storage: Storage) -> Callable[..., None] | None:
        """The function for weights so stored; None, said once, where numba fails."""
        key = storage.kind, storage.bits, storage.scale_dtype
        if key not in self.decoders and self.missing is None:
            try:
                from runtime.vector_code import FAILURES, decoder
            except ImportError as error:
                self.missing = f"numba cannot be imported ({error})"
                log.warning("%s: tiles are decoded by torch", self.missing)
                return None
            name = str(SHOWN[storage.scale_dtype]).removeprefix("torch.")
            try:
                self.decoders[key] = decoder(storage.kind, storage.bits, name)
            except FAILURES as error:
                self.missing = f"numba cannot compile it ({str(error).splitlines()[0]})"
                log.warning("%s: tiles are decoded by torch", self.missing)
        return self.decoders.get(key)

    def write(self, weights: PackedWeights, expert: int, start: int, out_RK: torch.Tensor) -> None:
        """Rows from `start` on of matrix `expert`."""
        storage = weights.storage
        decode = self._decoder(storage)
        assert decode is not None, self.missing
        codes, scale, whole, zero = (every[expert] for every in self._arrays(weights))
        sizes = (
            *(start, start + out_RK.shape[0]),
            *(storage.rows, storage.scale_rows, *storage.block),
            1 << (storage.bits - 1),
        )
        decode(codes, scale, whole, zero, out_RK.view(torch.uint16).numpy(), sizes)

    def _arrays(self, weights: PackedWeights) -> Arrays:
        """The tensors as numpy sees them; kept, for making views takes as long as a small tile."""
        address = weights.codes.data_ptr()
        known = self.arrays.get(weights)
        if known is not None and known[0] == address:
            return known[1]
        scale = weights.scale.view(SHOWN[weights.scale.dtype])
        whole = np.empty((weights.experts, 0), np.float32)
        zero = np.empty((weights.experts, 0, 0), np.uint8)
        if weights.storage.kind == "nvfp4":
            whole = weights.global_scale.numpy()
        if weights.storage.zero_points:
            zero = weights.zero_point.numpy()
        arrays = weights.codes.view(torch.uint8).numpy(), scale.numpy(), whole, zero
        self.arrays[weights] = address, arrays
        return arrays


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `CompiledTiles` cannot serve this device and compute type; None where it can."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"it makes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the CPU has neither AVX2 nor AVX-512"
    return None if importlib.util.find_spec("numba") else "numba is not installed"
