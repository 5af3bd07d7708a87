"""One kind of matrix of a pruned layer's experts, read and written back as it is stored."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from models.architecture import ExpertTensor, Role
from models.checkpoint import TORCH_DTYPES, TensorInfo
from models.dequantize import float_scales, scaled_blocks, unpack_eight_bits
from models.errors import InputError
from models.fp8_blocks import encode_fp8_blocks
from models.model_spec import ModelSpec
from models.opening import OpenModel
from models.skeleton import Skeleton
from reap.pruned_source import PrunedSource


def expert_tensor(
    spec: ModelSpec, names: Container[str | None], layer: int, role: Role
) -> ExpertTensor | None:
    """How the layer's experts hold a role; None where they do not. `names` are canonical."""
    for tensor in spec.architecture.moe.experts:
        probe = spec.expert_name(layer, None if tensor.stacked else 0, tensor)
        if tensor.role == role and probe in names:
            return tensor
    return None


def up_roles(spec: ModelSpec, names: Container[str | None], layer: int) -> tuple[Role, ...]:
    """What is before the activation, in the order in which models/expert_weights.py joins it."""
    if expert_tensor(spec, names, layer, "gate_up") is not None:
        return ("gate_up",)
    found: tuple[Role, ...] = ("gate", "up")
    return tuple(role for role in found if expert_tensor(spec, names, layer, role) is not None)


class StoredMatrices:
    """A role's matrices of all kept experts of one layer."""

    def __init__(self, pruned: OpenModel, skeleton: Skeleton, layer: int, role: Role) -> None:
        """InputError when the layer has none."""
        self.source, self.skeleton = pruned.source, skeleton
        assert isinstance(pruned.source, PrunedSource)
        self.cut = pruned.source.cut
        tensor = expert_tensor(pruned.spec, skeleton.names, layer, role)
        if tensor is None:
            raise InputError(
                f"layer {layer} has no {role} projections; the checkpoint is incomplete"
            )
        self.tensor = tensor
        count = range(pruned.spec.num_experts_of(layer))
        stacked = self.tensor.stacked
        own = [pruned.spec.expert_name(layer, None if stacked else e, self.tensor) for e in count]
        self.names = [skeleton.names[name] for name in own]

    def _turned(self, value: torch.Tensor) -> torch.Tensor:
        return value.T if self.tensor.transposed else value

    def read(self) -> torch.Tensor:
        """float32 [E, out, in], as the source holds them."""
        device, stacked = self.skeleton.device, self.tensor.stacked
        return torch.stack(
            [
                self._turned(
                    self.source.read_expert(name, expert, torch.float32, device)
                    if stacked
                    else self.source.read(name, torch.float32, device)
                )
                for expert, name in enumerate(self.names)
            ]
        )

    def stored(
        self, value_EDF: torch.Tensor, changed: Sequence[bool]
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """(stored tensors by the output's names, what they decode to by expert) of the changed."""
        files: dict[str, torch.Tensor] = {}
        decoded: dict[int, torch.Tensor] = {}
        if self.tensor.stacked and any(changed):
            whole = self.source.read(self.names[0])
        for expert, name in enumerate(self.names):
            if not changed[expert]:
                continue
            value = self._turned(value_EDF[expert])
            if self.tensor.stacked:
                whole[expert] = value.to(whole.dtype)
                files[self._output_name(name)] = whole
                value = whole[expert].float()
            elif self.source.format(name) == "plain":
                (info,) = self.source.parts(name)
                kept = value.to(TORCH_DTYPES[info.dtype]).contiguous().cpu()
                files[self._output_name(info.name)] = kept
                value = kept.float()
            else:
                codes_info, scale_info = split_fp8(self.source.parts(name))
                old = self.source.checkpoint.read(scale_info.name).to(value.device)
                block = self.source.scale_block(name)
                codes, scale = encode_fp8_blocks(value, block, old)
                files[self._output_name(codes_info.name)] = codes.cpu()
                files[self._output_name(scale_info.name)] = scale.cpu()
                value = scaled_blocks(
                    codes, unpack_eight_bits, float_scales(scale), value.shape, block, torch.float32
                )
            decoded[expert] = self._turned(value)
        return files, decoded

    def _output_name(self, physical: str) -> str:
        name = self.cut.rename(physical)
        assert name is not None
        return name


def split_fp8(parts: Sequence[TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """The codes and the scales of a matrix in FP8 blocks."""
    (codes,) = (info for info in parts if info.dtype == "F8_E4M3")
    (scale,) = (info for info in parts if info.dtype != "F8_E4M3")
    return codes, scale
