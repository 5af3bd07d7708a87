"""Correction of the kept experts' gate and up projections, by descent on one layer's output.

What is before the activation does not enter the output linearly, so there is no closed form as for
the down projections (reap/repair_fit.py). With r_t what the routed experts should give, y_t what
they give and a_t = 1 / |h_t|^2 the weight of the token's error (reap/damage.py),

    minimise  sum_t a_t |r_t - y_t|^2        over gate and up, and down where it is corrected too

by Adam in float32 over random tokens, from where the closed forms ended; no layer but this one is
in memory. The number of steps is fixed, so what it costs does not grow with the calibration, which
may well be more than what was scored. Every token keeps the experts and weights that the model's
own router gave it. A step moves a weight by a share of the root mean square of its kind in the
layer, since bfloat16 and FP8 resolve shares too. Whether it helps is found on the quarter of the
samples that chooses the ridge, held out of a first descent; the second is made on all tokens.

Refused: moving the router in the same descent. It takes a hundredth of the layer's error beside
gate and up (docs/log.md), and routing that changes with every step is no longer the model's own.

Legend: T tokens, B of a step, K top_k, P pairs, E kept experts, D hidden, F intermediate,
G = 2F (F without a gate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

RATE = 0.02  # the largest step, of the root mean square of the matrices of a kind
STEPS = 100
STEP_TOKENS = 2048  # at most, and at most an eighth of all
WARM_STEPS = 10

Activate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class FedTokens:
    """What entered the kept experts of a layer and how it was routed, padding left out."""

    inputs_TD: torch.Tensor
    expert_TK: torch.Tensor  # int64
    weight_TK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Matrices:
    """The experts' matrices, float32: [G, D] before the activation, [D, F] behind it."""

    up: Sequence[torch.Tensor]
    down: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Aim:
    """What the routed experts should give, each token's weight, and who is held out."""

    wanted_TD: torch.Tensor
    weight_T: torch.Tensor
    held_out_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class Descent:
    """The matrices found; those it began with where they are better on what was held out."""

    matrices: Matrices
    helped: bool


def outputs(
    fed: FedTokens, rows_B: torch.Tensor, matrices: Matrices, activate: Activate
) -> torch.Tensor:
    """What the routed experts give for some tokens, float32 [B, D]."""
    ids_BK = fed.expert_TK[rows_B]
    top_k = ids_BK.shape[1]
    expert_P, order_P = torch.sort(ids_BK.flatten(), stable=True)
    inputs_PD = fed.inputs_TD[rows_B].float()[order_P // top_k]
    counts = torch.bincount(expert_P, minlength=len(matrices.up)).tolist()
    parts = [
        activate(inputs_ND @ up_GD.T) @ down_DF.T
        for inputs_ND, up_GD, down_DF in zip(
            inputs_PD.split(counts), matrices.up, matrices.down, strict=True
        )
        if len(inputs_ND)
    ]
    weighted_PD = torch.cat(parts) * fed.weight_TK[rows_B].flatten()[order_P, None]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    return weighted_PD[place_P].view(len(rows_B), top_k, -1).sum(1)


@torch.no_grad()
def outputs_of_all(fed: FedTokens, matrices: Matrices, activate: Activate) -> torch.Tensor:
    """`outputs` of every token, some at a time."""
    rows_T = torch.arange(len(fed.expert_TK), device=fed.expert_TK.device)
    return torch.cat(
        [outputs(fed, rows_B, matrices, activate) for rows_B in rows_T.split(STEP_TOKENS)]
    )


def error(
    fed: FedTokens, aim: Aim, chosen_T: torch.Tensor, found: Matrices, act: Activate
) -> float:
    """sum_t a_t |r_t - y_t|^2 over the tokens that are True in `chosen_T`."""
    total = 0.0
    for rows_B in chosen_T.nonzero().flatten().split(STEP_TOKENS):
        with torch.no_grad():
            lacking_BD = aim.wanted_TD[rows_B] - outputs(fed, rows_B, found, act)
        total += float((aim.weight_T[rows_B].double() * lacking_BD.double().square().sum(1)).sum())
    return total


def descend(
    fed: FedTokens,
    aim: Aim,
    start: Matrices,
    unseen: Matrices,
    activate: Activate,
    *,
    with_down: bool,
) -> Descent:
    """Gate and up (and down, `with_down`) moved from `start`, where that helps on held-out tokens.

    `unseen` is `start` as it would be without the held-out tokens: a start that was fitted on
    them would win on them. Experts without tokens stay as they are.
    """
    held_T, every_T = aim.held_out_T, torch.ones_like(aim.held_out_T)
    if not held_T.any() or held_T.all():
        return Descent(start, False)
    before = error(fed, aim, held_T, unseen, activate)
    after = error(
        fed, aim, held_T, moved(fed, aim, ~held_T, unseen, activate, with_down=with_down), activate
    )
    if after >= before:
        return Descent(start, False)
    return Descent(moved(fed, aim, every_T, start, activate, with_down=with_down), True)


def moved(
    fed: FedTokens,
    aim: Aim,
    chosen_T: torch.Tensor,
    start: Matrices,
    activate: Activate,
    *,
    with_down: bool,
) -> Matrices:
    """`start` after the descent on the tokens that are True in `chosen_T`."""
    row_R = chosen_T.nonzero().flatten()
    size = min(STEP_TOKENS, -(-len(row_R) // 8))
    draw = torch.Generator().manual_seed(0)
    # the caller may infer; what takes part in a gradient must not have been made so
    with torch.inference_mode(False), torch.enable_grad():
        found = Matrices(
            [up_GD.clone().requires_grad_() for up_GD in start.up],
            [down_DF.clone().requires_grad_(with_down) for down_DF in start.down],
        )
        kinds = [found.up, found.down] if with_down else [found.up]
        rates = [RATE * root_mean_square(kind) for kind in kinds]
        optimizer = torch.optim.Adam([{"params": list(kind)} for kind in kinds], betas=(0.9, 0.95))
        square_R = aim.weight_T[row_R] * aim.wanted_TD[row_R].square().sum(1)
        scale = 1 / float(square_R.mean().clamp_min(1e-30))
        for step in range(STEPS):
            share = (1 - step / STEPS) * min(1, (step + 1) / WARM_STEPS)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            drawn_B = torch.randint(len(row_R), (size,), generator=draw)
            rows_B = row_R[drawn_B.to(row_R.device)]
            lacking_BD = aim.wanted_TD[rows_B] - outputs(fed, rows_B, found, activate)
            loss = scale * (aim.weight_T[rows_B] * lacking_BD.square().sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Matrices(
        [up_GD.detach() for up_GD in found.up], [down_DF.detach() for down_DF in found.down]
    )


def root_mean_square(matrices: Sequence[torch.Tensor]) -> float:
    """Over all elements."""
    squares = sum(float(matrix.detach().double().square().sum()) for matrix in matrices)
    return (squares / max(1, sum(matrix.numel() for matrix in matrices))) ** 0.5
