"""What a device can do, and tensors on their way to it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def has_kernels(where: torch.Tensor | torch.device) -> bool:
    """True for CUDA, or a tensor there, with Triton installed."""
    device = where if isinstance(where, torch.device) else where.device
    return device.type == "cuda" and _triton_is_installed()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting for what a GPU has still to do: a copy from
    pageable memory does."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@cache
def _triton_is_installed() -> bool:
    """It comes with torch's CUDA builds for Linux."""
    return find_spec("triton") is not None
