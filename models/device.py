"""Whether the Triton kernels of a package's kernels/ serve a tensor or a device."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def has_kernels(where: torch.Tensor | torch.device) -> bool:
    """True for CUDA, or a tensor there, with Triton installed."""
    device = where if isinstance(where, torch.device) else where.device
    return device.type == "cuda" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    """It comes with torch's CUDA builds for Linux."""
    return find_spec("triton") is not None
