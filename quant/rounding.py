"""Round-to-nearest with searched scales.

For each group the scale minimises the weighted squared error of rounding,

    sum_k  h_k (w_k − step · nearest(w_k / step))²,

h being the importance of input channel k (the diagonal of its Hessian, or the pivots of its
factorisation) or 1. The error is no smooth function of the step, so candidates around the plain
one are tried: shrinking saturates the largest weights and refines the rest. Integer grids then get
two rounds of the closed form step = Σ h w v / Σ h v² for the codes v found. Candidates are compared
after rounding to the stored type.

Full range: the largest magnitude maps to −2^(b−1), so the scale takes the sign opposite to it;
the other sign is tried as well. Zero points: candidates shrink [min, max] around zero, and every
symmetric candidate is tried with z = 2^(b−1) and 2^(b−1) − 1 (the other sign), so that they never
lose to the symmetric grid; their scales are positive.
FP8 is not searched: relative precision does not depend on the scale, which maps the largest
magnitude to 448.

Refused: exponent-2.4 norms and early stopping as in llm-compressor's observer (the error that
counts is squared, and candidates are few).
"""

from __future__ import annotations

import torch

from models.device import has_kernels
from models.fp8_blocks import E4M3_MAX
from quant.grid import E2M1_MAX, Grid
from quant.nvfp4 import block_factors, global_divisor
from quant.schemes import FP8_BLOCK_SIDE, Quantized, Scheme

SEARCHED_AT_ONCE = 1 << 21  # weights; bounds the temporaries of a search
LEAST_SQUARES_ROUNDS = 2
KERNEL_GROUPS = (8, 16, 32, 64, 128, 256)  # sizes of groups that a kernel searches


def round_to_nearest(
    weight_BNK: torch.Tensor,
    scheme: Scheme,
    *,
    importance_BK: torch.Tensor | None = None,
    global_scale_B: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    search: bool = True,
) -> Quantized:
    """Weights [..., N, K] rounded to `scheme`, each with its own scales.

    `importance_BK` [..., K] weighs squared errors by input channel. `global_scale_B` [...] holds
    the NVFP4 divisors (of the fused set's joint amax); left out, each weight gets its own.
    K must fit the scheme's groups (`Scheme.check`).
    """
    batch = weight_BNK.shape[:-2]
    stored = weight_BNK.detach().reshape(-1, *weight_BNK.shape[-2:])
    weight = stored.float()
    importance = None if importance_BK is None else importance_BK.float().reshape(len(weight), -1)
    grid = make_grid(weight, scheme, global_scale_B, scale_dtype)
    if scheme.kind == "fp8_block":
        if has_kernels(stored):
            from quant.kernels.pack import fp8_blocks

            return _unbatched(Quantized(*fp8_blocks(stored)), batch)
        step = grid.stored(_block_amax(weight) / E4M3_MAX)
        values = grid.nearest(weight / spread_blocks(step, weight.shape))
        return _unbatched(grid.quantized(values, step), batch)
    step, zero = searched_steps(weight, grid, importance, search=search)
    size = weight.shape[-1] // step.shape[-1]
    if has_kernels(stored) and scheme.group_size in KERNEL_GROUPS:
        from quant.kernels.pack import round_codes

        codes = round_codes(stored, step, zero, grid)
        return _unbatched(grid.with_codes(codes, step, zero), batch)
    values = torch.empty_like(weight)
    for chunk in row_chunks(weight.shape):
        grouped = weight[:, chunk].unflatten(-1, (-1, size))
        at = None if zero is None else zero[:, chunk].unsqueeze(-1)
        values[:, chunk] = grid.nearest(grouped / step[:, chunk].unsqueeze(-1), at).flatten(-2)
    return _unbatched(grid.quantized(values, step, zero), batch)


