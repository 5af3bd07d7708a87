"""Giving freed memory back to the system between layers.

glibc keeps freed blocks below 32 MiB in its arenas. Over many layers, of blocks of many sizes and
threads, that adds up to a peak that grows with the model although nothing is held. One
`malloc_trim` a layer costs milliseconds and keeps the peak that of a layer. Elsewhere (macOS,
musl) there is no such call and nothing is done.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def _find_trim() -> Any:
    """glibc's malloc_trim; None without it."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    trim.restype = ctypes.c_int
    return trim


_TRIM = _find_trim()


def release_freed_memory() -> None:
    """Return what this process has freed to the operating system, where that can be asked for,
    and to the GPU."""
    if _TRIM is not None:
        _TRIM(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that a tensor could get now, torch's own cache included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
