"""Humming's kernels (package humming-kernels) for packed integers, where it is installed.

vLLM uses the same kernels for 3 bits. Weights are brought into Humming's order by its own schema
code, a few experts at a time, and written back over ours: its conversion unpacks to 32 bits a
code on the way, which whole layers must not. Its step that turns integers whose lowest code is
never used into sign and magnitude is left out: it decides by the data, experts of a layer could
then differ, and it was slower (37 % of the memory's speed instead of 51 %).

What the kernels cannot do goes to our Triton kernels (runtime/choice.py asks both).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from humming.config import GemmType
from humming.forward import humming_forward
from humming.schema import BaseWeightSchema
from humming.transform import (
    prepare_fp16_e8m0_scale,
    prepare_layer_config,
    transform_humming_tensors,
)
from humming.tune import get_heuristics_config

from runtime.kernels.plans import Plan, by_expert
from runtime.kernels.tiles import Tile
from runtime.kernels.triton_kernel import TritonKernel
from runtime.packed import PackedWeights
from runtime.storage import Storage

AT_ONCE = 1 << 26  # weights converted at a time
NAME = "humming"


@dataclass(slots=True)
class Converted:
    """What one PackedWeights became: how its tensors are to be read, wherever they lie now."""

    config: Any
    code_dtype: torch.dtype
    code_shape: tuple[int, ...]  # of one expert
    scale_shape: tuple[int, ...]
    tuning: dict[int, tuple[dict[str, Any], str]]  # by pairs, rounded up to a power of two


class HummingKernel(TritonKernel):
    """Humming for the products, our own plan of routed pairs around them."""

    name = NAME

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # of one token: slots and their number, by pairs, BT and device
        self.alone: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self.locks: dict[torch.device, torch.Tensor] = {}

    def supports(self, storage: Storage) -> bool:
        """Symmetric integers of 2 to 8 bits in groups of 128, whole tiles of both sides."""
        return (
            storage.kind == "int"
            and not storage.zero_points
            and storage.block == (1, 128)
            and storage.scale_dtype == torch.bfloat16
            and storage.columns % 256 == 0
            and storage.height % 256 == 0
        )

    def prepare(self, weights: PackedWeights) -> None:
        """Codes and scales into Humming's order, in place; on the GPU, wherever they lie."""
        storage = weights.storage
        schema = BaseWeightSchema.from_config(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "type": "int",
                "num_bits": storage.bits,
                "strategy": "group",
                "group_size": storage.block[1],
                "symmetric": True,
            }
        )
        step = max(1, AT_ONCE // (storage.height * storage.columns))
        config: Any = None
        for first in range(0, weights.experts, step):
            some = slice(first, min(first + step, weights.experts))
            with torch.cuda.device(self._gpu(weights)):
                config, weight, scale = self._convert(weights, schema, some)
            weights.codes[some].view(torch.uint8).flatten().copy_(
                weight.view(torch.uint8).flatten()
            )
            weights.scale[some].flatten().copy_(scale.flatten())
        weights.extra = Converted(
            dataclasses.replace(config, num_experts=weights.experts),
            weight.dtype,
            tuple(weight.shape[1:]),
            tuple(scale.shape[1:]),
            {},
        )
        weights.repacked = NAME

    def _gpu(self, weights: PackedWeights) -> torch.device:
        """Where the weights lie, or will be sent for each forward."""
        where = weights.codes.device
        return where if where.type == "cuda" else self.device

    def _convert(
        self, weights: PackedWeights, schema: Any, some: slice
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        storage = weights.storage
        count = some.stop - some.start
        gpu = self._gpu(weights)
        humming_schema, tensors = schema.convert_humming(
            tensors={
                "weight_packed": weights.codes[some].to(gpu, copy=True),
                "weight_scale": weights.scale[some].to(gpu, copy=True),
            },
            shape_n_stacks=[storage.height],
            shape_k_stacks=[storage.columns],
            param_dtype=torch.bfloat16,
            num_experts=count,
            device=gpu,
            convert_symmetric_integer=False,
        )
        config = prepare_layer_config(
            shape_n=storage.height,
            shape_k=storage.columns,
            weight_schema=humming_schema,
            num_experts=count,
            torch_dtype=torch.bfloat16,
            device=gpu,
            tensors=tensors,
        )
        config, tensors = prepare_fp16_e8m0_scale(config, tensors)
        out = transform_humming_tensors(config, tensors)
        return config, out["weight"], out["weight_scale"]

    def way(self, weights: PackedWeights) -> bool:
        """Nothing besides the storage."""
        return False

    def trials(self, weights: PackedWeights) -> tuple[int, ...]:
        """Numbers of tokens an expert that Humming's table has other blocks for."""
        return 4, 16, 64, 256

    def tuning(self, held: Converted, pairs: int) -> tuple[dict[str, Any], str]:
        """Humming's configuration for a number of routed pairs: as a dict and as it is passed."""
        bucket = 1 << max(0, (pairs - 1).bit_length())
        if bucket not in held.tuning:
            found = get_heuristics_config(
                held.config, shape_m=bucket, gemm_type=GemmType.INDEXED, device=self.device
            )
            held.tuning[bucket] = found, json.dumps(found)
        return held.tuning[bucket]

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T, [M, N]: the only matrix as an expert that every row is routed to."""
        ids = torch.zeros((x_MK.shape[0], 1), dtype=torch.int32, device=x_MK.device)
        with torch.cuda.device_of(x_MK):
            return self.product(weights, x_MK, self.plan(ids, weights), x_MK.shape[0], 1)

    def decodes(self, pairs: int, num_experts: int) -> bool:
        """Never: its own products stay ahead of decoded weights."""
        return False

    def tile(self, weights: PackedWeights, pairs: int) -> Tile:
        """Tokens of a block as Humming's own table has them."""
        assert isinstance(weights.extra, Converted)
        return Tile(int(self.tuning(weights.extra, pairs)[0]["block_shape"][0]), 0)

    def plan(self, ids_TK: torch.Tensor, weights: PackedWeights) -> Plan:
        """Blocks of routed pairs. The experts of one token all differ: a block each, no sorting."""
        pairs = ids_TK.numel()
        tile = self.tile(weights, pairs)
        tokens = tile.tokens
        if ids_TK.shape[0] > 1:
            return by_expert(ids_TK, weights.experts, tile)
        key = pairs, tokens, ids_TK.device
        if key not in self.alone:
            slots = torch.full((pairs, tokens), pairs, dtype=torch.int32, device=ids_TK.device)
            slots[:, 0] = torch.arange(pairs)
            padded = torch.full((1,), pairs * tokens, dtype=torch.int32, device=ids_TK.device)
            self.alone[key] = slots.flatten(), padded
        slots, padded = self.alone[key]
        return Plan(2, slots, ids_TK.flatten().int().contiguous(), padded, pairs, tile)

    def product(
        self,
        weights: PackedWeights,
        x: torch.Tensor,
        plan: Plan,
        rows: int,
        top_k: int,
        is_turned: bool = False,
    ) -> torch.Tensor:
        """[rows, N] of pairs; the input of pair p is row p // top_k of x."""
        held = weights.extra
        assert isinstance(held, Converted)
        if not rows:
            return x.new_empty(0, weights.storage.height)
        if x.device not in self.locks:
            self.locks[x.device] = torch.zeros(2048, dtype=torch.int32, device=x.device)
        return humming_forward(
            held.config,
            inputs=x.contiguous(),
            weight=weights.codes.view(held.code_dtype).view(-1, *held.code_shape),
            weight_scale=weights.scale.view(-1, *held.scale_shape),
            sorted_ids=plan.slots,
            expert_ids=plan.expert,
            num_tokens_padded=plan.padded,
            locks=self.locks[x.device],
            top_k=top_k,
            compute_config={"gemm_type": "indexed"},
            tuning_config=self.tuning(held, rows)[1],
        )

    def grouped(
        self, weights: PackedWeights, x_PK: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """x_p · W_e(p)^T, [P, N], pairs sorted by expert."""
        number = torch.arange(x_PK.shape[0], device=x_PK.device)
        ids_P1 = torch.searchsorted(offsets_E, number, right=True).reshape(-1, 1)
        with torch.cuda.device_of(x_PK):
            return self.product(weights, x_PK, self.plan(ids_P1, weights), x_PK.shape[0], 1)

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]: what it makes of the unit vectors."""
        columns = weights.storage.columns
        unit = torch.eye(columns, dtype=torch.bfloat16, device=weights.codes.device)
        ids = torch.full((columns, 1), expert, dtype=torch.int32, device=unit.device)
        with torch.cuda.device_of(unit):
            return self.product(weights, unit, self.plan(ids, weights), columns, 1).T.to(dtype)