def make_grid(
    weight_BNK: torch.Tensor,
    scheme: Scheme,
    global_scale_B: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> Grid:
    """The grid of these weights; NVFP4 divisors from each weight's own amax where not given."""
    if scheme.kind != "nvfp4":
        return Grid(scheme, scale_dtype)
    if global_scale_B is None:
        global_scale_B = global_divisor(weight_BNK.abs().amax(dim=(-2, -1)))
    divisor = global_scale_B.to(weight_BNK.device, torch.float32).reshape(-1)
    return Grid(scheme, scale_dtype, divisor.expand(len(weight_BNK)))


def searched_steps(
    weight_BNK: torch.Tensor,
    grid: Grid,
    importance_BK: torch.Tensor | None,
    *,
    search: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored steps [B, N, G] and zero points of the same shape (None for symmetric grids).

    For FP8 blocks the steps of a block are repeated for each of its rows.
    """
    batch, rows, columns = weight_BNK.shape
    if grid.scheme.kind == "fp8_block":
        step = grid.stored(_block_amax(weight_BNK) / E4M3_MAX)
        return step.repeat_interleave(FP8_BLOCK_SIDE, dim=-2)[:, :rows], None
    size = grid.scheme.group_size or columns
    if has_kernels(weight_BNK) and grid.scheme.group_size in KERNEL_GROUPS:
        from quant.kernels import search as kernels

        rounds = LEAST_SQUARES_ROUNDS if search and grid.scheme.kind == "int" else 0
        factors = candidate_factors(grid.scheme, search)
        return kernels.searched_steps(weight_BNK, grid, importance_BK, factors, rounds)
    shape = (batch, rows, columns // size)
    step = weight_BNK.new_empty(shape)
    zero = None if grid.scheme.symmetric else weight_BNK.new_empty(shape)
    importance = None
    if importance_BK is not None:
        importance = importance_BK.unflatten(-1, (-1, size)).unsqueeze(1)  # [B, 1, G, g]
    for chunk in row_chunks(weight_BNK.shape):
        grouped = weight_BNK[:, chunk].unflatten(-1, (-1, size))
        best = _Best(grouped, importance, grid)
        _try_candidates(best, search)
        step[:, chunk] = best.step
        if zero is not None:
            zero[:, chunk] = best.zero
    return step, zero


def row_chunks(shape: torch.Size) -> list[slice]:
    """Slices of rows of [B, N, K] that hold a bounded number of weights each."""
    rows = max(1, SEARCHED_AT_ONCE // (shape[0] * shape[2]))
    return [slice(start, start + rows) for start in range(0, shape[1], rows)]


def spread_blocks(step: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """FP8 block steps [B, ceil(N/128), ceil(K/128)] -> [B, N, K]."""
    rows = step.repeat_interleave(FP8_BLOCK_SIDE, dim=-2)[:, : shape[-2]]
    return rows.repeat_interleave(FP8_BLOCK_SIDE, dim=-1)[..., : shape[-1]]


class _Best:
    """The best step (and zero point) so far of every group of [B, N, G, g] weights."""

    def __init__(self, grouped: torch.Tensor, importance: torch.Tensor | None, grid: Grid) -> None:
        self.grouped, self.importance, self.grid = grouped, importance, grid
        self.low, self.high = torch.aminmax(grouped, dim=-1)
        self.amax = torch.maximum(-self.low, self.high)
        self.error = torch.full_like(self.amax, torch.inf)
        self.step = torch.ones_like(self.amax)
        self.zero = torch.zeros_like(self.amax)

    def offer(self, step: torch.Tensor, zero: torch.Tensor | None = None) -> None:
        """Take `step` where it errs less. A group of zeros keeps the step 1 (stored as it can)."""
        step = self.grid.stored(torch.where(self.amax > 0, step, 1.0))
        values = self.values(step, zero)
        error = (self.grouped - values * step.unsqueeze(-1)).square_()
        if self.importance is not None:
            error *= self.importance
        total = error.sum(-1)
        better = total < self.error
        self.error = torch.where(better, total, self.error)
        self.step = torch.where(better, step, self.step)
        if zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def values(self, step: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        at = None if zero is None else zero.unsqueeze(-1)
        return self.grid.nearest(self.grouped / step.unsqueeze(-1), at)

    def least_squares(self, zero: torch.Tensor | None) -> torch.Tensor:
        """The step that errs least with the codes of the best one."""
        values = self.values(self.step, zero)
        weighted = values if self.importance is None else values * self.importance
        norm = (weighted * values).sum(-1)
        fitted = (weighted * self.grouped).sum(-1) / norm
        return torch.where(norm > 0, fitted, self.step)


def _try_candidates(best: _Best, search: bool) -> None:
    scheme, levels = best.grid.scheme, best.grid.levels
    if scheme.kind == "fp8_channel":
        best.offer(best.amax / E4M3_MAX)
        return
    if scheme.kind == "nvfp4":
        for factor in candidate_factors(scheme, search):
            best.offer(best.amax / E2M1_MAX * factor)
        return
    full = best.amax / (levels // 2)
    if scheme.symmetric:
        outward = torch.where(best.high > -best.low, -full, full)
        for factor in candidate_factors(scheme, search):
            best.offer(outward * factor)
            best.offer(outward * -factor)
    else:
        low, high = best.low.clamp(max=0), best.high.clamp(min=0)
        middle = torch.full_like(full, levels // 2)
        for factor in candidate_factors(scheme, search):
            step = best.grid.stored((high - low) * (factor / (levels - 1)))
            best.offer(step, torch.round(-low * factor / step).clamp_(0, levels - 1))
            best.offer(full * factor, middle)
            best.offer(full * factor, middle - 1)
    for _ in range(LEAST_SQUARES_ROUNDS if search else 0):
        at = None if scheme.symmetric else best.zero
        best.offer(best.least_squares(at), at)


def candidate_factors(scheme: Scheme, search: bool) -> tuple[float, ...]:
    """Factors of the plain scale, 1 first. The fewer the levels, the more shrinking pays."""
    if scheme.kind == "nvfp4":
        return block_factors(search)
    if not search:
        return (1.0,)
    percents = range(40, 111, 5) if scheme.bits <= 4 else range(90, 102, 1)
    return (1.0, *(percent / 100 for percent in percents))


def _block_amax(weight_BNK: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each 128 x 128 block, ragged at the edges."""
    rows, columns = weight_BNK.shape[-2:]
    side = FP8_BLOCK_SIDE
    padded = torch.nn.functional.pad(weight_BNK, (0, -columns % side, 0, -rows % side))
    return padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).abs().amax(dim=(-3, -1))


def _unbatched(quantized: Quantized, batch: torch.Size) -> Quantized:
    """[B, ...] back to the leading dimensions the caller had."""

    def shaped(part: torch.Tensor) -> torch.Tensor:
        return part.reshape(*batch, *part.shape[1:])

    zero, divisor = quantized.zero_point, quantized.global_scale
    return Quantized(
        shaped(quantized.codes),
        shaped(quantized.scale),
        None if zero is None else shaped(zero),
        None if divisor is None else shaped(divisor),
    )
