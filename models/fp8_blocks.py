"""A matrix into FP8 blocks as DeepSeek-style checkpoints store them: the reverse of decoding.

    code = E4M3(w / scale),   scale = max |w| of the block / 448

Where the scales a matrix had were powers of two (DeepSeek-V3.1 and later, E8M0), so are the new
ones, rounded up: an engine that reads their exponents alone must not lose a bit. The last block of
a row or column is as short as the matrix leaves it.
"""

from __future__ import annotations

import torch

from models.dequantize import blocks_of, float_scales

E4M3_MAX = 448.0


def encode_fp8_blocks(
    weight: torch.Tensor, block: tuple[int, int], old_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [N, K], scales like `old_scale`, the stored ones of the matrix before)."""
    rows, columns = weight.shape
    shape = blocks_of((rows, columns), block)
    padded = weight.new_zeros(shape[0] * block[0], shape[1] * block[1], dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(shape[0], block[0], shape[1], block[1])
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(torch.finfo(torch.float32).tiny * 2) / E4M3_MAX
    mantissa, _ = torch.frexp(float_scales(old_scale))
    if bool((mantissa == 0.5).all()):
        fraction, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    stored = _like(scale, old_scale)
    step = float_scales(stored)
    codes = (blocks / step[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = codes.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns]
    return codes.contiguous(), stored


def _like(scale: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Scales in the stored type of `old`; uint8 ones are E8M0."""
    if old.dtype == torch.uint8:
        return scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    return scale.to(old.dtype)
