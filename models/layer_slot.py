"""What stands in transformers' model where its decoder layers and embedding were.

models/skeleton.py says how a walk uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Carry = dict[str, torch.Tensor]  # "hidden_states" and what the family hands on besides


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments transformers' forward gives one decoder layer, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor among them, however deep."""
        waiting: list[Any] = [*self.args, *self.kwargs.values()]
        while waiting:
            value = waiting.pop()
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, Mapping):
                waiting.extend(value.values())
            elif isinstance(value, (tuple, list)):
                waiting.extend(value)


class LayerSlot(nn.Module):
    """Stands where a decoder layer was."""

    def __init__(self, layer: nn.Module, carry_names: tuple[str, ...]) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple hides its parameters from state_dict
        self.carry_names = carry_names
        self.seen: LayerCall | None = None
        self.hidden_seen: torch.Tensor | None = None
        self.returns: Carry | None = None
        self.returns_first = False  # of the positions, where nobody wants what follows

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what forward asks of a layer, such as nemotron's block_type
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments; return the hidden states given, or `returns`."""
        self.seen, self.hidden_seen = LayerCall(args, kwargs), hidden_states
        given = hidden_states[:, :1] if self.returns_first else hidden_states
        carry = self.returns or {"hidden_states": given}
        if not self.carry_names:
            return carry["hidden_states"]
        return (carry["hidden_states"], *(carry.get(name) for name in self.carry_names))


class ZeroEmbedding(nn.Module):
    """Token ids -> zeros [B, S, D]: only shapes matter while calls are recorded."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.hidden_size, self.dtype = hidden_size, dtype
        self.weight = torch.empty(0, device=device)  # Llama-4 asks it where to put token ids

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int [B, S] -> [B, S, D]."""
        return torch.zeros(
            (*input_ids.shape, self.hidden_size), dtype=self.dtype, device=input_ids.device
        )
