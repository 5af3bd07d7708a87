"""The MoE block of a family whose router weights multiply the experts' *input* (Llama-4).

Legend: T tokens, P routed pairs, E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.experts import RoutedExperts


class InputWeightedBlock(nn.Module):
    """Stands in for a MoE block whose router weights the experts' input (Llama-4).

        y_t = shared(x_t) + sum_e f_e(w_te * x_t)

    transformers runs every expert on every token there, unrouted rows multiplied by zero. Only
    routed rows (w_te != 0) are run here; f_e(0) = 0, so the sum is the same. In float32 a row's
    last bits depend on how many rows its GEMM has, so there, where exactness was asked for, each
    expert that has a token runs on all rows as transformers' does.
    """

    def __init__(self, original: Any, experts: RoutedExperts) -> None:
        super().__init__()
        self.router = original.router
        self.shared_expert = original.shared_expert
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> ([T, D], router logits [T, E]), as transformers' block returns."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, logits_TE = self.router(hidden_TD)
        expert_P, token_P = scores_TE.T.nonzero(as_tuple=True)
        weight_P = scores_TE[token_P, expert_P]
        offsets_E = torch.bincount(expert_P, minlength=self.experts.num_experts).cumsum(0)
        if self.experts.inputs_only:
            outputs_PD = hidden_TD.new_empty(0)
        elif hidden_TD.dtype == torch.float32:
            outputs_PD = self._full_rows(hidden_TD, scores_TE, token_P, offsets_E)
        else:
            inputs_PD = hidden_TD[token_P] * weight_P.unsqueeze(-1)
            outputs_PD = self.experts.expert_outputs(inputs_PD, expert_P, offsets_E)
        self.experts.show(
            offsets_E,
            expert_P,
            token_P,
            weight_P,
            hidden_TD,
            outputs_PD,
            weights_applied_to_input=True,
        )
        routed_TD = torch.zeros_like(hidden_TD)
        if not self.experts.inputs_only:
            routed_TD.index_add_(0, token_P, outputs_PD)
        return self.shared_expert(hidden_TD).add_(routed_TD), logits_TE

    def _full_rows(
        self,
        hidden_TD: torch.Tensor,
        scores_TE: torch.Tensor,
        token_P: torch.Tensor,
        offsets_E: torch.Tensor,
    ) -> torch.Tensor:
        weights = self.experts.weights
        assert weights is not None
        outputs_PD = hidden_TD.new_empty((len(token_P), hidden_TD.shape[-1]))
        start = 0
        for expert, end in enumerate(offsets_E.tolist()):
            if end > start:
                x_TD = hidden_TD * scores_TE[:, expert, None]
                up_TF = torch.mm(x_TD, weights.up[expert])
                out_TD = torch.mm(self.experts.activate(up_TF), weights.down[expert])
                outputs_PD[start:end] = out_TD[token_P[start:end]]
            start = end
        return outputs_PD
