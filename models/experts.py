"""Routed experts of one layer: our own grouped path, fed by the model's own router.

transformers hands its experts module (hidden states, expert ids, router weights) and gets back
the weighted sum only. REAP needs every expert's output before weighting, so the module is
replaced by `RoutedExperts`, which computes

    y_t = sum_k  w_tk * f_e(t,k)(x_t),        f_e(x) = down_e(act(gate_e(x)) * up_e(x))

over tokens sorted by expert and shows what it computed to one plain callable, as a
`RoutedBatch`. Routing is never recomputed: ids and weights are the arguments the model's own
router passed. Order of operations and dtypes follow transformers' grouped implementation
(integrations/moe.py of the pinned version), so that a layer gives the same bits with either.

Refused: forward hooks on transformers' module (they see the sum, not the experts), and running
every expert on every token (E / top_k times the work).

Legend: T tokens, K top_k, P = T * K routed pairs, E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from models.device import has_kernels

TOKENS_SUMMED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class RoutedBatch:
    """What the experts of one layer did with one batch, pairs sorted by expert.

    `offsets_E[e]` ends expert e's pairs. Where the router weight multiplied the expert's *input*
    (Llama-4), `outputs_PD` already carry it: `weights_applied_to_input` says so.
    """

    layer: int
    offsets_E: torch.Tensor  # int64 [E], cumulative pairs
    expert_P: torch.Tensor  # int64 [P]
    token_P: torch.Tensor  # int64 [P], row of the flattened batch
    router_weights_P: torch.Tensor  # the coefficient of the forward pass, its own dtype
    inputs_TD: torch.Tensor
    outputs_PD: torch.Tensor  # expert outputs before weighting; empty if `inputs_only`
    weights_applied_to_input: bool = False
    norms_P: torch.Tensor | None = None  # float32 |outputs| of each pair, where they came for free
    inputs_PD: torch.Tensor | None = None  # what each pair was fed, where it still stands
    top_k: int | None = None  # pairs of every token, where all have as many


Observer = Callable[[RoutedBatch], None]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of all experts of a layer, in the orientation transformers' module uses.

    `up` is [E, 2F, D] (gate and up joined) or [E, F, D] for experts without a gate, `down`
    [E, D, F]; both with the last two dims swapped when `transposed`.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    transposed: bool

    @property
    def up_for_mm(self) -> torch.Tensor:
        """`up` as [E, in, out]."""
        return self.up if self.transposed else self.up.transpose(-2, -1)

    @property
    def down_for_mm(self) -> torch.Tensor:
        """`down` as [E, in, out]."""
        return self.down if self.transposed else self.down.transpose(-2, -1)


class RoutedExperts(nn.Module):
    """Stands in for transformers' experts module inside its MoE block.

    `original` (on the meta device, never run) supplies the activation and its clamps. The
    module holds no parameters: `weights` is set while its layer is resident. With `inputs_only`
    the observer is shown what the experts are fed, none of them is run, and zeros are returned:
    for a pass whose output nobody wants.
    """

    def __init__(
        self,
        layer: int,
        original: nn.Module,
        num_experts: int,
        *,
        zero_experts: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.zero_experts = zero_experts  # ids beyond num_experts return their input (LongCat)
        self.weights: ExpertWeights | None = None
        self.inputs_only = False
        self.observe: Observer | None = None
        self.transposed = bool(getattr(original, "is_transposed", False))
        self.gated = bool(getattr(original, "has_gate", True))
        # modules written without transformers' experts interface add expert by expert
        self.sums_in_place = not hasattr(original, "has_gate")
        self.gated_silu = self.gated and _is_gated_silu(original)
        # a tuple hides its parameters from state_dict; its attributes are transformers' own
        self._original: tuple[Any] = (original,)

    def show(
        self,
        offsets_E: torch.Tensor,
        expert_P: torch.Tensor,
        token_P: torch.Tensor,
        router_weights_P: torch.Tensor,
        inputs_TD: torch.Tensor,
        outputs_PD: torch.Tensor,
        *,
        weights_applied_to_input: bool = False,
        norms_P: torch.Tensor | None = None,
        inputs_PD: torch.Tensor | None = None,
        top_k: int | None = None,
    ) -> None:
        """Hand the record of this batch to the observer, where there is one."""
        if self.observe is None:
            return
        self.observe(
            RoutedBatch(
                layer=self.layer,
                offsets_E=offsets_E,
                expert_P=expert_P,
                token_P=token_P,
                router_weights_P=router_weights_P,
                inputs_TD=inputs_TD,
                outputs_PD=outputs_PD,
                weights_applied_to_input=weights_applied_to_input,
                norms_P=norms_P,
                inputs_PD=inputs_PD,
                top_k=top_k,
            )
        )

    def activate(self, up_PF: torch.Tensor) -> torch.Tensor:
        """The family's activation, by transformers' own code or (silu gating in 16 bits on a GPU)
        by a kernel that rounds where it does. [P, 2F or F] -> [P, F]."""
        original = self._original[0]
        if not self.gated:
            return original.act_fn(up_PF)
        if self.gated_silu and _has_kernels(up_PF):
            from models.kernels.experts import gated_silu

            return gated_silu(up_PF)
        if hasattr(original, "_apply_gate"):
            return original._apply_gate(up_PF)
        gate, up = up_PF.chunk(2, dim=-1)
        return original.act_fn(gate) * up

    def activated(
        self, inputs_PD: torch.Tensor, expert_P: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """What down is fed, [P, F], of pairs sorted by expert: a grouped GEMM and `activate`."""
        weights = self.weights
        assert weights is not None, f"experts of layer {self.layer} are not loaded"
        up_PF = F.grouped_mm(inputs_PD, weights.up_for_mm, offs=offsets_E.to(torch.int32))
        if weights.up_bias is not None:
            up_PF.add_(weights.up_bias[expert_P])
        return self.activate(up_PF)

    def expert_outputs(
        self, inputs_PD: torch.Tensor, expert_P: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """f_e(x) of every pair, pairs sorted by expert: two grouped GEMMs, on CPU and GPU alike."""
        middle_PF = self.activated(inputs_PD, expert_P, offsets_E)
        weights = self.weights
        assert weights is not None
        offs = offsets_E.to(torch.int32)
        outputs_PD = F.grouped_mm(middle_PF, weights.down_for_mm, offs=offs)
        if weights.down_bias is not None:
            outputs_PD.add_(weights.down_bias[expert_P])
        return outputs_PD

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, D], expert ids [T, K] and router weights [T, K] -> weighted sum [T, D]."""
        num_tokens, top_k = top_k_index.shape
        if self.sums_in_place:  # pairs of an expert in the order (choice, token)
            flat_P = top_k_index.T.reshape(-1)
            expert_P, order_P = torch.sort(flat_P, stable=True)
            token_P = order_P % num_tokens
            weight_P = top_k_weights.T.reshape(-1)[order_P]
        else:
            flat_P = top_k_index.reshape(-1)
            # the very sort transformers uses: a row's place in a GEMM moves its last bits
            expert_P, order_P = torch.sort(flat_P)
            token_P = order_P // top_k
            weight_P = top_k_weights.reshape(-1)[order_P]
        every_E = torch.arange(self.num_experts, device=expert_P.device)
        offsets_E = torch.searchsorted(expert_P, every_E, right=True)
        # zero-computation experts sort behind; asking how many there are waits for a GPU
        routed = int(offsets_E[-1]) if self.zero_experts else len(expert_P)
        inputs_PD = hidden_states[token_P]
        total_TD = norms_P = None
        if self.inputs_only:
            outputs_PD, total_TD = inputs_PD.new_empty(0), torch.zeros_like(hidden_states)
        else:
            outputs_PD = self.expert_outputs(inputs_PD[:routed], expert_P[:routed], offsets_E)
        fused = not self.sums_in_place and not self.zero_experts and _has_kernels(outputs_PD)
        if fused and total_TD is None:
            from models.kernels.experts import combine

            place_P = _inverse(order_P)
            total_TD, norms_P = combine(
                outputs_PD, top_k_weights, place_P, norms=self.observe is not None
            )
        self.show(
            offsets_E,
            expert_P[:routed],
            token_P[:routed],
            weight_P[:routed],
            hidden_states,
            outputs_PD,
            norms_P=norms_P,
            inputs_PD=inputs_PD[:routed],
            top_k=None if self.zero_experts else top_k,
        )
        if total_TD is not None:
            return total_TD
        if routed < len(expert_P):  # zero-computation experts return their input
            outputs_PD = torch.cat([outputs_PD, inputs_PD[routed:]])
        if self.sums_in_place:
            weighted_PD = outputs_PD * weight_P.unsqueeze(-1)
            return _sum_expert_by_expert(weighted_PD, token_P, expert_P, hidden_states)
        return _sum_by_token(outputs_PD, weight_P, order_P, hidden_states)


