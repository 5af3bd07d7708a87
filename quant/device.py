"""Whether the kernels of quant/kernels serve a tensor: on a GPU where Triton is installed."""

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
    return find_spec("triton") is not None
