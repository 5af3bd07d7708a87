"""What comes of rounding the matrices of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from quant.schemes import Quantized


@dataclass(slots=True)
class LayerRounding:
    """What rounding a layer gave. `quantized` and `largest_input` are by module."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    largest_input: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    without_tokens: int = 0  # experts
    few_tokens: int = 0
    fell_back: list[str] = field(default_factory=list)
