"""GPTQ: rounding that lets later columns make up for the errors of earlier ones, experts together.

    minimise  tr((W − Q) H (W − Q)ᵀ),      H = XᵀX / tokens of the layer's inputs

With H = U D Uᵀ (quant/factor.py) column j of the order is rounded at

    target_j = w_j + sum_{i<j} (w_i − q_i) U_ij

and costs D_j (target_j − q_j)². Blocks of columns are left-looking: one product brings all earlier
errors, W itself is never rewritten. Leading dimension B runs over experts; gate and up of an
expert, which see the same inputs, are stacked along N and share H and its factor.

Scales are fixed before the loop, by the weighted search of quant/rounding.py with the pivots D as
importance: D_j and not H_jj is what an error in channel j costs once the others have made up.
Codes and scales are then improved group by group (quant/refine.py), where plain GPTQ stops.

An expert that saw few tokens has a noisy H; one that saw none has zero, and rounding to it would
be rounding to noise. `shrink_hessian` draws both towards the layer's pooled H.

Refused: scales that follow the errors inside the loop (they need groups rounded one after the
other, which gives up the order of columns), and aiming at the intact model's outputs instead of
the compressed one's (W X_intact: on the demo model it moved the error by 1 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.device import has_kernels
from quant.columns import rounded_in_order
from quant.factor import damped_factor
from quant.grid import Grid
from quant.refine import refine
from quant.rounding import make_grid, round_to_nearest, searched_steps
from quant.schemes import FP8_BLOCK_SIDE, Quantized, Scheme, dequantize


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSettings:
    """`damping` is relative to the mean diagonal; `sweeps` of refinement follow the loop.

    Sweeps not given are 2 on a CPU and 1 on a GPU, where a second takes 40 % more time and
    gives little: one DeepSeek-V3.2 expert at W3A16, 16 together on an H200, takes 15.8 ms
    instead of 22.4, at errors of .00349 and .00424 instead of .00346 and .00421 (gate and up, down;
    benchmarks/gptq_gpu.py, 2026-11-23, synthetic inputs).
    """

    damping: float = 0.01
    sweeps: int | None = None

    def sweeps_on(self, weight: torch.Tensor) -> int:
        """How many sweeps follow for this weight."""
        if self.sweeps is not None:
            return self.sweeps
        return 1 if has_kernels(weight) else 2


@dataclass(frozen=True, slots=True)
class Solved:
    """Rounded weights, and what that costs in the layer's output, row by row.

    `error_BN` is (W − Q) H (W − Q)ᵀ and `energy_BN` W H Wᵀ, diagonals, by the undamped Hessian.
    `damping_B` is the relative damping that was needed; NaN where the Hessian could not be
    factorised and the weight was rounded to nearest instead.
    """

    quantized: Quantized
    error_BN: torch.Tensor
    energy_BN: torch.Tensor
    damping_B: torch.Tensor

    @property
    def fell_back_B(self) -> torch.Tensor:
        """Which weights were rounded to nearest."""
        return torch.isnan(self.damping_B)

    def relative_error_B(self, rows: slice = slice(None)) -> torch.Tensor:
        """Relative output error of each weight, or of the `rows` of one of those stacked."""
        energy = self.energy_BN[:, rows].double().sum(1)
        return self.error_BN[:, rows].double().sum(1) / energy.clamp_min(1e-300)


def gptq(
    weight_BNK: torch.Tensor,
    hessian_BKK: torch.Tensor,
    scheme: Scheme,
    *,
    global_scale_B: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    settings: GptqSettings | None = None,
) -> Solved:
    """Round weights [B, N, K] to `scheme` under Hessians [B, K, K] (any common factor).

    NVFP4 divisors [B] as in `round_to_nearest`. Rows may be several matrices stacked; FP8 blocks
    then need each a multiple of 128 rows. Weights must be finite.
    """
    settings = settings or GptqSettings()
    weight, hessian = weight_BNK.detach().float(), hessian_BKK.float()
    grid = make_grid(weight, scheme, global_scale_B, scale_dtype)
    damped, factor, damping_B = damped_factor(hessian, settings.damping)
    step_BNG, zero_BNG = searched_steps(weight, grid, factor.importance_BK)
    weight_BKN = _transposed(weight)
    step_BGN = step_BNG.mT.contiguous()
    zero_BGN = None if zero_BNG is None else zero_BNG.mT.contiguous()
    values_BKN, _ = rounded_in_order(weight_BKN, step_BGN, zero_BGN, factor, grid)
    del factor  # as large as the Hessian
    sweeps = settings.sweeps_on(weight)
    if sweeps and scheme.kind in ("int", "nvfp4"):
        refine(weight_BKN, values_BKN, step_BGN, zero_BGN, damped, grid, sweeps)
    step_BNG = step_BGN.mT
    if scheme.kind == "fp8_block":
        step_BNG = step_BNG[:, ::FP8_BLOCK_SIDE]
    zero = None if zero_BGN is None else zero_BGN.mT.contiguous()
    solved = grid.quantized(_transposed(values_BKN), step_BNG.contiguous(), zero)
    solved = _with_fallback(solved, weight, hessian, torch.isnan(damping_B), grid)
    residual = weight - dequantize(solved, scheme)
    return Solved(solved, energy(residual, hessian), energy(weight, hessian), damping_B)


def _transposed(matrix_BNK: torch.Tensor) -> torch.Tensor:
    """[B, N, K] -> [B, K, N], contiguous."""
    if has_kernels(matrix_BNK):
        from quant.kernels import products

        return products.transposed(matrix_BNK)
    return matrix_BNK.mT.contiguous()


def energy(rows_BNK: torch.Tensor, hessian_BKK: torch.Tensor) -> torch.Tensor:
    """r H rᵀ of every row, [B, N], H symmetric. On a GPU in TF32, each pair of channels once."""
    if has_kernels(rows_BNK):
        from quant.kernels import products

        return products.energy(rows_BNK, hessian_BKK)
    return ((rows_BNK @ hessian_BKK) * rows_BNK).sum(-1)


def shrink_hessian(
    hessian_BKK: torch.Tensor,
    tokens_B: torch.Tensor,
    pooled_KK: torch.Tensor,
    strength: float | None = None,
) -> torch.Tensor:
    """H'_e = (n_e H_e + m P) / (n_e + m), for Hessians per token: H_e = X_eᵀX_e / n_e.

    P is the pooled Hessian per routed token of the layer and m = `strength` its weight in tokens,
    K where not given; an expert that saw none gets P itself. Gate and up read the same stream of
    hidden states in every expert, so P is the layer's own. The channels of down's inputs mean
    something else in each expert: P should then be `isotropic`. (Held-out error of the demo model's
    experts at W3A16, 64 tokens seen, relative to rounding to nearest: gate and up .48 without,
    .26 with m = K; down 1.93 without, .87 with the layer's own P, .79 with an isotropic one.)
    """
    weight = float(hessian_BKK.shape[-1] if strength is None else strength)
    tokens = tokens_B.to(hessian_BKK)[:, None, None]
    own = torch.where(tokens > 0, hessian_BKK * tokens, 0.0)
    pooled = pooled_KK.to(hessian_BKK).unsqueeze(0)
    blended = (own + weight * pooled) / (tokens + weight).clamp_min(1e-30)
    return torch.where(tokens > 0, blended, pooled)


def isotropic(hessian_KK: torch.Tensor) -> torch.Tensor:
    """The mean of the diagonal times the identity."""
    mean = hessian_KK.diagonal().mean()
    return mean * torch.eye(len(hessian_KK), device=hessian_KK.device, dtype=hessian_KK.dtype)


def _with_fallback(
    solved: Quantized,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fell_back_B: torch.Tensor,
    grid: Grid,
) -> Quantized:
    """Weights whose Hessian could not be factorised, rounded to nearest (weighted where its
    diagonal can serve)."""
    for index in fell_back_B.nonzero().flatten().tolist():
        diagonal = hessian[index].diagonal()
        usable = bool(torch.isfinite(diagonal).all() and (diagonal > 0).any())
        divisor = None if grid.global_scale_B is None else grid.global_scale_B[index : index + 1]
        plain = round_to_nearest(
            weight[index : index + 1],
            grid.scheme,
            importance_BK=diagonal.clamp_min(0).unsqueeze(0) if usable else None,
            global_scale_B=divisor,
            scale_dtype=grid.scale_dtype,
        )
        solved.codes[index], solved.scale[index] = plain.codes[0], plain.scale[0]
        if solved.zero_point is not None and plain.zero_point is not None:
            solved.zero_point[index] = plain.zero_point[0]
    return solved
