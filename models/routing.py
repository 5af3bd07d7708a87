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
SCREENING_ROWS = 256  # on which a law must come near that, before it is tried on all
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

    def route(
        self, logits_NE: torch.Tensor, bias_E: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids int64 [N, K] and weights float32 [N, K] when only `kept` is left.

        `kept` is bool [E], or [N, E] for a set of its own in every row; it holds at least K
        experts (in the groups a row can reach).
        """
        p_NE = self.probabilities(logits_NE, kept)
        choice_NE = (p_NE + bias_E).masked_fill(~kept, float("-inf"))
        if self.num_groups > 1:
            grouped = choice_NE.unflatten(-1, (self.num_groups, -1))
            best = grouped.topk(self.group_top, dim=-1).values.sum(-1)
            chosen = best.topk(self.topk_groups, dim=-1).indices
            reached = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
            choice_NE = grouped.masked_fill(~reached.unsqueeze(-1), float("-inf")).flatten(-2)
        ids_NK = choice_NE.topk(self.top_k, dim=-1).indices
        weights_NK = p_NE.gather(-1, ids_NK)
        if self.normalises:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True).clamp_min(1e-20)
        return ids_NK, weights_NK * self.scale


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
    some = slice(None, None, max(1, len(weights_NE) // SCREENING_ROWS))
    for number, (logits_NE, bias_E) in enumerate(inputs):
        for score in get_args(Score):
            for normalises in (True, False):
                law = RoutingLaw(
                    score=score,
                    normalises=normalises,
                    scale=1.0,
                    top_k=spec.top_k,
                    num_groups=spec.num_groups,
                    topk_groups=spec.topk_groups if spec.num_groups > 1 else 1,
                    group_top=spec.architecture.moe.group_top,
                )
                _, agreement, error = fit(law, logits_NE[some], bias_E, weights_NE[some])
                if agreement < LEAST_AGREEMENT / 2 or error > 4 * MOST_WEIGHT_ERROR:
                    continue  # far off: not worth all rows
                scale, agreement, error = fit(law, logits_NE, bias_E, weights_NE)
                if agreement >= LEAST_AGREEMENT and error <= MOST_WEIGHT_ERROR:
                    fitted = replace(law, scale=scale)
                    found.append((round(agreement, 2), -error, number, fitted))
    if not found:
        return None
    return max(found, key=lambda entry: entry[:2])[2:]


def fit(
    law: RoutingLaw, logits_NE: torch.Tensor, bias_E: torch.Tensor, weights_NE: torch.Tensor
) -> tuple[float, float, float]:
    """(scale, share of rows with the same experts, median relative error of their weights) where
    `law` routes the rows."""
    ids_NK, found_NK = law.route(logits_NE, bias_E, torch.ones_like(bias_E, dtype=torch.bool))
    same_N = (weights_NE.gather(1, ids_NK) != 0).all(1) & (
        (weights_NE != 0).sum(1) == ids_NK.shape[1]
    )
    if not same_N.any():
        return 1.0, 0.0, float("inf")
    wanted, found = weights_NE.gather(1, ids_NK)[same_N], found_NK[same_N]
    scale = float((wanted / found).median())
    error = float(((found * scale - wanted).abs() / wanted.abs()).median())
    # a weight that is a power of another score has an error spread over rows, not in the median
    spread = float(((found * scale - wanted).abs() / wanted.abs()).quantile(0.9))
    return scale, float(same_N.float().mean()), max(error, spread / 2)
