"""Corrections of the kept experts' down projections, in closed form, from one layer's tokens.

What an expert adds to token t is w_t W x_t, with x_t what its down projection W is fed and w_t
the router's weight. With r_t what the layer's output still lacks and a_t = 1 / |h_t|^2 the weight
of the token's error (reap/damage.py),

    scales:   W -> s W,    the s that minimises    sum_t a_t |r_t - (s - 1) w_t W x_t|^2
    down:     W -> W + V,  the V that minimises    sum_t a_t |r_t - V w_t x_t|^2 + mu |V|^2

one expert after the other against what the others leave, in sweeps (Gauss-Seidel on the joint
least-squares problem of all kept experts, whose own matrix has experts * F rows). mu is `ridge`
times the mean diagonal of the experts' normal matrices: one number for a layer, so that an expert
which few tokens reach is moved less. Which ridge is found on a quarter of the calibration's own
samples, held out of the fit; "none" is among the candidates, and the fit is then made again on all.

Legend: T tokens, P routed pairs, E kept experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from models.errors import InputError

RepairKind = Literal["scales", "down", "up"]
RIDGES = (0.3, 1.0, 3.0, 10.0)
SWEEPS = 3
HELD_OUT = 4  # one sample of so many chooses the ridge


def repair_kinds(text: str) -> tuple[RepairKind, ...]:
    """The repairs in "scales,down,up", each once, in the order they are made. InputError else."""
    asked = [name.strip() for name in text.split(",")]
    known: tuple[RepairKind, ...] = get_args(RepairKind)
    odd = [name for name in asked if name not in known]
    if odd:
        raise InputError(f"--repair {odd[0]!r} is unknown; choose of {', '.join(known)}")
    return tuple(kind for kind in known if kind in asked)


@dataclass(frozen=True, slots=True)
class RoutedInputs:
    """The tokens of one expert: their rows, and w_t x_t."""

    token_N: torch.Tensor  # int64
    inputs_NF: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What a pruned layer did with the calibration and what it lacks, padding left out."""

    experts: Sequence[RoutedInputs]
    lacking_TD: torch.Tensor  # r_t, float32
    weight_T: torch.Tensor  # a_t
    held_out_T: torch.Tensor  # bool

    def only(self, chosen_T: torch.Tensor) -> LayerTokens:
        """The tokens that are True in `chosen_T`."""
        place_T = chosen_T.cumsum(0) - 1
        experts = []
        for own in self.experts:
            stays_N = chosen_T[own.token_N]
            experts.append(RoutedInputs(place_T[own.token_N[stays_N]], own.inputs_NF[stays_N]))
        return LayerTokens(
            experts,
            self.lacking_TD[chosen_T],
            self.weight_T[chosen_T],
            self.held_out_T[chosen_T],
        )


@dataclass(frozen=True, slots=True)
class Correction:
    """New down projections of a layer. `lacking` is the error left, of 1 before, where fitted."""

    down_EDF: torch.Tensor
    ridge: float | None  # None: `down` was not asked for, or no ridge helped
    lacking: float


def correct(tokens: LayerTokens, down_EDF: torch.Tensor, kinds: Sequence[RepairKind]) -> Correction:
    """The asked corrections of float32 `down_EDF`, scales first. Experts without tokens stay."""
    ridge = None
    if "down" in kinds and tokens.held_out_T.any() and not tokens.held_out_T.all():
        ridge = chosen_ridge(tokens, down_EDF, kinds)
    fitted, lacking_TD = fit(tokens, down_EDF, kinds, ridge)
    before = weighted_square(tokens.weight_T, tokens.lacking_TD)
    after = weighted_square(tokens.weight_T, lacking_TD)
    return Correction(fitted, ridge, after / before if before else 1.0)


def chosen_ridge(
    tokens: LayerTokens, down_EDF: torch.Tensor, kinds: Sequence[RepairKind]
) -> float | None:
    """The ridge of least error on the tokens held out; None when all are worse than no `down`."""
    fitting, held = tokens.only(~tokens.held_out_T), tokens.only(tokens.held_out_T)
    errors: dict[float | None, float] = {}
    for ridge in (None, *RIDGES):
        fitted, _ = fit(fitting, down_EDF, kinds, ridge, sweeps=1)
        errors[ridge] = weighted_square(held.weight_T, lacking_with(held, fitted - down_EDF))
    return min(errors, key=lambda ridge: errors[ridge])


def fit(
    tokens: LayerTokens,
    down_EDF: torch.Tensor,
    kinds: Sequence[RepairKind],
    ridge: float | None,
    sweeps: int = SWEEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(new down projections, what is lacking with them)."""
    fitted, lacking_TD = down_EDF.clone(), tokens.lacking_TD.clone()
    if "scales" in kinds:
        for _ in range(sweeps):
            _scale(tokens, fitted, lacking_TD)
    if ridge is not None:
        _shift(tokens, fitted, lacking_TD, ridge, sweeps)
    return fitted, lacking_TD


def _scale(tokens: LayerTokens, fitted: torch.Tensor, lacking_TD: torch.Tensor) -> None:
    for expert, own in enumerate(tokens.experts):
        outputs_ND = own.inputs_NF @ fitted[expert].T
        weighted_ND = tokens.weight_T[own.token_N, None] * outputs_ND
        square = (weighted_ND * outputs_ND).sum()
        if square > 0:
            more = (weighted_ND * lacking_TD[own.token_N]).sum() / square
            fitted[expert] *= 1 + more
            lacking_TD[own.token_N] -= more * outputs_ND


def _shift(
    tokens: LayerTokens,
    fitted: torch.Tensor,
    lacking_TD: torch.Tensor,
    ridge: float,
    sweeps: int,
) -> None:
    start = fitted.clone()
    normal_EFF = torch.stack(
        [
            own.inputs_NF.T @ (tokens.weight_T[own.token_N, None] * own.inputs_NF)
            for own in tokens.experts
        ]
    )
    mu = ridge * float(normal_EFF.diagonal(dim1=1, dim2=2).mean())
    if mu == 0:
        return
    normal_EFF.diagonal(dim1=1, dim2=2).add_(mu)
    factor_EFF = torch.linalg.cholesky(normal_EFF)
    for _ in range(sweeps):
        for expert, own in enumerate(tokens.experts):
            if not len(own.token_N):
                continue
            wanted_ND = tokens.weight_T[own.token_N, None] * lacking_TD[own.token_N]
            gradient_FD = own.inputs_NF.T @ wanted_ND - mu * (fitted[expert] - start[expert]).T
            step_FD = torch.cholesky_solve(gradient_FD, factor_EFF[expert])
            fitted[expert] += step_FD.T
            lacking_TD[own.token_N] -= own.inputs_NF @ step_FD


def lacking_with(tokens: LayerTokens, change_EDF: torch.Tensor) -> torch.Tensor:
    """What is lacking once the down projections are changed by so much."""
    lacking_TD = tokens.lacking_TD.clone()
    for own, change_DF in zip(tokens.experts, change_EDF, strict=True):
        lacking_TD[own.token_N] -= own.inputs_NF @ change_DF.T
    return lacking_TD


def weighted_square(weight_T: torch.Tensor, lacking_TD: torch.Tensor) -> float:
    """sum_t a_t |r_t|^2."""
    return float((weight_T.double() * lacking_TD.double().square().sum(1)).sum())
