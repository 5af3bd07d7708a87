"""Which kernel computes from which weights: decided once, when a model is loaded.

    auto      on a CUDA device Humming where it is installed and supports card and format, else
              our Triton kernels where Triton is there and supports the format, else torch
              (on a CPU with its tiles decoded by runtime/compiled_tiles.py where that can)
    humming, triton, torch
              that one; formats it does not support are an error, so nothing is silently slow
    int4      runtime/int4.py on a CPU, for the matrices that fit its blocks; torch for the others

Plain (unquantized) weights always go to torch's own products.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

import torch

from models.errors import InputError
from runtime.compiled_tiles import CompiledTiles
from runtime.int4 import Int4Kernel
from runtime.kernel import Kernel, TorchKernel
from runtime.nibbles import row_order
from runtime.storage import Storage

Backend = Literal["auto", "humming", "triton", "int4", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Choice:
    """The kernels a model was loaded with."""

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype` is the compute type. InputError for a backend that cannot run here."""
        self.backend, self.device = backend, device
        self.compiled = CompiledTiles(device, dtype)
        self.torch = TorchKernel(self.compiled)
        self.kernels: list[Kernel] = []
        self.used: Counter[tuple[str, str]] = Counter()
        self.has_tiles = False
        wanted = ("humming", "triton") if backend == "auto" else (backend,)
        for name in wanted:
            if name == "torch":
                continue
            missing = _missing(name, device, dtype)
            if missing is None:
                self.kernels.append(_make(name, device))
            elif backend != "auto":
                raise InputError(f"--backend {name}: {missing}; use --backend auto or torch")

    def kernel_for(self, storage: Storage) -> Kernel:
        """The kernel of weights so stored. InputError where a forced backend cannot."""
        for kernel in self.kernels:
            if storage.kind != "plain" and kernel.supports(storage):
                return kernel
        if storage.kind != "plain" and self.backend in ("humming", "triton"):
            raise InputError(
                f"--backend {self.backend} does not support {storage.title} with "
                f"{storage.columns} columns; use --backend auto"
            )
        return self.torch

    def note(self, storage: Storage, kernel: Kernel, experts: int) -> None:
        """Keep count for the log."""
        name = self.torch.title(storage) if kernel is self.torch else kernel.name
        self.has_tiles |= kernel is self.torch and storage.kind != "plain"
        self.used[storage.title, name] += experts

    def describe(self) -> Iterable[str]:
        """One line a format: how many matrices, and by which kernel."""
        for (title, kernel), count in sorted(self.used.items()):
            yield f"{count:,} matrices in {title}: {kernel}"
        if self.device.type == "cpu" and self.compiled.missing and self.has_tiles:
            yield f"tiles are not decoded by compiled code: {self.compiled.missing}"


def _missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on `device`; None where it can."""
    if name == "int4":
        if device.type != "cpu":
            return f"it runs on a CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
        return None if row_order() else "the CPU has neither AVX2 nor AVX-512"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "humming":
        if importlib.util.find_spec("humming") is None:
            return "humming-kernels is not installed"
        if torch.cuda.get_device_capability(device) < (7, 5):
            return "the card is older than compute capability 7.5"
    return None


def _make(name: str, device: torch.device) -> Kernel:
    if name == "int4":
        return Int4Kernel()
    if name == "humming":
        from runtime.humming import HummingKernel

        return HummingKernel(device)
    from runtime.kernels.triton_kernel import TritonKernel

    return TritonKernel(device)
