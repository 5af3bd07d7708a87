"""GPTQ against the textbook algorithm in float64 and against llm-compressor's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.correlated import correlated
from benchmarks.gptq_peer import OBSERVERS, llmcompressor_gptq
from quant.columns import rounded_in_order
from quant.factor import damped_factor
from quant.gptq import GptqSettings, energy, gptq, isotropic, shrink_hessian
from quant.grid import Grid
from quant.nvfp4 import global_divisor
from quant.rounding import round_to_nearest, searched_steps
from quant.schemes import SCHEMES, Scheme, dequantize, int_scheme

EVERY = [
    int_scheme(3, 32, True),
    int_scheme(3, 32, False),
    int_scheme(4, 32, True),
    SCHEMES["W8A16"],
    SCHEMES["NVFP4A16"],
    SCHEMES["FP8_BLOCK"],
    SCHEMES["FP8_DYNAMIC"],
]


def named(scheme: Scheme) -> str:
    return f"{scheme.name}-{'sym' if scheme.symmetric else 'zero'}"


def textbook(
    weight: torch.Tensor, damped: torch.Tensor, order: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Column by column with the inverse Hessian updated after each (Frantar et al., equation 2),
    float64, 3-bit codes under `step` [N, K]. No factorisation."""
    rest = weight.double().clone()
    inverse = torch.linalg.inv(damped.double())
    codes = torch.zeros_like(rest)
    for j in order.tolist():
        codes[:, j] = torch.round(rest[:, j] / step[:, j]).clamp(-4, 3)
        error = (rest[:, j] - codes[:, j] * step[:, j]) / inverse[j, j]
        rest -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1
    return codes


def test_column_loop_is_the_textbooks() -> None:
    weight, hessian = correlated(2, 24, 96, 500, seed=0)
    grid = Grid(int_scheme(3, 32, True), torch.bfloat16)
    damped, factor, _ = damped_factor(hessian, 0.01)
    step, _ = searched_steps(weight, grid, factor.importance_BK)
    values, cost = rounded_in_order(
        weight.mT.contiguous(), step.mT.contiguous(), None, factor, grid
    )
    spread = step.repeat_interleave(32, dim=2)
    errors = energy(weight - values.mT * spread, damped)
    torch.testing.assert_close(cost, errors, rtol=1e-3, atol=1e-7)
    for b in range(2):
        codes = textbook(weight[b], damped[b], factor.order_BK[b], spread[b].double())
        assert (codes != values[b].T).double().mean() < 0.02  # near ties may turn in float32
        theirs = energy((weight[b] - codes.float() * spread[b])[None], damped[b : b + 1]).sum()
        assert abs(errors[b].sum() / theirs - 1) < 0.01


@pytest.mark.parametrize(("name", "bound"), [("W3A16", 0.7), ("W4A16", 0.8), ("NVFP4A16", 0.8)])
def test_error_is_clearly_below_llm_compressors(name: str, bound: float) -> None:
    """Same weights, Hessians, scheme, static order; its default scales and its MSE-searched."""
    scheme = SCHEMES[name]
    weight, hessian = correlated(2, 64, 256, 1000, seed=1)
    solved = gptq(weight, hessian, scheme)
    ours = energy(weight - dequantize(solved.quantized, scheme), hessian).sum(1)
    for observer in ("memoryless_minmax", OBSERVERS[scheme.kind]):
        decoded = llmcompressor_gptq(weight, hessian, scheme, observer)
        theirs = energy(weight - decoded, hessian).sum(1)
        assert (ours < bound * theirs).all(), observer


@pytest.mark.parametrize("scheme", EVERY, ids=named)
def test_error_falls_with_each_part(scheme: Scheme) -> None:
    """Round to nearest, then GPTQ, then refinement; and the reported error is the true one."""
    weight, hessian = correlated(2, 128, 128, 600, seed=2)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    plain = round_to_nearest(weight, scheme, importance_BK=diagonal)
    nearest = energy(weight - dequantize(plain, scheme), hessian).sum(1)
    loop, refined = (
        gptq(weight, hessian, scheme, settings=GptqSettings(sweeps=sweeps)) for sweeps in (0, 2)
    )
    assert (loop.error_BN.sum(1) < 0.9 * nearest).all()
    assert (refined.error_BN.sum(1) <= loop.error_BN.sum(1)).all()
    if scheme.bits < 5:
        assert (refined.error_BN.sum(1) < 0.98 * loop.error_BN.sum(1)).all()
    exact = (weight - dequantize(refined.quantized, scheme)).double()
    error = torch.einsum("bnk,bkl,bnl->b", exact, hessian.double(), exact)
    whole = torch.einsum("bnk,bkl,bnl->b", weight.double(), hessian.double(), weight.double())
    torch.testing.assert_close(refined.relative_error_B(), error / whole, rtol=1e-3, atol=0)
    assert not refined.fell_back_B.any()
    scale = refined.quantized.scale.float()
    assert torch.isfinite(scale).all()
    assert ((scale != 0) if scheme.symmetric and scheme.kind == "int" else (scale > 0)).all()