def _has_kernels(tensor: torch.Tensor) -> bool:
    """Whether models/kernels is for tensors like this one."""
    return has_kernels(tensor) and tensor.dtype in (torch.bfloat16, torch.float16)


def _is_gated_silu(original: nn.Module) -> bool:
    """Whether the family's activation is silu(gate) * up with the halves one behind the other."""
    own = getattr(type(original), "_apply_gate", None)
    default = own is None or own.__name__ == "_default_apply_gate"  # transformers' own
    return default and isinstance(getattr(original, "act_fn", None), (nn.SiLU, SiLUActivation))


def _inverse(order_P: torch.Tensor) -> torch.Tensor:
    """Where each element went: inverse[order[i]] = i."""
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    return place_P


def _sum_by_token(
    outputs_PD: torch.Tensor, weight_P: torch.Tensor, order_P: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over each token's choices, in the type of (output times weight).

    Chunks of tokens bound the float32 copies of all pairs; sums of tokens are independent.
    """
    num_tokens = len(like)
    top_k = len(order_P) // num_tokens
    place_P = _inverse(order_P)
    total = torch.empty_like(like)
    for start in range(0, num_tokens, TOKENS_SUMMED_AT_ONCE):
        rows = place_P[start * top_k : (start + TOKENS_SUMMED_AT_ONCE) * top_k]
        weighted = outputs_PD[rows] * weight_P[rows].unsqueeze(-1)
        total[start : start + TOKENS_SUMMED_AT_ONCE] = weighted.view(-1, top_k, like.shape[-1]).sum(
            1
        )
    return total


def _sum_expert_by_expert(
    weighted_PD: torch.Tensor, token_P: torch.Tensor, expert_P: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(like)
    start = 0
    for count in torch.bincount(expert_P).tolist():
        if count:
            rows = slice(start, start + count)
            total.index_add_(0, token_P[rows], weighted_PD[rows].to(total.dtype))
        start += count
    return total
