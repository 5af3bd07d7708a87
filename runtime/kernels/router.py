"""A router as two kernels: the logits of few tokens, and the choice of any number of tokens.

torch takes five launches for a softmax router and some fifteen for one with groups, each of a few
microseconds and with a gap before it; at one token they cost as much as an expert product. What is
computed is models/routing.py's law. Where scores tie, the expert of the lower number is taken, as
torch.topk does on CUDA (its radix select gathers in the order of the numbers).

AHEAD as in routed.py, but the router's weight, which no kernel writes, is read before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from models.routing import RoutingLaw
from runtime.kernels.tiles import ahead

FEW = 8  # tokens whose logits are formed here: for more, torch's product reads less
SCORES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


@triton.jit(do_not_specialize=["tokens"])
def row_logits(
    x, weight, bias, out, tokens, experts: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, AHEAD: tl.constexpr = False,
):  # fmt: skip
    """x_t · w_e + b_e of one expert and the (at most TOKENS) tokens; summed in float32."""
    expert = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < K
    row = tl.load(weight + expert * K + column, mask=mask, other=0.0)
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    row = row.to(tl.float32)
    for token in tl.static_range(TOKENS):
        inside = mask & (token < tokens)
        values = tl.load(x + token * K + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(values * row, 0)
        if HAS_BIAS:
            total += tl.load(bias + expert).to(tl.float32)
        tl.store(out + token * experts + expert, total.to(out.dtype.element_ty), token < tokens)


@triton.jit
def choose(
    logits, bias, ids, weights, scale, experts: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_WIDE: tl.constexpr, WIDE: tl.constexpr, GROUP_TOP: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_WIDE: tl.constexpr,
    SCORE: tl.constexpr, NORMALISES: tl.constexpr, HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr = False,
):  # fmt: skip
    """Experts and weights of one token. The scores stand as [group, expert within the group], both
    widened to powers of two by experts that are never taken."""
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    each: tl.constexpr = experts // GROUPS
    never: tl.constexpr = float("-inf")
    group = tl.arange(0, GROUPS_WIDE)
    within = tl.arange(0, WIDE)
    expert = group[:, None] * each + within[None, :]
    mask = (group < GROUPS)[:, None] & (within < each)[None, :]
    z = tl.load(logits + token * experts + expert, mask=mask, other=never).to(tl.float32)
    if SCORE == 0:
        p = tl.exp(z - tl.max(tl.max(z, 1), 0))
        p = p / tl.sum(tl.sum(p, 1), 0)
    elif SCORE == 1:
        p = 1.0 / (1.0 + tl.exp(-z))
    else:
        p = tl.sqrt(tl.where(z > 20.0, z, tl.log(1.0 + tl.exp(z))))
    choice = p
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=mask, other=0.0).to(tl.float32)
    choice = tl.where(mask, choice, never)
    if GROUPS > 1:
        rest = choice
        best = tl.zeros((GROUPS_WIDE,), tl.float32)
        for _ in tl.static_range(GROUP_TOP):
            best += tl.max(rest, 1)
            rest = tl.where(within[None, :] == tl.argmax(rest, 1)[:, None], never, rest)
        taken = group < 0
        for _ in tl.static_range(TOPK_GROUPS):
            first = group == tl.argmax(best, 0)
            taken = taken | first
            best = tl.where(first, never, best)
        choice = tl.where(taken[:, None], choice, never)
    number = tl.arange(0, GROUPS_WIDE * WIDE)
    choice = tl.reshape(choice, (GROUPS_WIDE * WIDE,))
    p = tl.reshape(p, (GROUPS_WIDE * WIDE,))
    place = tl.arange(0, TOP_K_WIDE)
    chosen = tl.zeros((TOP_K_WIDE,), tl.int32)
    weight = tl.zeros((TOP_K_WIDE,), tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.argmax(choice, 0)
        here = number == at
        own = tl.minimum(at // WIDE * each + at % WIDE, experts - 1)  # nan in all: still an expert
        chosen = tl.where(place == k, own, chosen)
        weight = tl.where(place == k, tl.sum(tl.where(here, p, 0.0), 0), weight)
        choice = tl.where(here, never, choice)
    if NORMALISES:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    weight = weight * scale
    valid = place < TOP_K
    tl.store(ids + token * TOP_K + place, chosen.to(tl.int64), mask=valid)
    tl.store(weights + token * TOP_K + place, weight.to(weights.dtype.element_ty), mask=valid)


def few_logits(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x · W^T + b, [T, E], of at most FEW tokens, rounded once to `dtype`."""
    tokens, experts = x_TD.shape[0], weight_ED.shape[0]
    out_TE = x_TD.new_empty(tokens, experts, dtype=dtype)
    with torch.cuda.device_of(x_TD):
        row_logits[(experts,)](
            x_TD,
            weight_ED,
            out_TE if bias_E is None else bias_E,
            out_TE,
            tokens,
            experts=experts,
            K=x_TD.shape[1],
            BLOCK=triton.next_power_of_2(x_TD.shape[1]),
            TOKENS=triton.next_power_of_2(tokens),
            HAS_BIAS=bias_E is not None,
            num_warps=8,
            **ahead(x_TD.device),
        )
    return out_TE


def chosen(
    law: RoutingLaw, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids int64 [T, K] and weights [T, K] in `dtype`, best first; no group needs a power of
    two of experts."""
    tokens, experts = logits_TE.shape
    ids_TK = torch.empty(tokens, law.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(tokens, law.top_k, dtype=dtype, device=logits_TE.device)
    if not tokens:
        return ids_TK, weights_TK
    with torch.cuda.device_of(logits_TE):
        choose[(tokens,)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            ids_TK,
            weights_TK,
            law.scale,
            experts=experts,
            GROUPS=law.num_groups,
            GROUPS_WIDE=triton.next_power_of_2(law.num_groups),
            WIDE=triton.next_power_of_2(experts // law.num_groups),
            GROUP_TOP=law.group_top,
            TOPK_GROUPS=law.topk_groups,
            TOP_K=law.top_k,
            TOP_K_WIDE=triton.next_power_of_2(law.top_k),
            SCORE=SCORES[law.score],
            NORMALISES=law.normalises,
            HAS_BIAS=bias_E is not None,
            num_warps=1,
            **ahead(logits_TE.device),
        )
    return ids_TK, weights_TK
