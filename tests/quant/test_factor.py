"""The ordered factor of a Hessian against a float64 elimination written out."""

from __future__ import annotations

import torch

from benchmarks.correlated import correlated
from quant.factor import damped_factor, factorise


def smallest_pivot_order(hessian: torch.Tensor) -> list[int]:
    """From the last column to the first, always the smallest remaining pivot. Schur complements."""
    rest, left, taken = hessian.double().clone(), list(range(len(hessian))), []
    while left:
        channel = min(left, key=lambda j: rest[j, j].item())
        rest = rest - torch.outer(rest[:, channel], rest[channel]) / rest[channel, channel]
        left.remove(channel)
        taken.append(channel)
    return taken[::-1]


def test_factor_is_the_hessian_in_its_order() -> None:
    """150 columns: two whole blocks of elimination and a ragged one."""
    _, hessian = correlated(3, 1, 150, 600, seed=1)
    hessian += 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(150)
    factor, good = factorise(hessian)
    assert good.all()
    for matrix, order, upper, pivots, importance in zip(
        hessian,
        factor.order_BK,
        factor.upper_BKK,
        factor.pivots_BK,
        factor.importance_BK,
        strict=True,
    ):
        assert order.tolist() == smallest_pivot_order(matrix)
        assert torch.equal(upper, torch.triu(upper))
        assert torch.equal(upper.diagonal(), torch.ones(150))
        rebuilt = (upper.double() * pivots.double()) @ upper.double().T
        scale = matrix.diagonal().max()
        assert (rebuilt - matrix[order][:, order]).abs().max() < 1e-5 * scale
        assert torch.equal(importance[order], pivots)


def test_uncorrelated_channels_come_in_descending_order() -> None:
    diagonal = torch.tensor([3.0, 1.0, 7.0, 5.0])
    factor, _ = factorise(torch.diag(diagonal).unsqueeze(0))
    assert factor.order_BK.tolist() == [[2, 3, 0, 1]]


def test_damping_is_raised_where_it_must_and_only_there() -> None:
    _, hessian = correlated(4, 1, 48, 200, seed=2)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    values, vectors = torch.linalg.eigh(hessian[1])
    values[0] = -0.05 * mean[1]  # damping of .01 leaves this indefinite, .1 does not
    hessian[1] = vectors @ torch.diag(values) @ vectors.T
    hessian[2, 5, 5] = float("nan")
    hessian[3] = 0
    damped, factor, used = damped_factor(hessian, 0.01)
    assert used[0].item() == torch.tensor(0.01).item()
    assert abs(used[1].item() - 0.1) < 1e-6
    assert torch.isnan(used[2:]).all()
    assert torch.isfinite(factor.upper_BKK).all()
    assert torch.equal(damped[2], torch.eye(48))
    alone, _, _ = damped_factor(hessian[:1], 0.01)
    assert torch.equal(alone[0], damped[0])


def test_dead_channels_are_cut_off() -> None:
    _, hessian = correlated(1, 1, 32, 100, seed=3)
    hessian[0, 7] = 1e-3  # rounding noise beside a zero diagonal
    hessian[0, :, 7] = 1e-3
    hessian[0, 7, 7] = 0
    damped, factor, used = damped_factor(hessian, 0.01)
    assert not torch.isnan(used).any()
    assert factor.order_BK[0, -1] == 7
    others = [k for k in range(32) if k != 7]
    assert (damped[0, 7, others] == 0).all()
    assert damped[0, 7, 7] > 0
    assert (factor.upper_BKK[0, :-1, -1] == 0).all()
