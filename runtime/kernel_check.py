"""Kernels are held to torch once a format when a model is loaded, on the card that will run them.

Compiled kernels meet cards, drivers and versions of Triton that they were never run on, and one
that multiplies wrongly answers with fluent nonsense. So the first weights of every format are
multiplied with random tokens in every kind of block and held to decode-then-multiply in float32: of
the first and the last expert, a copy of some rows. What this compiles is compiled once and kept on
disk by the compilers; multiplying takes milliseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from models.errors import InputError
from runtime.kernel import Kernel, TorchKernel
from runtime.packed import PackedWeights

TOKENS = 64  # of which each number is made
ROWS = 2048  # of a part
# of an output's root mean square: bfloat16 rounds the largest of 64 tokens' by a fiftieth of it
BOUND = 0.06


@runtime_checkable
class Compiled(Protocol):
    """A kernel to be checked."""

    name: str
    device: torch.device

    def way(self, weights: PackedWeights) -> object:
        """What the compiled kernels depend on besides the storage."""
        ...

    def trials(self, weights: PackedWeights) -> tuple[int, ...]:
        """Numbers of tokens an expert, each of which is multiplied in other blocks."""
        ...

    def routed(
        self, weights: PackedWeights, x_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """x_t · W_e(t,k)^T of every routed pair, [P, N]."""
        ...

    def prepare(self, weights: PackedWeights) -> None: ...

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor: ...


class KernelCheck:
    """Prepares weights; those of a format that is new are looked at."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the compute type."""
        self.dtype = dtype
        self.passed: set[object] = set()

    def prepare(self, kernel: Kernel, weights: PackedWeights) -> None:
        """`kernel.prepare`. InputError where its products are wrong, or cannot be made."""
        storage = weights.storage
        if storage.kind == "plain" or not isinstance(kernel, Compiled):
            kernel.prepare(weights)
            return
        where = weights.codes.device
        device = kernel.device if where.type == "cpu" else where
        way = kernel.way(weights)
        key = kernel.name, device, storage.title, storage.scale_dtype, way, weights.experts > 1
        if key in self.passed:
            kernel.prepare(weights)
            return
        some = excerpt(weights, device)
        x_TK, wanted_ETN = self.wanted(some)
        kernel.prepare(weights)
        what = f"the {kernel.name} kernels for {storage.title}"
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        try:
            some.linear = weights.linear
            kernel.prepare(some)
            wrong = wrong_products(kernel, some, x_TK, wanted_ETN)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, a launch or a card may raise
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{what} do not run on {card} ({why}); use --backend torch") from error
        if wrong:
            raise InputError(f"{what} multiply wrongly on {card} ({wrong}); use --backend torch")
        self.passed.add(key)

    def wanted(self, some: PackedWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Random tokens [T, K] and their products [E, T, N] with the decoded weights in float32."""
        generator = torch.Generator().manual_seed(0)
        x_TK = torch.randn(TOKENS, some.storage.columns, generator=generator)
        x_TK = x_TK.to(some.codes.device, self.dtype)
        torch_kernel = TorchKernel()
        products = [
            x_TK.float() @ torch_kernel.decode(some, expert, torch.float32).T
            for expert in range(some.experts)
        ]
        return x_TK, torch.stack(products)


def wrong_products(
    kernel: Compiled, some: PackedWeights, x_TK: torch.Tensor, wanted_ETN: torch.Tensor
) -> str:
    """What is wrong with a kernel's products with prepared weights; empty where nothing is."""
    experts = some.experts
    usual_EN = wanted_ETN.square().mean(1).sqrt().clamp(min=1e-30)
    for tokens in (1, *kernel.trials(some)):
        which = torch.arange(tokens, device=x_TK.device) % TOKENS
        if experts == 1:
            found = kernel.linear(some, x_TK[which])
        else:
            ids = torch.arange(experts, device=x_TK.device).repeat(tokens, 1)
            found = kernel.routed(some, x_TK[which], ids)
        if not torch.isfinite(found).all():
            return f"{tokens} tokens: not finite"
        wanted = wanted_ETN[:, which].transpose(0, 1)
        off = (found.view(tokens, experts, -1).float() - wanted).abs() / usual_EN
        if off.max() > BOUND:
            return f"{tokens} tokens: off by {float(off.max()):.2g} of an output"
    return ""


def excerpt(weights: PackedWeights, device: torch.device) -> PackedWeights:
    """The first rows of every part of the first and the last expert, as they are stored."""
    storage = weights.storage
    which = [0, weights.experts - 1][: weights.experts]
    some = PackedWeights(replace(storage, rows=min(storage.rows, ROWS)), len(which))
    some.allocate(device)
    for name, tensor in some.named_parameters():
        whole = getattr(weights, name)
        for place, expert in enumerate(which):
            parts = whole[expert].view(storage.parts, -1)
            tensor[place].view(storage.parts, -1).copy_(
                parts[:, : tensor[place].numel() // storage.parts]
            )
    return some
