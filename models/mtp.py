"""The multi-token-prediction layer that continues the decoder's numbering (DeepSeek, GLM).

    h'_i = eh_proj([enorm(embed(t_{i+1})); hnorm(h_i)]),   then one more decoder layer

(DeepSeek-V3 report, arXiv 2412.19437, eq. 21), with h_i the main model's output after its final
norm, as the serving engines feed it. Only its routed experts are of interest here: engines build
its MoE with the model's one expert count, so an MTP layer must be cut like every other layer.
"""

from __future__ import annotations

import torch
from torch import nn

from models.experts import Observer, RoutedExperts
from models.layer_slot import Carry
from models.meta_model import empty
from models.skeleton import Skeleton


def runnable_mtp_layers(skeleton: Skeleton) -> tuple[int, ...]:
    """Checkpoint indices of MTP layers that are on disk and can be run here.

    Families that hand more than hidden states between layers (GLM-5) do not say what their MTP
    layer gets; theirs can only be dropped.
    """
    if skeleton.spec.architecture.carry:
        return ()
    return tuple(
        layer
        for layer in skeleton.spec.mtp_layers
        if skeleton.spec.layer_prefix(layer) + "eh_proj.weight" in skeleton.names
        and ("experts", layer) in skeleton.by_part
    )


class MTPLayer:
    """One MTP layer, filled from the skeleton's checkpoint."""

    def __init__(self, skeleton: Skeleton, index: int) -> None:
        self.skeleton, self.index = skeleton, index
        spec = skeleton.spec
        last = spec.num_layers - 1
        with torch.device("meta"):
            layer = type(skeleton.layers[last])(skeleton.model.config, last)
        self.layer = layer.to(skeleton.dtype).eval().requires_grad_(False)
        self.experts: RoutedExperts = skeleton.adopt_experts(self.layer, index)
        skeleton.adopt_indexer(self.layer)
        self.norms: dict[str, nn.Module] = {}
        self.projection: torch.Tensor | None = None

    def load(self, observe: Observer | None) -> None:
        """Fill the layer. Raises InputError for missing or broken tensors."""
        skeleton, prefix = self.skeleton, self.skeleton.spec.layer_prefix(self.index)
        head = ("enorm.", "hnorm.", "eh_proj.", "shared_head.", "embed_tokens.")
        body = [
            name
            for name in skeleton.by_part[self.index]
            if not name.removeprefix(prefix).startswith(head)
        ]
        skeleton.fill_as_last_layer(self.layer, self.index, body)
        skeleton.fill_experts(self.experts, self.index, observe)
        for name in ("enorm", "hnorm"):
            norm = type(skeleton.base.norm)(skeleton.spec.hidden_size).to(skeleton.dtype)
            norm.variance_epsilon = skeleton.base.norm.variance_epsilon
            norm.weight = nn.Parameter(
                skeleton.tensor(prefix + name + ".weight"), requires_grad=False
            )
            self.norms[name] = norm.to(skeleton.device)
        self.projection = skeleton.tensor(prefix + "eh_proj.weight")

    def unload(self) -> None:
        """Free the layer."""
        empty(self.layer)
        self.experts.weights = self.experts.observe = self.projection = None
        self.norms = {}

    def run(
        self,
        next_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        carry: Carry,
        position_ids: torch.Tensor | None = None,
    ) -> Carry:
        """int [B, S] ids of the following tokens and the last layer's output -> its output.

        The embedding must be loaded.
        """
        skeleton = self.skeleton
        assert self.projection is not None
        last = skeleton.spec.num_layers - 1
        call = skeleton.call(last, next_ids, attention_mask, position_ids)
        with torch.inference_mode():
            hidden = skeleton.base.norm(carry["hidden_states"])
            joined = torch.cat(
                [self.norms["enorm"](skeleton.embedding(next_ids)), self.norms["hnorm"](hidden)],
                dim=-1,
            )
            entering = nn.functional.linear(joined, self.projection)
            out = self.layer(entering, *call.args, **call.kwargs)
        return {"hidden_states": out[0] if isinstance(out, tuple) else out}