@pytest.mark.parametrize("name", ["W3A16", "NVFP4A16"])
def test_rows_do_not_see_each_other(name: str) -> None:
    """Gate and up stacked over one factor: the error of each is that of solving it alone."""
    scheme = SCHEMES[name]
    weight, hessian = correlated(1, 64, 128, 500, seed=3)
    divisor = global_divisor(weight.abs().amax()).reshape(1)
    stacked = gptq(weight, hessian, scheme, global_scale_B=divisor)
    for rows in (slice(0, 32), slice(32, 64)):
        alone = gptq(weight[:, rows], hessian, scheme, global_scale_B=divisor)
        error = alone.relative_error_B().item()
        assert stacked.relative_error_B(rows).item() == pytest.approx(error, rel=0.01)


def test_same_input_same_bits() -> None:
    weight, hessian = correlated(2, 32, 128, 500, seed=4)
    first, second = (gptq(weight, hessian, SCHEMES["W3A16"]) for _ in range(2))
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    assert torch.equal(first.quantized.scale, second.quantized.scale)


def test_dead_channels_keep_their_nearest_code() -> None:
    weight, hessian = correlated(1, 32, 128, 500, seed=5)
    dead = [3, 64, 127]
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    scheme = int_scheme(4, 64, True)
    quantized = gptq(weight, hessian, scheme).quantized
    scale = quantized.scale.float().repeat_interleave(64, dim=2)
    nearest = torch.round(weight / scale).clamp(-8, 7)
    assert torch.equal(quantized.codes[:, :, dead].float(), nearest[:, :, dead])
    assert (quantized.codes[:, :, dead] != 0).any()


@pytest.mark.parametrize("scheme", EVERY, ids=named)
def test_hopeless_hessians_fall_back_and_say_so(scheme: Scheme) -> None:
    weight, hessian = correlated(3, 128, 128, 500, seed=6)
    hessian[1] = 0
    hessian[2, 0, 0] = float("inf")
    solved = gptq(weight, hessian, scheme)
    assert solved.fell_back_B.tolist() == [False, True, True]
    plain = round_to_nearest(weight[1:], scheme)
    assert torch.equal(solved.quantized.codes[1:].float(), plain.codes.float())
    assert torch.equal(solved.quantized.scale[1:].float(), plain.scale.float())
    alone = gptq(weight[:1], hessian[:1], scheme)
    assert solved.relative_error_B()[0].item() == pytest.approx(
        alone.relative_error_B().item(), rel=0.01
    )


def test_shrinking_by_hand() -> None:
    own = torch.tensor([[[4.0, 1.0], [1.0, 2.0]]]).repeat(3, 1, 1)
    pooled = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    own[2] = float("nan")  # nothing was divided by no tokens
    shrunk = shrink_hessian(own, torch.tensor([6, 2, 0]), pooled, strength=2.0)
    expected = [[(6 * 4 + 2 * 1) / 8, (6 * 1 + 2 * 0.5) / 8], [0.875, (6 * 2 + 2 * 3) / 8]]
    assert torch.allclose(shrunk[0], torch.tensor(expected))
    assert torch.allclose(shrunk[1], (own[1] + pooled) / 2)
    assert torch.equal(shrunk[2], pooled)
    default = shrink_hessian(own[:1], torch.tensor([2]), pooled)  # two channels: two tokens
    assert torch.allclose(default[0], (own[0] + pooled) / 2)
    assert torch.equal(isotropic(pooled), torch.diag(torch.tensor([2.0, 2.0])))


def test_few_tokens_gain_from_the_pool() -> None:
    """An expert that saw 32 of the tokens its peers saw; judged on all of them."""
    scheme = int_scheme(3, 32, True)
    weight, whole = correlated(1, 32, 64, 2000, seed=7)
    root = torch.linalg.cholesky(whole[0].double())
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = (noise @ root.T).float()
    few = (inputs.T @ inputs / 32).unsqueeze(0)
    tokens = torch.tensor([32])

    def judged(hessian: torch.Tensor) -> float:
        decoded = dequantize(gptq(weight, hessian, scheme).quantized, scheme)
        return energy(weight - decoded, whole).sum().item()

    assert judged(shrink_hessian(few, tokens, whole[0])) < 0.8 * judged(few)
