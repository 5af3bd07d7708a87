"""The router's law over any set of kept experts, found out from what the router did.

With z the logits of a token, b the selection bias (0 where the family has none) and S the experts
that are left,

    p = softmax over S of z,  or sigmoid(z),  or sqrt(softplus(z))
    T = the top_k of S by p + b, within the topk_groups best groups where the router has groups
    w_e = scale * p_e / (sum of p over T, where the router normalises, else 1)      e in T

Which p, whether it normalises, the scale and whether a stored vector is a bias of the logits or
of the selection are not tabled by family: every combination is tried on sampled tokens and must
give the very experts and weights the model's own router gave (`best_fit`). So the law that
re-routes tokens offline (reap/damage.py) or chooses experts in one kernel (runtime/router.py) was
seen to be the model's, or there is none.

Refused: running transformers' router on a cut model for every set looked at. Backward elimination
looks at some E^2 / 4 sets a layer and wants to re-route only the tokens that a removal concerns.

Legend: N rows (tokens), E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from models.model_spec import ModelSpec

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
# Tokens whose experts the law must reproduce: near-ties of bfloat16 logits differ in float32.
LEAST_AGREEMENT = 0.9
SCREENING_ROWS = 128  # on which a law must come near that, before it is tried on more
FITTED_ROWS = 512
MOST_WEIGHT_ERROR = 0.02  # relative, in the median: bfloat16 weights are rounded by up to 0.004


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingLaw:
    """How logits become experts and weights; groups are consecutive equal slices of the experts."""

    score: Score
    normalises: bool
    scale: float
    top_k: int
    num_groups: int = 1
    topk_groups: int = 1
    group_top: int = 2

    def flattened(self) -> RoutingLaw:
        """The law once groups are given up (`--groups flatten`)."""
        return replace(self, num_groups=1, topk_groups=1)

    def to_json(self) -> dict[str, Any]:
        """The fields, for a file's metadata."""
        return asdict(self)

    def probabilities(self, logits_NE: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """p of every kept expert, float32 [N, E]; of the others it means nothing."""
        if self.score == "softmax":
            return logits_NE.masked_fill(~kept, float("-inf")).softmax(-1)
        if self.score == "sigmoid":
            return logits_NE.sigmoid()
        return F.softplus(logits_NE).sqrt()

    def chosen(
        self, logits_NE: torch.Tensor, bias_E: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids int64 [N, K] and their p, float32 [N, K], when only `kept` is left.

        `kept` is bool [E], or [N, E] for a set of its own in every row; it holds at least K
        experts (in the groups a row can reach).
        """
        p_NE = self.probabilities(logits_NE, kept)
        choice_NE = (p_NE + bias_E).masked_fill(~kept, float("-inf"))
        if self.num_groups > 1:
            grouped = choice_NE.unflatten(-1, (self.num_groups, -1))
            best = grouped.topk(self.group_top, dim=-1).values.sum(-1)
            groups = best.topk(self.topk_groups, dim=-1).indices
            reached = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, groups, True)
            choice_NE = grouped.masked_fill(~reached.unsqueeze(-1), float("-inf")).flatten(-2)
        ids_NK = choice_NE.topk(self.top_k, dim=-1).indices
        return ids_NK, p_NE.gather(-1, ids_NK)

    def weights(self, p_NK: torch.Tensor) -> torch.Tensor:
        """What the outputs of the experts chosen with these p are multiplied by."""
        if self.normalises:
            p_NK = p_NK / p_NK.sum(-1, keepdim=True).clamp_min(1e-20)
        return p_NK * self.scale

    def route(
        self, logits_NE: torch.Tensor, bias_E: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids int64 [N, K] and weights float32 [N, K] of `chosen`'s arguments."""
        ids_NK, p_NK = self.chosen(logits_NE, bias_E, kept)
        return ids_NK, self.weights(p_NK)


def law_from_json(content: Mapping[str, Any]) -> RoutingLaw:
    """The reverse of `RoutingLaw.to_json`."""
    return RoutingLaw(**content)


def best_fit(
    spec: ModelSpec, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]], weights_NE: torch.Tensor
) -> tuple[int, RoutingLaw] | None:
    """The law that gives the experts and weights that a model's own router gave, and of what.

    Every (logits [N, E], selection bias [E]) of `inputs` is tried; the answer is the number of
    one of them and the law. `weights_NE` are what multiplied each expert's output, 0 where it was
    not chosen. None when no law fits.
    """
    found: list[tuple[float, float, int, RoutingLaw]] = []
    for number, (logits_NE, bias_E) in enumerate(inputs):
        for score in get_args(Score):
            law = RoutingLaw(
                score=score,
                normalises=False,
                scale=1.0,
                top_k=spec.top_k,
                num_groups=spec.num_groups,
                topk_groups=spec.topk_groups if spec.num_groups > 1 else 1,
                group_top=spec.architecture.moe.group_top,
            )
            screened = fits(law, logits_NE, bias_E, weights_NE, SCREENING_ROWS)
            if all(map(far_off, screened)):
                continue  # not worth more rows
            found += [
                (round(fitted.agreement, 2), -fitted.error, number, fitted.law)
                for fitted in fits(law, logits_NE, bias_E, weights_NE, FITTED_ROWS)
                if fitted.agreement >= LEAST_AGREEMENT and fitted.error <= MOST_WEIGHT_ERROR
            ]
    if not found:
        return None
    return max(found, key=lambda entry: entry[:2])[2:]


@dataclass(frozen=True, slots=True)
class Fit:
    """A law, the share of rows where it gives the same experts, and how far their weights are."""

    law: RoutingLaw
    agreement: float
    error: float  # relative


def far_off(fit: Fit) -> bool:
    """Whether more rows would not help it."""
    return fit.agreement < LEAST_AGREEMENT / 2 or fit.error > 4 * MOST_WEIGHT_ERROR


def fits(
    law: RoutingLaw,
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    weights_NE: torch.Tensor,
    rows: int,
) -> list[Fit]:
    """How `law`, normalising and not, with the scale found, gives the weights of `rows` of the
    rows, spread evenly."""
    some = slice(None, None, max(1, len(weights_NE) // rows))
    logits_NE, weights_NE = logits_NE[some], weights_NE[some]
    ids_NK, p_NK = law.chosen(logits_NE, bias_E, torch.ones_like(bias_E, dtype=torch.bool))
    given_NK = weights_NE.gather(1, ids_NK)
    same_N = (given_NK != 0).all(1) & ((weights_NE != 0).sum(1) == law.top_k)
    return [
        _fit(replace(law, normalises=normalises), p_NK, given_NK, same_N)
        for normalises in (True, False)
    ]


def _fit(law: RoutingLaw, p_NK: torch.Tensor, given_NK: torch.Tensor, same_N: torch.Tensor) -> Fit:
    if not same_N.any():
        return Fit(law, 0.0, float("inf"))
    wanted, found = given_NK[same_N], law.weights(p_NK[same_N])
    scale = float((wanted / found).median())
    off = (found * scale - wanted).abs() / wanted.abs()
    # a weight that is a power of another score has an error spread over rows, not in the median
    error = max(float(off.median()), float(off.quantile(0.9)) / 2)
    return Fit(replace(law, scale=scale), float(same_N.float().mean()), error)
