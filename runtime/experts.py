"""Routed experts whose weights stay packed.

`PackedExperts` is `models.experts.RoutedExperts` with another way to its products: routing,
sorting, activation and the weighted sum are the same code, so a packed model differs from a
decoded one in nothing but where a weight is rounded. Kernels that need no host in between
(`FusedExperts`) take the whole layer.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from models.experts import ExpertWeights, RoutedExperts
from runtime.kernel import Kernel
from runtime.packed import PackedWeights


@runtime_checkable
class FusedExperts(Protocol):
    """A kernel that runs a whole expert layer on the device, without asking the host."""

    def experts(
        self, layer: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor
    ) -> torch.Tensor:
        """Σ_k w_tk · f_e(t,k)(x_t), [T, D]."""
        ...


class PackedExperts(RoutedExperts):
    """The experts of one layer; `up` is gate and up joined (parts = 2) or the one before `act`."""

    def __init__(
        self,
        layer: int,
        original: nn.Module,
        num_experts: int,
        up: PackedWeights,
        down: PackedWeights,
    ) -> None:
        super().__init__(layer, original, num_experts)
        self.up, self.down = up, down
        self.up_bias: nn.Parameter | None
        self.down_bias: nn.Parameter | None
        self.register_parameter("up_bias", None)
        self.register_parameter("down_bias", None)
        self.kernel: Kernel | None = None

    @property
    def swiglu(self) -> bool:
        """Whether `activate` is silu(gate) · up and nothing else, so that a kernel may form it."""
        original = self._original[0]
        own_gate = getattr(type(original), "_apply_gate", _default_apply_gate)
        silu = isinstance(original.act_fn, (nn.SiLU, SiLUActivation))
        return self.gated and silu and own_gate is _default_apply_gate

    def view_plain(self) -> None:
        """Show unquantized weights under the names that Llama-4's float32 path reads."""
        if self.up.storage.kind == "plain" and self.transposed:
            self.weights = ExpertWeights(
                up=self.up.codes.transpose(1, 2),
                down=self.down.codes.transpose(1, 2),
                up_bias=None,
                down_bias=None,
                transposed=True,
            )

    def expert_outputs(
        self, inputs_PD: torch.Tensor, expert_P: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """f_e(x) of every pair, pairs sorted by expert."""
        assert self.kernel is not None, f"experts of layer {self.layer} are not loaded"
        up_PF = self.kernel.grouped(self.up, inputs_PD, offsets_E)
        if self.up_bias is not None:
            up_PF.add_(self.up_bias[expert_P])
        outputs_PD = self.kernel.grouped(self.down, self.activate(up_PF), offsets_E)
        if self.down_bias is not None:
            outputs_PD.add_(self.down_bias[expert_P])
        return outputs_PD

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, D], expert ids [T, K] and router weights [T, K] -> weighted sum [T, D]."""
        plain = self.up_bias is None and self.down_bias is None and not self.zero_experts
        kernel: object = self.kernel
        if plain and isinstance(kernel, FusedExperts):
            return kernel.experts(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)
