"""Gate and up corrected by descent: against dense experts in float64, and what must not move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reap.repair_descent import Aim, FedTokens, Matrices, descend, moved, outputs

T, K, E, D, WIDTH = 600, 2, 5, 6, 4  # the last expert has no token


def gated(up_PG: torch.Tensor) -> torch.Tensor:
    gate, up = up_PG.chunk(2, -1)
    return F.silu(gate) * up


def made_up(seed: int = 0) -> tuple[FedTokens, Matrices]:
    draw = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(T, E - 1, generator=draw).topk(K).indices
    fed = FedTokens(
        torch.randn(T, D, generator=draw), expert_TK, torch.rand(T, K, generator=draw) + 0.2
    )
    up = torch.randn(E, 2 * WIDTH, D, generator=draw) * 0.5
    down = torch.randn(E, D, WIDTH, generator=draw)
    return fed, Matrices(list(up), list(down))


def dense(fed: FedTokens, matrices: Matrices) -> torch.Tensor:
    """Every expert on every token, in float64, weighted by 0 where it was not chosen."""
    total = torch.zeros(T, D, dtype=torch.float64)
    for expert, (up, down) in enumerate(zip(matrices.up, matrices.down, strict=True)):
        weight = (fed.weight_TK * (fed.expert_TK == expert)).sum(1).double()
        middle = gated(fed.inputs_TD.double() @ up.double().T)
        total += weight[:, None] * (middle @ down.double().T)
    return total


def aim_of(wanted_TD: torch.Tensor, seed: int = 1) -> Aim:
    weight_T = torch.rand(T, generator=torch.Generator().manual_seed(seed)) + 0.1
    return Aim(wanted_TD.float(), weight_T, torch.arange(T) % 4 == 3)


def nudged(matrices: Matrices, size: float) -> Matrices:
    draw = torch.Generator().manual_seed(7)
    return Matrices(
        [up + size * torch.randn(up.shape, generator=draw) for up in matrices.up],
        list(matrices.down),
    )


def weighted(aim: Aim, lacking_TD: torch.Tensor) -> float:
    return float((aim.weight_T[:, None] * lacking_TD.square()).sum())


def test_outputs_are_those_of_dense_experts() -> None:
    fed, matrices = made_up()
    rows = torch.tensor([5, 3, 3, 599, 0])
    found = outputs(fed, rows, matrices, gated)
    torch.testing.assert_close(found.double(), dense(fed, matrices)[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_down", [False, True])
def test_experts_come_nearer_to_those_that_made_the_outputs(with_down: bool) -> None:
    fed, original = made_up()
    aim, start = aim_of(dense(fed, original)), nudged(original, 0.1)
    descent = descend(fed, aim, start, start, gated, with_down=with_down)
    assert descent.helped
    wanted_TD = dense(fed, original)
    before = weighted(aim, dense(fed, start) - wanted_TD)
    after = weighted(aim, dense(fed, descent.matrices) - wanted_TD)
    assert after < 0.3 * before
    found = descent.matrices
    assert torch.equal(found.up[-1], start.up[-1])  # no token, no change
    assert torch.equal(found.down[-1], start.down[-1])
    moved_down = [not torch.equal(a, b) for a, b in zip(found.down, start.down, strict=True)]
    assert any(moved_down) == with_down


def test_what_only_fits_the_fitting_tokens_is_not_taken() -> None:
    """Noise on the tokens fitted, the truth on those held out: the descent must be given up."""
    fed, start = made_up()
    noise = torch.randn(T, D, generator=torch.Generator().manual_seed(3)) * 3
    aim = aim_of(dense(fed, start))
    noisy = replace(aim, wanted_TD=aim.wanted_TD + noise * ~aim.held_out_T[:, None])
    descent = descend(fed, noisy, start, start, gated, with_down=True)
    assert not descent.helped
    assert descent.matrices is start


def test_tokens_that_are_not_chosen_do_not_matter() -> None:
    fed, original = made_up()
    aim, start = aim_of(dense(fed, original)), nudged(original, 0.1)
    chosen_T = ~aim.held_out_T
    other = replace(aim, wanted_TD=torch.where(chosen_T[:, None], aim.wanted_TD, 1e6))
    one, two = (moved(fed, a, chosen_T, start, gated, with_down=True) for a in (aim, other))
    for a, b in zip((*one.up, *one.down), (*two.up, *two.down), strict=True):
        assert torch.equal(a, b)
