"""The kernels of quant/kernels against the CPU's functions: on a GPU, or interpreted.

Sums are formed in another order, and on a GPU some products in TF32, so that near ties turn; what
must agree is the error of the result. The interpreter wants loops whose length is known when
they are compiled: what has others runs on a GPU only.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.correlated import correlated
from quant import columns, factor, refine, rounding
from quant.gptq import GptqSettings, energy, gptq
from quant.grid import Grid
from quant.schemes import SCHEMES, Scheme, dequantize, int_scheme

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from quant.kernels import columns as column_kernels  # noqa: E402
from quant.kernels import elimination, refinement, search  # noqa: E402

on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="wants a GPU")
SHAPES = [  # scheme, columns: of one block, of several, of one and a ragged one
    (int_scheme(3, 32, True), 64),
    (int_scheme(3, 128, True), 640 if DEVICE.type == "cuda" else 256),
    (int_scheme(4, 64, False), 192),
    (int_scheme(8, 8, True), 24),
    (SCHEMES["NVFP4A16"], 144),
]


def named(value: object) -> str:
    if not isinstance(value, Scheme):
        return str(value)
    return f"{value.name}-g{value.group_size}-{'sym' if value.symmetric else 'zero'}"


def damped(batch: int, rows: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, hessian = correlated(batch, rows, size, 4 * size, seed)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    return weight, hessian + 0.01 * mean[:, None, None] * torch.eye(size)


@pytest.mark.parametrize("size", [5, 48, 128, pytest.param(300, marks=on_gpu)])
def test_factor_is_the_hessian_in_its_order(size: int) -> None:
    _, hessian = damped(3, 1, size, seed=size)
    hessian[2] = -hessian[2]
    found, good = elimination.factorise(hessian.to(DEVICE))
    assert good.tolist() == [True, True, False]
    for b in range(2):
        order, upper = found.order_BK[b].cpu(), found.upper_BKK[b].double().cpu()
        assert sorted(order.tolist()) == list(range(size))
        assert torch.equal(upper, torch.triu(upper))
        assert torch.equal(upper.diagonal(), torch.ones(size, dtype=torch.float64))
        rebuilt = (upper * found.pivots_BK[b].double().cpu()) @ upper.T
        scale = hessian[b].diagonal().max()
        assert (rebuilt - hessian[b][order][:, order]).abs().max() < 1e-5 * scale
        assert (hessian[b].diagonal()[order].diff() <= 0).all()


def test_inverse_of_a_block() -> None:
    _, hessian = damped(2, 1, 40, seed=0)
    _, inverse = elimination.factor_with_inverse(hessian.to(DEVICE))
    assert (inverse.double().cpu() @ hessian.double() - torch.eye(40)).abs().max() < 1e-3


@pytest.mark.parametrize(("scheme", "size"), SHAPES, ids=named)
@pytest.mark.parametrize("weighted", [False, True])
def test_search(scheme: Scheme, size: int, weighted: bool) -> None:
    weight, hessian = damped(2, 19, size, seed=1)
    weight[0, 3] = 0
    weight[1, :, : scheme.group_size] = weight[1, :, : scheme.group_size].abs()
    importance = hessian.diagonal(dim1=1, dim2=2) if weighted else None
    grid = rounding.make_grid(weight, scheme, None, torch.bfloat16)
    wanted = rounding.searched_steps(weight, grid, importance)
    given = rounding.make_grid(weight.to(DEVICE), scheme, None, torch.bfloat16)
    found = search.searched_steps(
        weight.to(DEVICE),
        given,
        None if importance is None else importance.to(DEVICE),
        rounding.candidate_factors(scheme, True),
        rounding.LEAST_SQUARES_ROUNDS if scheme.kind == "int" else 0,
    )
    costs = []
    for step, zero in (wanted, found):
        step, grouped = step.cpu(), weight.unflatten(-1, (-1, int(scheme.group_size or 0)))
        at = None if zero is None else zero.cpu().unsqueeze(-1)
        values = grid.nearest(grouped / step.unsqueeze(-1), at)
        error = (grouped - values * step.unsqueeze(-1)).square().flatten(-2)
        costs.append((error if importance is None else error * importance[:, None]).sum((1, 2)))
    torch.testing.assert_close(costs[1], costs[0], rtol=1e-4, atol=0)
    # NVFP4's are quotients, whose last bit a GPU's division may turn
    assert torch.isclose(wanted[0], found[0].cpu(), rtol=1e-6, atol=0).double().mean() > 0.99


@pytest.mark.parametrize(("scheme", "size"), SHAPES, ids=named)
def test_loop_and_refinement(scheme: Scheme, size: int) -> None:
    weight, hessian = damped(2, 19, size, seed=2)
    grid = rounding.make_grid(weight, scheme, None, torch.bfloat16)
    here, _ = factor.factorise(hessian)
    parts = factor.Factor(*(getattr(here, name).to(DEVICE) for name in here.__slots__))
    step, zero = rounding.searched_steps(weight, grid, here.importance_BK)
    given = [
        None if part is None else part.mT.contiguous().to(DEVICE) for part in (weight, step, zero)
    ]
    wanted = [None if part is None else part.cpu().clone() for part in given]
    there = Grid(grid.scheme, grid.scale_dtype, _moved(grid.global_scale_B))

    def error(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        spread = step.cpu().repeat_interleave(size // step.shape[1], dim=1)
        return energy((wanted[0] - values.cpu() * spread).mT.double(), hessian.double()).sum(1)

    values, cost = columns.rounded_in_order(*wanted, here, grid)
    found, found_cost = column_kernels.rounded_in_order(*given, parts, there)
    torch.testing.assert_close(found_cost.cpu().sum(1), cost.sum(1), rtol=0.02, atol=0)
    torch.testing.assert_close(
        found_cost.double().cpu().sum(1), error(found, given[1]), rtol=2e-3, atol=0
    )
    before = error(values, wanted[1])
    found = values.clone().to(DEVICE)  # both refine the same
    refine.refine(wanted[0], values, wanted[1], wanted[2], hessian, grid, 2)
    refinement.refine(
        given[0], found, given[1], given[2], hessian.to(DEVICE), there, 2, refine.FACTORS
    )
    assert (error(found, given[1]) <= before).all()
    assert (error(found, given[1]) < 1.06 * error(values, wanted[1])).all()


def _moved(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.to(DEVICE)


@on_gpu
@pytest.mark.parametrize(
    ("scheme", "size"),
    [*SHAPES, (int_scheme(3, 256, True), 512), (int_scheme(3, 24, True), 72)]
    + [(SCHEMES[name], 256) for name in ("W8A16", "NVFP4", "FP8_BLOCK", "FP8_DYNAMIC")],
    ids=named,
)
def test_whole_solutions_agree(scheme: Scheme, size: int) -> None:
    weight, hessian = correlated(3, 128, size, 4 * size, seed=3)
    hessian[1, :, 5] = hessian[1, 5] = 0  # a channel that nothing moves
    hessian[2] = 0  # an expert without tokens
    for sweeps in (0, 2):
        settings = GptqSettings(sweeps=sweeps)
        wanted = gptq(weight, hessian, scheme, settings=settings)
        found = gptq(weight.to(DEVICE), hessian.to(DEVICE), scheme, settings=settings)
        assert found.fell_back_B.tolist() == [False, False, True]
        decoded = dequantize(found.quantized, scheme).cpu()
        theirs = energy(weight - dequantize(wanted.quantized, scheme), hessian).sum(1)
        ours = energy(weight - decoded, hessian).sum(1)
        assert (ours[:2] < 1.03 * theirs[:2]).all()
        torch.testing.assert_close(found.error_BN.sum(1).cpu(), ours, rtol=2e-3, atol=1e-9)
        assert torch.equal(
            found.quantized.codes[2].cpu().float(), wanted.quantized.codes[2].float()
        )
