"""Reading one layer's experts from disk into the joined tensors the grouped path runs.

One expert's bytes are read and decoded at a time, straight into place: the peak beyond the
joined tensors is one expert. transformers' own converters stack and concatenate whole layers
and would need the layer twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.architecture import ExpertTensor
from models.checkpoint import not_finite
from models.errors import InputError
from models.experts import ExpertWeights
from models.fp8_upload import Fp8Matrix, Fp8Upload, fp8_matrix
from models.model_spec import ModelSpec
from models.source_formats import Source


def check_finite(tensor: torch.Tensor, name: str, source: Source) -> torch.Tensor:
    """`tensor` itself. Raises InputError when it holds a NaN or an infinity.

    One reducing pass: a sum in float32 (float64 for float32 tensors) is finite exactly when all
    values are, since the largest bfloat16 sums of one tensor stay far below the float32 range.
    """
    if tensor.is_floating_point():
        wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
        if not torch.isfinite(tensor.sum(dtype=wide)):
            raise not_finite(name, source.checkpoint)
    return tensor


class ExpertReader:
    """The expert tensors of one layer, by role, whatever their storage."""

    def __init__(
        self,
        source: Source,
        spec: ModelSpec,
        layer: int,
        names: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.source, self.spec, self.layer, self.names = source, spec, layer, names
        self.device = device
        self.found: dict[str, ExpertTensor] = {}
        for tensor in spec.architecture.moe.experts:
            probe = spec.expert_name(layer, None if tensor.stacked else 0, tensor)
            if probe in names:
                self.found.setdefault(tensor.role, tensor)

    def _on_disk(self, role: str, expert: int) -> tuple[ExpertTensor, str]:
        """A role's tensor and its logical name. InputError when the checkpoint lacks it."""
        tensor = self.found.get(role)
        if tensor is None:
            raise InputError(
                f"layer {self.layer} of {self.source.checkpoint.root} has no {role} weights of "
                f"experts where a {self.spec.architecture.title} model keeps them; "
                "the checkpoint is incomplete"
            )
        name = self.spec.expert_name(self.layer, None if tensor.stacked else expert, tensor)
        if name not in self.names:
            raise InputError(
                f"tensor {name} is missing in {self.source.checkpoint.root}; "
                "the checkpoint is incomplete"
            )
        return tensor, self.names[name]

    def shape(self, role: str, transposed: bool) -> tuple[int, int]:
        """(out, in) of one expert's weight, or (in, out), `transposed`."""
        tensor, on_disk = self._on_disk(role, 0)
        rows, columns = self.source.shape(on_disk)[-2:]
        return (columns, rows) if tensor.transposed != transposed else (rows, columns)

    def read(self, role: str, expert: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
        """One expert's weight, [out, in] or, `transposed`, [in, out]."""
        tensor, on_disk = self._on_disk(role, expert)
        if tensor.stacked:
            value = self.source.read_expert(on_disk, expert, dtype, self.device)
        else:
            value = self.source.read(on_disk, dtype, self.device)
        check_finite(value, on_disk, self.source)
        return value.transpose(0, 1) if tensor.transposed != transposed else value

    def fp8_matrix(self, role: str, expert: int, out: torch.Tensor) -> Fp8Matrix | None:
        """One expert's weight as it lies on disk, where that is FP8 blocks that go to `out` as
        they are; None for anything else, which `read` decodes or refuses."""
        tensor, on_disk = self._on_disk(role, expert)
        if tensor.stacked or tensor.transposed:
            return None
        return fp8_matrix(self.source, on_disk, out)

    def read_biases(self, role: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Stacked biases [E, width] of a role; None where the family has none."""
        tensor = self.found.get(role)
        if tensor is None:
            return None
        on_disk = self.names[self.spec.expert_name(self.layer, None, tensor)]
        value = self.source.read(on_disk, dtype, self.device)
        return check_finite(value, on_disk, self.source)


def load_expert_weights(
    source: Source,
    spec: ModelSpec,
    layer: int,
    names: Mapping[str, str],
    *,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
    upload: Fp8Upload | None = None,
) -> ExpertWeights:
    """All experts of a layer as [E, ...] tensors on `device`; FP8 blocks by `upload` if given.

    `names` maps canonical to on-disk logical names. Raises InputError when a tensor is missing
    or holds a NaN or an infinity.
    """
    reader = ExpertReader(source, spec, layer, names, device)
    num_experts = spec.num_experts_of(layer)
    up_roles = [role for role in ("gate", "up", "gate_up") if role in reader.found] or ["gate_up"]
    if "gate_up" in up_roles:
        up_roles = ["gate_up"]
    out_dim = 1 if transposed else 0
    up = down = None
    uploaded: list[Fp8Matrix] = []

    def place(role: str, expert: int, out: torch.Tensor) -> None:
        matrix = None
        if upload is not None and not transposed:
            matrix = reader.fp8_matrix(role, expert, out)
        if matrix is not None:
            uploaded.append(matrix)
        else:
            out.copy_(reader.read(role, expert, dtype, transposed))

    for expert in range(num_experts):
        start = 0
        for role in up_roles:
            shape = reader.shape(role, transposed)
            if up is None:
                joined = list(shape)
                joined[out_dim] *= len(up_roles)
                up = torch.empty((num_experts, *joined), dtype=dtype, device=device)
            width = shape[out_dim]
            place(role, expert, up[expert].narrow(out_dim, start, width))
            start += width
        if down is None:
            shape = reader.shape("down", transposed)
            down = torch.empty((num_experts, *shape), dtype=dtype, device=device)
        place("down", expert, down[expert])
    if upload is not None:
        upload.run(source.checkpoint, uploaded)
    assert up is not None
    assert down is not None
    return ExpertWeights(
        up=up,
        down=down,
        up_bias=reader.read_biases("gate_up_bias", dtype),
        down_bias=reader.read_biases("down_bias", dtype),
        transposed=transposed,
    )
