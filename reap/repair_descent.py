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

A step takes the gradient of the layer's error by its outputs once, and then one expert after the
other is gone through backwards and moved, so that what a descent holds besides the matrices are
their two moments: with every gradient and every expert's activations at once, a layer of 128
experts of DeepSeek-V3.2 did not fit on one GPU.

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


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """Some tokens' routed pairs by expert."""

    num_tokens: int
    order_P: torch.Tensor  # which (token, choice) of the B x K a pair is
    token_P: torch.Tensor  # of the B
    inputs_PD: torch.Tensor  # float32
    weight_P1: torch.Tensor
    counts: list[int]  # pairs of each expert

    @staticmethod
    def of(fed: FedTokens, rows_B: torch.Tensor, num_experts: int) -> RoutedPairs:
        """The pairs of the tokens `rows_B`."""
        ids_BK = fed.expert_TK[rows_B]
        expert_P, order_P = torch.sort(ids_BK.flatten(), stable=True)
        token_P = order_P // ids_BK.shape[1]
        return RoutedPairs(
            len(rows_B),
            order_P,
            token_P,
            fed.inputs_TD[rows_B].float()[token_P],
            fed.weight_TK[rows_B].flatten()[order_P, None],
            torch.bincount(expert_P, minlength=num_experts).tolist(),
        )

    def by_expert(self) -> tuple[torch.Tensor, ...]:
        """What enters each expert, [N, D]."""
        return self.inputs_PD.split(self.counts)

    def combined(self, outputs_END: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the experts' outputs add up to for each token, float32 [B, D]."""
        weighted_PD = torch.cat([own for own in outputs_END if len(own)]) * self.weight_P1
        place_P = torch.empty_like(self.order_P)
        place_P[self.order_P] = torch.arange(len(place_P), device=place_P.device)
        return weighted_PD[place_P].view(self.num_tokens, -1, weighted_PD.shape[1]).sum(1)


def outputs(
    fed: FedTokens, rows_B: torch.Tensor, matrices: Matrices, activate: Activate
) -> torch.Tensor:
    """What the routed experts give for some tokens, float32 [B, D]."""
    pairs = RoutedPairs.of(fed, rows_B, len(matrices.up))
    every = zip(pairs.by_expert(), matrices.up, matrices.down, strict=True)
    return pairs.combined([activate(x_ND @ up_GD.T) @ down_DF.T for x_ND, up_GD, down_DF in every])


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
    with torch.inference_mode(False):
        found = Matrices([up.clone() for up in start.up], [down.clone() for down in start.down])
        kinds = [found.up, found.down] if with_down else [found.up]
        rates = [RATE * root_mean_square(kind) for kind in kinds]
        experts = [
            MovedExpert(up_GD, down_DF, activate, with_down=with_down)
            for up_GD, down_DF in zip(found.up, found.down, strict=True)
        ]
        square_R = aim.weight_T[row_R] * aim.wanted_TD[row_R].square().sum(1)
        scale = 1 / float(square_R.mean().clamp_min(1e-30))
        for step in range(STEPS):
            share = (1 - step / STEPS) * min(1, (step + 1) / WARM_STEPS)
            drawn_B = torch.randint(len(row_R), (size,), generator=draw)
            rows_B = row_R[drawn_B.to(row_R.device)]
            pairs = RoutedPairs.of(fed, rows_B, len(experts))
            given_END = [
                expert.outputs(x_ND)
                for expert, x_ND in zip(experts, pairs.by_expert(), strict=True)
            ]
            lacking_BD = aim.wanted_TD[rows_B] - pairs.combined(given_END)
            # the gradient of scale * mean_B a_t |r_t - y_t|^2 by y_t
            gradient_BD = (-2 * scale / size) * aim.weight_T[rows_B, None] * lacking_BD
            gradient_PD = gradient_BD[pairs.token_P] * pairs.weight_P1
            for expert, gradient_ND in zip(experts, gradient_PD.split(pairs.counts), strict=True):
                if len(gradient_ND):
                    expert.step(gradient_ND, [share * rate for rate in rates])
    return found


class MovedExpert:
    """One expert's matrices, moved in place: gate and up, and down where it is corrected too."""

    def __init__(
        self, up_GD: torch.Tensor, down_DF: torch.Tensor, activate: Activate, *, with_down: bool
    ) -> None:
        self.up_GD, self.down_DF, self.activate = up_GD, down_DF, activate
        self.moved = [up_GD, down_DF] if with_down else [up_GD]
        groups = [{"params": [matrix]} for matrix in self.moved]
        on_gpu = up_GD.is_cuda
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=False, fused=on_gpu)
        nothing = torch.empty(0)
        self.inputs_ND, self.up_NG, self.active_NF = nothing, nothing, nothing

    def outputs(self, inputs_ND: torch.Tensor) -> torch.Tensor:
        """What the expert gives, [N, D]."""
        self.inputs_ND, self.up_NG = inputs_ND, (inputs_ND @ self.up_GD.T).requires_grad_()
        with torch.enable_grad():
            self.active_NF = self.activate(self.up_NG)
        return self.active_NF.detach() @ self.down_DF.T

    def step(self, gradient_ND: torch.Tensor, rates: list[float]) -> None:
        """One step, at each matrix's rate, against the error's gradient by the last outputs."""
        towards_NF = gradient_ND @ self.down_DF
        (towards_NG,) = torch.autograd.grad(self.active_NF, self.up_NG, towards_NF)
        gradients = [towards_NG.T @ self.inputs_ND]
        if len(self.moved) > 1:
            gradients.append(gradient_ND.T @ self.active_NF.detach())
        for group, matrix, gradient, rate in zip(
            self.optimizer.param_groups, self.moved, gradients, rates, strict=True
        ):
            group["lr"], matrix.grad = rate, gradient
        self.optimizer.step()
        self.optimizer.zero_grad()


def root_mean_square(matrices: Sequence[torch.Tensor]) -> float:
    """Over all elements."""
    squares = sum(float(matrix.detach().double().square().sum()) for matrix in matrices)
    return (squares / max(1, sum(matrix.numel() for matrix in matrices))) ** 0.5
