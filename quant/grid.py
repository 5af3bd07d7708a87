"""The values a code can take, and the scales that can be stored: rounding to both.

A decoded weight is `value · step`. `value` lies on a fixed grid; `step` is the scale as a reader
will see it, so every search compares scales after they were rounded to their stored type:

| kind        | values                                   | step                                  |
|---|---|---|
| int         | −2^(b−1) .. 2^(b−1)−1                    | scale in the model's type, any sign   |
| int with z  | u − z, u and z in 0 .. 2^b−1             | the same, positive                    |
| nvfp4       | ±{0, .5, 1, 1.5, 2, 3, 4, 6}             | E4M3 block scale / global divisor     |
| fp8         | float8_e4m3fn, largest 448               | float32 (block) or the model's type   |

Ties go to the even code, as in IEEE 754 and in compressed-tensors. A full-range symmetric grid has
one value more below zero than above; the sign of the scale is therefore free, and a search uses
both. Refused: the restricted range ±(2^(b−1)−1), which loses one level of eight at 3 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.fp8_blocks import E4M3_MAX
from quant.schemes import Quantized, Scheme

E4M3_TINIEST = 2.0**-9
E2M1_MAX = 6.0


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of ±{0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code.

    Between powers of two the grid is uniform: spacing .5 up to 2, 1 up to 4, 2 up to 6. The
    magnitude is the sum of its three stretches (`where` on the spacing is four times as slow).
    """
    size = x.abs()
    fine = size.clamp(max=2.0).mul_(2.0).round_().mul_(0.5)
    middle = size.clamp(2.0, 4.0).sub_(2.0).round_()
    coarse = size.clamp_(4.0, 6.0).sub_(4.0).mul_(0.5).round_().mul_(2.0)
    return fine.add_(middle).add_(coarse).mul_(x.sign())


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Grid values -> nibbles: index of the magnitude, sign in bit 3. uint8, −0 becomes 0."""
    size = values.abs()
    index = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return (index + torch.where(values < 0, 8.0, 0.0)).to(torch.uint8)


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest float8_e4m3fn as float32; beyond ±448 the largest (the cast alone gives NaN)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class Grid:
    """Values and storable scales of `scheme`.

    `scale_dtype` is the type of stored scales where the format leaves it open; `global_scale_B`
    (nvfp4 only) the divisor of each weight of the batch, float32.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    global_scale_B: torch.Tensor | None = None

    @property
    def levels(self) -> int:
        """Number of integer codes, 2^b."""
        return 1 << self.scheme.bits

    def nearest(self, x: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """The grid value nearest to x = weight / step; with zero points u − z."""
        if self.scheme.kind == "nvfp4":
            return nearest_e2m1(x)
        if self.scheme.kind != "int":
            return nearest_e4m3(x)
        if zero is None:
            half = self.levels // 2
            return torch.round(x).clamp_(-half, half - 1)
        return (torch.round(x) + zero).clamp_(0, self.levels - 1) - zero

    def stored(self, step: torch.Tensor) -> torch.Tensor:
        """Steps [B, ...] rounded to what the format can store; never zero, finite, float32."""
        if self.scheme.kind == "nvfp4":
            divisor = self._divisor(step)
            scale = (step.abs() * divisor).clamp(E4M3_TINIEST, E4M3_MAX)
            return nearest_e4m3(scale) / divisor
        if self.scheme.kind == "fp8_block":
            return torch.where(step > 0, step, 1.0)
        if not self.scheme.symmetric:  # −step with z is +step with 2^b−1−z
            step = step.abs()
        limits = torch.finfo(self.scale_dtype)
        rounded = step.clamp(-limits.max, limits.max).to(self.scale_dtype).float()
        return torch.where(rounded == 0, limits.tiny, rounded)

    def quantized(
        self,
        values_BNK: torch.Tensor,
        step_BNG: torch.Tensor,
        zero_BNG: torch.Tensor | None = None,
    ) -> Quantized:
        """Values and stored steps as codes and scales. For FP8 blocks the rows of `step` are
        blocks of 128 too."""
        kind = self.scheme.kind
        if kind == "nvfp4":
            return self.with_codes(e2m1_codes(values_BNK), step_BNG)
        if kind.startswith("fp8"):
            return self.with_codes(values_BNK.to(torch.float8_e4m3fn), step_BNG)
        if zero_BNG is None:
            return self.with_codes(values_BNK.to(torch.int8), step_BNG)
        size = values_BNK.shape[-1] // zero_BNG.shape[-1]
        codes = values_BNK + zero_BNG.repeat_interleave(size, dim=-1)
        return self.with_codes(codes.to(torch.uint8), step_BNG, zero_BNG)

    def with_codes(
        self,
        codes_BNK: torch.Tensor,
        step_BNG: torch.Tensor,
        zero_BNG: torch.Tensor | None = None,
    ) -> Quantized:
        """Codes as they are, steps and zero points in their stored types."""
        kind = self.scheme.kind
        if kind == "nvfp4":
            assert self.global_scale_B is not None
            scale = (step_BNG * self._divisor(step_BNG)).to(torch.float8_e4m3fn)
            return Quantized(codes_BNK, scale, global_scale=self.global_scale_B.reshape(-1, 1))
        scale = step_BNG if kind == "fp8_block" else step_BNG.to(self.scale_dtype)
        zero = None if zero_BNG is None else zero_BNG.to(torch.uint8)
        return Quantized(codes_BNK, scale, zero_point=zero)

    def _divisor(self, like: torch.Tensor) -> torch.Tensor:
        assert self.global_scale_B is not None, "NVFP4 needs its global scale"
        return self.global_scale_B.reshape(-1, *[1] * (like.ndim - 1))
