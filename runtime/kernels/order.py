"""The order of bits that the kernels want, and into it and out of it, one expert at a time.

A row is cut into spans of columns; the codes of a span stand in 16 words (3 bits: in three planes
of 16 words), and each 32 of its columns are one `pair` of all words: column 32·p + 2·w + h of a
span is pair p, half h of word w. So the lanes of a warp that hold 16 words of 8 rows have, after
one shift and one logical operation a pair, exactly what the tensor cores want of 32 columns
(runtime/kernels/products.py).

    4 bits, NVFP4   128 columns: pair p at bits 4p of either half, p = 0..3
    FP8              64 columns: pair p at bits 8p of either half, p = 0, 1
    3 bits          512 columns: pair p at bits 3·(p mod 5) of the halves of plane p // 5, and the
                    last one, p = 15, has one bit in each plane: bit 15 of either half

Rows keep their number of bytes, so codes are rewritten in place. Three bits of 96 are where dense
packing would put them in none of 32 positions: without reordering an extraction takes five
operations and the kernel is bound by them (measured: 39 % of the memory's speed).
"""

from __future__ import annotations

import torch

from models.dequantize import FP4_VALUES
from runtime.decode import raw_codes
from runtime.packed import PackedWeights

WORDS = 16
SPAN = {3: 512, 4: 128, 8: 64}  # columns, by bits
NAME = "triton"


def reorder(weights: PackedWeights) -> None:
    """Rewrite the codes in place, expert by expert."""
    storage = weights.storage
    for expert in range(weights.experts):
        codes = weights.codes[expert]
        raw = codes.view(torch.uint8) if storage.kind == "fp8" else raw_codes(storage, codes)
        words = packed_words(storage.bits, raw)
        codes.copy_(words.view(torch.uint8).view(codes.shape[0], -1).view(codes.dtype))
    weights.repacked = NAME


def packed_words(bits: int, codes_NK: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K] -> int32 words [N, bits·K/32] in the kernels' order."""
    rows, device = codes_NK.shape[0], codes_NK.device
    spans = codes_NK.view(rows, -1, SPAN[bits] // 32, WORDS, 2).int()  # [N, S, pair, word, half]
    planes = torch.zeros(
        (rows, spans.shape[1], 3 if bits == 3 else 1, WORDS), dtype=torch.int32, device=device
    )
    for half in range(2):
        for pair, (plane, shift) in enumerate(places(bits)):
            planes[:, :, plane] |= spans[:, :, pair, :, half] << (shift + 16 * half)
        if bits == 3:
            for plane in range(3):
                bit = (spans[:, :, 15, :, half] >> plane) & 1
                planes[:, :, plane] |= bit << (15 + 16 * half)
    return planes.view(rows, -1)


def unpacked_codes(bits: int, words: torch.Tensor) -> torch.Tensor:
    """The inverse of `packed_words`: uint8 codes [N, K]."""
    rows = words.shape[0]
    planes = words.view(rows, -1, 3 if bits == 3 else 1, WORDS)
    spans = torch.zeros(
        (rows, planes.shape[1], SPAN[bits] // 32, WORDS, 2), dtype=torch.uint8, device=words.device
    )
    for half in range(2):
        for pair, (plane, shift) in enumerate(places(bits)):
            found = (planes[:, :, plane] >> (shift + 16 * half)) & ((1 << bits) - 1)
            spans[:, :, pair, :, half] = found.to(torch.uint8)
        if bits == 3:
            for plane in range(3):
                bit = (planes[:, :, plane] >> (15 + 16 * half)) & 1
                spans[:, :, 15, :, half] |= (bit << plane).to(torch.uint8)
    return spans.view(rows, -1)


def decoded_matrix(weights: PackedWeights, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One whole matrix [N, K] of reordered codes, by torch."""
    storage = weights.storage
    codes = unpacked_codes(storage.bits, weights.codes[expert].view(torch.int32))
    which = torch.tensor([expert], device=codes.device)
    scale = weights.row_scales(which, 0, storage.height)[0].float()
    if storage.kind == "nvfp4":
        values = torch.tensor(FP4_VALUES, device=codes.device)[codes.int()]
    elif storage.kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = codes.float() - (1 << (storage.bits - 1))
    grouped = values.view(storage.height, -1, storage.block[1])
    return (grouped * scale.unsqueeze(-1)).view(storage.height, -1).to(dtype)


def places(bits: int) -> list[tuple[int, int]]:
    """Plane and shift of each pair that stands in one piece."""
    if bits == 3:
        return [(pair // 5, 3 * (pair % 5)) for pair in range(15)]
    return [(0, bits * pair) for pair in range(SPAN[bits] // 32)]
