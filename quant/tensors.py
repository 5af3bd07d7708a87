"""Which tensors a source tensor becomes in the quantized checkpoint, planned and made.

- a quantized matrix: the tensors of its scheme (`module.weight_packed`, ...)
- FP8 blocks asked for as FP8_BLOCK: the very codes, the scales under their new name in float32
- a plain tensor that stays: its bytes
- a tensor that stays but was stored quantized: decoded to the compute type, because one
  checkpoint has one quant_method
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from models.checkpoint import TensorInfo
from models.dequantize import float_scales
from models.source_formats import Source
from models.writer import OutputTensor, copied
from quant.export import Layout, store, stored
from quant.format import pack
from quant.layer_rounding import LayerRounding
from quant.linears import Linear
from quant.nvfp4 import global_divisor
from quant.output import SAFETENSORS_DTYPES, Computed, Planned, output_of
from quant.schemes import FP8_BLOCK_SIDE, Scheme

EXACT_SCALES = ("F32", "BF16", "F16", "F8_E8M0")  # scales of FP8 blocks that float32 holds exactly


class OutputTensors:
    """The output of every logical tensor of a source under a choice of schemes."""

    def __init__(
        self,
        source: Source,
        linears: Sequence[Linear],
        schemes: Mapping[str, Scheme | None],
        dtype: torch.dtype,
        layout: Layout = "compressed-tensors",
    ) -> None:
        self.source, self.schemes, self.dtype, self.layout = source, schemes, dtype, layout
        self.linears: dict[str, list[Linear]] = {}
        for linear in linears:
            if schemes[linear.module] is not None:
                self.linears.setdefault(linear.logical, []).append(linear)

    def _copied_parts(self, logical: str) -> tuple[TensorInfo, TensorInfo] | None:
        """(codes, scales) of FP8 blocks whose codes FP8_BLOCK keeps; else None."""
        linears = self.linears[logical]
        scheme = self.schemes[linears[0].module]
        assert scheme is not None
        block = self.source.quantization.get("weight_block_size")
        if scheme.kind != "fp8_block" or linears[0].stacked:
            return None
        if self.source.format(logical) != "fp8_block" or block != [FP8_BLOCK_SIDE] * 2:
            return None
        codes = [info for info in self.source.parts(logical) if info.dtype == "F8_E4M3"]
        scales = [info for info in self.source.parts(logical) if info.dtype in EXACT_SCALES]
        return (codes[0], scales[0]) if len(codes) == len(scales) == 1 else None

    def planned(self, logical: str) -> Iterator[Planned]:
        """Names, types and shapes, before anything is computed."""
        if logical not in self.linears:
            if self.source.format(logical) == "plain":
                (info,) = self.source.parts(logical)
                yield Planned(logical, info.dtype, self.source.shape(logical))
            else:
                yield Planned(logical, SAFETENSORS_DTYPES[self.dtype], self.source.shape(logical))
            return
        for linear in self.linears[logical]:
            scheme = self.schemes[linear.module]
            assert scheme is not None
            parts = stored(self.layout, scheme, linear.shape, self.dtype)
            for suffix, (dtype, shape) in parts.items():
                yield Planned(f"{linear.module}.{suffix}", SAFETENSORS_DTYPES[dtype], shape)

    def made(self, logical: str, result: LayerRounding) -> Iterator[OutputTensor | Computed]:
        """The tensors themselves, from what rounding gave."""
        if logical not in self.linears:
            if self.source.format(logical) == "plain":
                yield self.source.copied(logical)
            else:
                yield output_of(logical, self.source.read(logical, self.dtype))
            return
        parts = self._copied_parts(logical)
        if parts is not None:
            module = self.linears[logical][0].module
            yield copied(parts[0], f"{module}.weight")
            if parts[1].dtype == "F32":
                yield copied(parts[1], f"{module}.weight_scale")
            else:
                scale = float_scales(self.source.checkpoint.read(parts[1].name))
                yield output_of(f"{module}.weight_scale", scale)
            return
        for linear in self.linears[logical]:
            scheme = self.schemes[linear.module]
            assert scheme is not None
            input_scale = None
            if scheme.has_input_scale:
                largest = torch.tensor([result.largest_input.get(linear.module, 0.0)])
                input_scale = global_divisor(largest)
            packed = pack(result.quantized[linear.module], scheme, input_global_scale=input_scale)
            for suffix, tensor in store(self.layout, packed, scheme, linear.module).items():
                yield output_of(f"{linear.module}.{suffix}", tensor)
