"""Our Triton kernels as a runtime kernel: which block sizes, which tokens together, whole layers.

Tokens of one expert are worked on together in blocks of BT (runtime/kernels/tiles.py). Nothing
here asks the host how the routing went, so a layer can be captured in a CUDA graph: one launch that
puts pairs into blocks (none for one token, whose experts all differ), the two products, the
activation and the weighted sum.

Many tokens an expert (DECODE_FROM and more on average): the experts are decoded, a few at a time,
and multiplied in bfloat16, which is faster once arithmetic binds (docs/benchmarks.md).

Triton launches on the current GPU, wherever the tensors are: what is called from outside makes the
tensors' own GPU the current one (`device_of`), so that a model may lie on several.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl

from runtime.kernel import TorchKernel
from runtime.kernels import decoding, products, routed
from runtime.kernels.order import SPAN, decoded_matrix, reorder
from runtime.kernels.plans import Plan, by_expert
from runtime.kernels.tiles import Tile, ahead, tile_for, tiles
from runtime.packed import PackedWeights
from runtime.storage import Storage

# Triton's interpreter multiplies bfloat16 as if it were integers
DOT = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16
FORMATS = {("int", 3): 3, ("int", 4): 4, ("nvfp4", 4): 16, ("fp8", 8): 8}
COLUMNS = 1024  # of a program of the kernels around the products
DECODE_FROM = 128  # tokens an expert, on average
DECODED = 1 << 28  # weights decoded at a time for many tokens: 512 MiB of bfloat16


class TritonKernel:
    """Fused decoding and multiplication for W3, W4, NVFP4 and FP8."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = TorchKernel()
        self.nothing = torch.zeros(1, dtype=torch.int32, device=device)

    def supports(self, storage: Storage) -> bool:
        """Symmetric integers of 3 and 4 bits, NVFP4 and FP8 in whole groups of 128 columns."""
        if (storage.kind, storage.bits) not in FORMATS or storage.zero_points:
            return False
        if storage.columns % max(128, SPAN[storage.bits]):
            return False
        if storage.kind == "fp8":
            return storage.block == (1, storage.columns) or storage.block[1] == 128
        return storage.block[1] in ((16,) if storage.kind == "nvfp4" else (32, 64, 128))

    def prepare(self, weights: PackedWeights) -> None:
        """Codes into the kernels' order."""
        reorder(weights)
        self.way(weights)

    def way(self, weights: PackedWeights) -> bool:
        """What the compiled kernels depend on besides the storage: how weights are decoded."""
        if weights.linear is None:
            weights.linear = decoding.is_linear(weights)
        return weights.linear

    def trials(self, weights: PackedWeights) -> tuple[int, ...]:
        """Numbers of tokens an expert, each of which is multiplied in other blocks."""
        return tuple(tile.tokens for tile in tiles(format_of(weights), weights.codes.device))

    # -- one matrix ----------------------------------------------------------------------------

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T, [M, N]."""
        rows = x_MK.shape[0]
        tile = tile_for(format_of(weights), weights.codes.device, rows)
        blocks = -(-rows // tile.tokens)
        plan = Plan(0, self.nothing, self.nothing, self.nothing, blocks, tile)
        with torch.cuda.device_of(x_MK):
            return self.product(weights, x_MK.contiguous(), plan, rows, 1)

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
        storage = weights.storage
        out = x.new_empty(rows, storage.height)
        if not rows:
            return out
        code, tile = format_of(weights), plan.tile
        grid = (-(-storage.height // tile.rows), plan.blocks)
        if tile.is_wide and not is_turned:
            x = turned(x)
        products.packed_rows[grid](
            x if tile.is_wide else x.view(torch.int32),
            weights.codes.view(torch.int32),
            weights.scale.view(torch.int32) if code == 16 else weights.scale,
            weights.global_scale if code == 16 else weights.scale,
            out,
            plan.slots,
            plan.expert,
            rows,
            storage.height,
            top_k,
            decoding.ONES,
            *decoding.MASKS[code],
            K=storage.columns,
            PART=storage.rows,
            FORMAT=code,
            SIZE=storage.block[1],
            ROW_BLOCK=storage.block[0],
            PLAN=plan.kind,
            DOT=DOT,
            SPAN=step_columns(code, storage, tile),
            LINEAR=bool(weights.linear),
            **tile.fixed,
            **ahead(x.device),
        )
        return out

    # -- experts -------------------------------------------------------------------------------

    def plan(self, ids_TK: torch.Tensor, weights: PackedWeights) -> Plan:
        """Blocks of routed pairs, without asking the host."""
        pairs = ids_TK.numel()
        if ids_TK.shape[0] == 1:
            tile = tile_for(format_of(weights), weights.codes.device, 1)
            return Plan(1, self.nothing, ids_TK.contiguous(), self.nothing, pairs, tile)
        return by_expert(ids_TK, weights.experts, self.tile(weights, pairs))

    def tile(self, weights: PackedWeights, pairs: int) -> Tile:
        """The blocks for so many routed pairs of more than one token."""
        average = -(-pairs // weights.experts)
        return tile_for(format_of(weights), weights.codes.device, average, waves=True)

    def routed(
        self, weights: PackedWeights, x_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """x_t · W_e(t,k)^T of every routed pair, [P, N]."""
        with torch.cuda.device_of(x_TK):
            plan = self.plan(ids_TK, weights)
            return self.product(weights, x_TK.contiguous(), plan, ids_TK.numel(), ids_TK.shape[1])

    def experts(
        self, layer: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor
    ) -> torch.Tensor:
        """Σ_k w_tk · f_e(t,k)(x_t), [T, D]."""
        pairs = ids_TK.numel()
        with torch.cuda.device_of(x_TD):
            if self.decodes(pairs, layer.num_experts):
                return self._experts_decoded(layer, x_TD, ids_TK, w_TK)
            return self._experts_packed(layer, x_TD, ids_TK, w_TK)

    def _experts_packed(
        self, layer: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor
    ) -> torch.Tensor:
        """Few tokens an expert: two products with packed weights and what stands around them."""
        pairs, top_k = ids_TK.numel(), ids_TK.shape[1]
        plan = self.plan(ids_TK, layer.up)
        up_PF = self.product(layer.up, x_TD.contiguous(), plan, pairs, top_k)
        tile = plan.tile if plan.kind == 1 else self.tile(layer.down, pairs)
        if plan.tokens != tile.tokens:
            plan = self.plan(ids_TK, layer.down)
        plan = replace(plan, tile=tile)
        is_turned = tile.is_wide and layer.swiglu
        inputs_PF = self.activated(layer, up_PF, is_turned)
        out_PD = self.product(layer.down, inputs_PF, plan, pairs, 1, is_turned)
        return self.combined(out_PD, w_TK, x_TD.dtype)

    def decodes(self, pairs: int, num_experts: int) -> bool:
        """Whether so many pairs are worth decoding every expert for."""
        return pairs >= num_experts * DECODE_FROM

    def activated(self, layer: Any, up_PF: torch.Tensor, is_turned: bool = False) -> torch.Tensor:
        """[P, 2F or F] -> [P, F], by one kernel where the activation is the usual one."""
        if not layer.swiglu or not up_PF.numel():
            return layer.activate(up_PF).contiguous()
        width = up_PF.shape[1] // 2
        out_PF = up_PF.new_empty(up_PF.shape[0], width)
        grid = (up_PF.shape[0], -(-width // COLUMNS))
        more = ahead(up_PF.device)
        routed.gated[grid](up_PF, out_PF, F=width, BLOCK=COLUMNS, TURNED=is_turned, **more)
        return out_PF

    def combined(
        self, out_PD: torch.Tensor, w_TK: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Σ_k w_tk · y_tk, [T, D]."""
        num_tokens, top_k = w_TK.shape
        width = out_PD.shape[1]
        out_TD = out_PD.new_empty(num_tokens, width, dtype=dtype)
        if num_tokens:
            routed.weighted_sum[(num_tokens, -(-width // COLUMNS))](
                out_PD, w_TK.contiguous(), out_TD, D=width, TOP_K=top_k, BLOCK=COLUMNS,
                **ahead(out_PD.device),
            )  # fmt: skip
        return out_TD

    def _experts_decoded(
        self, layer: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor
    ) -> torch.Tensor:
        """Many tokens an expert: decode some experts, multiply in bfloat16, forget them."""
        top_k = ids_TK.shape[1]
        flat = ids_TK.reshape(-1)
        experts_P, order_P = torch.sort(flat)
        each = torch.arange(layer.num_experts, device=flat.device)
        offsets_E = torch.searchsorted(experts_P, each, right=True)
        inputs_PD = x_TD[order_P // top_k]
        up_PF = self.grouped(layer.up, inputs_PD, offsets_E)
        sorted_PD = self.grouped(layer.down, self.activated(layer, up_PF), offsets_E)
        out_PD = torch.empty_like(sorted_PD)
        out_PD[order_P] = sorted_PD
        return self.combined(out_PD, w_TK, x_TD.dtype)

    def grouped(
        self, weights: PackedWeights, x_PK: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """x_p · W_e(p)^T, [P, N], pairs sorted by expert, by decoded weights."""
        storage = weights.storage
        out_PN = x_PK.new_empty(x_PK.shape[0], storage.height)
        at_once = max(1, DECODED // (storage.height * storage.columns))
        ends = [0, *offsets_E.tolist()]
        for first in range(0, weights.experts, at_once):
            last = min(first + at_once, weights.experts)
            rows = slice(ends[first], ends[last])
            if rows.start == rows.stop:
                continue
            some = [self.decode(weights, e, x_PK.dtype) for e in range(first, last)]
            offs = (offsets_E[first:last] - rows.start).to(torch.int32)
            tile = torch.stack(some).transpose(1, 2)
            out_PN[rows] = F.grouped_mm(x_PK[rows], tile, offs=offs)
        return out_PN

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]."""
        if weights.repacked is None:
            return self.torch.decode(weights, expert, dtype)
        return decoded_matrix(weights, expert, dtype)


def format_of(weights: PackedWeights) -> int:
    """The kernels' number of a format."""
    return FORMATS[weights.storage.kind, weights.storage.bits]


def step_columns(code: int, storage: Storage, tile: Tile) -> int:
    """Columns of a step: whole spans of the format, and no more than the matrix has."""
    span = SPAN[storage.bits]
    if code == 3:
        return span
    longest = 4 * span if storage.columns % (4 * span) == 0 else max(128, span)
    return min(longest, tile.columns) if tile.columns else longest


def turned(x: torch.Tensor) -> torch.Tensor:
    """Columns where a wide product wants them: the 4 x 4 words of each 32 columns turned."""
    words = x.view(torch.int32).view(x.shape[0], -1, 4, 4).transpose(2, 3)
    return words.contiguous().view(x.dtype).view(x.shape)
