"""Products on a CPU by torch's own int4 product: faster than bfloat16, and other roundings.

Few tokens go through `_weight_int4pack_mm_for_cpu` in the order of runtime/nibbles.py: it reads
the packed bytes once and multiplies in float32. For more tokens, where its want of bfloat16
instructions costs more than decoding does, tiles are decoded to bfloat16 and multiplied by oneDNN.

Weights met by few tokens are thus never rounded to bfloat16: sums have another error than those of
the decoded model (relative 0.0017 for its 0.0022 at 4 bits, 0.0025 for 0.0023 with NVFP4), and
where two tokens are nearly as probable the other one may be said. So this is not chosen unless
asked for (`--backend int4`).
"""

from __future__ import annotations

import torch

from runtime import nibbles
from runtime.decode import code_table, e2m1_table, raw_codes
from runtime.kernel import TILE_CPU, TorchKernel
from runtime.packed import PackedWeights
from runtime.storage import Storage

NAME = "int4"
FEW = {"int": 40, "nvfp4": 12}  # tokens up to which the int4 product is the faster one
FEW_TILE = {3: 1 << 21, 4: 1 << 20}  # weights brought into nibbles at a time, by bits


class Int4Kernel(TorchKernel):
    """3 and 4 bits and NVFP4, for inputs in bfloat16."""

    name = NAME

    def supports(self, storage: Storage) -> bool:
        """What runtime/nibbles.py can keep."""
        return nibbles.fits(storage)

    def prepare(self, weights: PackedWeights) -> None:
        """Codes and scales into the product's order, in place, 64 rows at a time."""
        storage = weights.storage
        for codes, scale in zip(weights.codes, weights.scale, strict=True):
            for rows in codes.split(nibbles.ROWS):
                words = nibbles.kept(storage, raw_codes(storage, rows))
                rows.view(torch.int32).flatten().copy_(words)
            as_bytes = scale.view(torch.uint8 if scale.itemsize == 1 else torch.int16)
            as_bytes.view(-1).copy_(as_bytes.T.reshape(-1))
        weights.repacked = NAME

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T, [M, N]."""
        return self._product(weights, 0, x_MK)

    def grouped(
        self, weights: PackedWeights, x_PK: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """x_p · W_e(p)^T, [P, N]: experts without a row are never read."""
        out_PN = x_PK.new_empty(x_PK.shape[0], weights.storage.height)
        start = 0
        for expert, end in enumerate(offsets_E.tolist()):
            if end > start:
                out_PN[start:end] = self._product(weights, expert, x_PK[start:end])
            start = end
        return out_PN

    def decode(self, weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One whole matrix [N, K]."""
        storage = weights.storage
        scale_GN = kept_scales(weights, expert).float()
        if storage.kind == "nvfp4":
            scale_GN = scale_GN / weights.global_scale[expert].repeat_interleave(storage.rows)
        tiles = self._decoded(storage, kept_words(weights, expert), scale_GN)
        whole = torch.empty(tiles.shape[0], tiles.shape[2], tiles.shape[1], dtype=dtype)
        whole[:, nibbles.row_order()] = tiles.transpose(1, 2).to(dtype)
        return whole.view(storage.height, storage.columns)

    def _product(self, weights: PackedWeights, expert: int, x_MK: torch.Tensor) -> torch.Tensor:
        """x · W^T of one matrix."""
        assert x_MK.dtype == torch.bfloat16, x_MK.dtype
        storage, tokens = weights.storage, x_MK.shape[0]
        out_MN = x_MK.new_empty(tokens, storage.height)
        words, scale_GN = kept_words(weights, expert), kept_scales(weights, expert)
        few = tokens <= FEW[storage.kind]
        product = self._few_tokens if few else self._many_tokens
        step = words.shape[0]
        if not few or nibbles.are_formed(storage):
            tile = (FEW_TILE[storage.bits] if few else TILE_CPU) * torch.get_num_threads()
            step = max(1, tile // (nibbles.ROWS * storage.columns))
        if few and storage.kind == "nvfp4":
            x_MK = nibbles.doubled_inputs(x_MK)
        for first in range(0, words.shape[0], step):
            rows = slice(first * nibbles.ROWS, (first + step) * nibbles.ROWS)
            out_MN[:, rows] = product(
                storage, words[first : first + step], scale_GN[:, rows], x_MK.contiguous()
            )
        if storage.kind == "nvfp4":
            by_part = out_MN.view(tokens, storage.parts, storage.rows)
            by_part.copy_(by_part / weights.global_scale[expert].unsqueeze(1))
        return out_MN

    def _few_tokens(
        self, storage: Storage, words: torch.Tensor, scale_GN: torch.Tensor, x_MK: torch.Tensor
    ) -> torch.Tensor:
        """x · W^T of some blocks of rows by torch's int4 product; NVFP4: of doubled inputs."""
        codes, group = nibbles.nibble_words(storage, words, self.scratch), storage.block[1]
        if storage.kind == "nvfp4":
            codes, group = nibbles.doubled(codes, self.scratch), 2 * group
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK,
            codes.view(torch.uint8).view(scale_GN.shape[1], -1),
            group,
            nibbles.scales_and_zeros(storage, scale_GN),
        )
        return out

    def _many_tokens(
        self, storage: Storage, words: torch.Tensor, scale_GN: torch.Tensor, x_MK: torch.Tensor
    ) -> torch.Tensor:
        """x · W^T of some blocks of rows by oneDNN, decoded to bfloat16."""
        if storage.kind == "nvfp4":
            scale_GN = nibbles.scales_and_zeros(storage, scale_GN)[..., 0]
        tiles = self._decoded(storage, words, scale_GN)
        out = x_MK.new_empty(x_MK.shape[0], tiles.shape[0], tiles.shape[2])
        for place, tile in enumerate(tiles):
            out[:, place, nibbles.row_order()] = x_MK @ tile
        return out.view(x_MK.shape[0], -1)

    def _decoded(
        self, storage: Storage, words: torch.Tensor, scale_GN: torch.Tensor
    ) -> torch.Tensor:
        """Weights in the type of their scales, [N/B, K, B], a block's rows in `row_order`."""
        dtype, group, order = scale_GN.dtype, storage.block[1], nibbles.row_order()
        if storage.kind == "nvfp4":
            table = e2m1_table(dtype, words.device)
        else:
            table = code_table(4, 16, 1 << (storage.bits - 1), dtype, words.device)
        codes = nibbles.nibble_words(storage, words, self.scratch).view(torch.int16).flatten()
        places = self.scratch.take("places", codes.shape, torch.int32)
        places.copy_(codes).bitwise_and_(0xFFFF)
        values = self.scratch.take("values", codes.shape, table.dtype)
        torch.index_select(table, 0, places, out=values)
        by_group = values.view(dtype).view(-1, storage.groups, group, len(order))
        factors = scale_GN.view(storage.groups, -1, len(order))[..., order]
        by_group.mul_(factors.transpose(0, 1).unsqueeze(2))
        return by_group.view(-1, storage.columns, len(order))


def kept_words(weights: PackedWeights, expert: int) -> torch.Tensor:
    """One matrix's codes as int32 [blocks of 64 rows, words]."""
    blocks = weights.storage.height // nibbles.ROWS
    return weights.codes[expert].view(torch.int32).view(blocks, -1)


def kept_scales(weights: PackedWeights, expert: int) -> torch.Tensor:
    """One matrix's scales [G, N]."""
    return weights.scale[expert].view(weights.storage.groups, weights.storage.height)
