"""Weights held packed, as a module: the file's bytes, moved and counted like any parameters.

    y_MN = x_MK · W_NK^T,    W decoded a tile at a time and forgotten

Parameters (without gradients) and not buffers hold the tensors: accelerate then places, counts
and, where a part of the model stays in host memory, moves exactly the packed bytes.
"""

from __future__ import annotations

import torch
from torch import nn

from models.errors import InputError
from models.source_formats import Source
from runtime.storage import Storage


class PackedWeights(nn.Module):
    """The matrices [E, N, K] of `storage`; on the meta device until `allocate`."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    global_scale: torch.Tensor

    def __init__(self, storage: Storage, experts: int) -> None:
        super().__init__()
        self.storage, self.experts = storage, experts
        self.repacked: str | None = None  # the kernels whose own order the codes are in
        # whether our Triton kernels may decode by one multiply-add; None until they have looked
        self.linear: bool | None = None
        self.extra: object = None  # what a kernel keeps beside the tensors
        for name, (dtype, shape) in storage.tensors(experts).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def allocate(self, device: torch.device) -> None:
        """Give every tensor memory on `device`; the contents are whatever lay there."""
        for name, parameter in list(self._parameters.items()):
            assert parameter is not None
            fresh = torch.empty_like(parameter, device=device)
            self._parameters[name] = nn.Parameter(fresh, requires_grad=False)

    def fill(self, source: Source, logical: str, expert: int, part: int) -> None:
        """Read one stored matrix into its place. InputError when it is unlike its neighbours."""
        storage = self.storage
        rows = slice(part * storage.rows, (part + 1) * storage.rows)
        self._check_alike(source, logical)
        if storage.kind == "plain":
            self.codes[expert, rows].copy_(source.read(logical, storage.code_dtype))
            return
        raw = source.read_parts(logical)
        codes = raw["packed"] if "packed" in raw else raw["weight"]
        self.codes[expert, rows].copy_(codes.view(storage.code_dtype))
        scale = raw["scale"] if "scale" in raw else raw["scale_inv"]
        if scale.numel() == 1:  # one scale for the whole tensor
            scale = scale.reshape(1, 1).expand(storage.scale_rows, storage.groups)
        own = slice(part * storage.scale_rows, (part + 1) * storage.scale_rows)
        self.scale[expert, own].copy_(scale)
        if not torch.isfinite(scale.float().sum()):
            parts = source.stored[logical].parts
            name = next(parts[r].name for r in ("scale", "scale_inv", "group_scales") if r in parts)
            raise InputError(f"{name} holds NaN or infinity")
        if storage.kind == "fp8" and bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise InputError(
                f"tensor {logical} in {source.checkpoint.root} holds NaN; "
                "download the checkpoint again"
            )
        if storage.zero_points:
            self.zero_point[expert, rows].copy_(raw["zero"])
        if storage.kind == "nvfp4":
            self.global_scale[expert, part] = raw["global_scale"].float().reshape(())

    def _check_alike(self, source: Source, logical: str) -> None:
        """Experts are stacked: each must be stored as the first one is."""
        storage = self.storage
        shape = source.shape(logical)
        if shape != (storage.rows, storage.columns):
            raise InputError(
                f"tensor {logical} in {source.checkpoint.root} has shape {list(shape)}, its "
                f"neighbours {[storage.rows, storage.columns]}; download the checkpoint again"
            )
        stored = source.stored[logical]
        if storage.kind == "int" and source.integer_layout(logical)[0] != storage.bits:
            raise InputError(f"tensor {logical} has other bits than its layer's experts")
        if storage.kind == "int" and source.is_reordered(logical):
            raise InputError(
                f"tensor {logical} is reordered (act-order) unlike the first expert of its layer; "
                "use an export without desc_act"
            )
        if (stored.format == "plain") != (storage.kind == "plain"):
            raise InputError(f"tensor {logical} is stored unlike its layer's experts")

    def row_scales(self, experts: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Scales of rows start..stop of some experts, one row a row: [len(experts), rows, groups].

        Integers and FP8: the stored type; NVFP4: float32, the global scale divided out.
        """
        storage = self.storage
        row = torch.arange(start, stop, device=self.scale.device)
        part = row // storage.rows
        if storage.block[0] == 1:
            scale = self.scale[experts, start:stop]
        else:
            scale_row = part * storage.scale_rows + row % storage.rows // storage.block[0]
            scale = self.scale[experts][:, scale_row]
        if storage.kind != "nvfp4":
            return scale
        return scale.float() / self.global_scale[experts][:, part].unsqueeze(-1)
