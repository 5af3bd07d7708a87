"""The matrices of a layer's routed experts, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.linears import Linear


@dataclass(frozen=True, slots=True)
class ExpertLinears:
    """The matrices of one routed expert; `gate` None where experts have none."""

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def ups(self) -> tuple[Linear, ...]:
        """Gate and up, where there are both: what reads the expert's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


def experts_of(linears: Sequence[Linear]) -> dict[int, ExpertLinears]:
    """The routed experts among a layer's matrices."""
    found: dict[int, dict[str, Linear]] = {}
    for linear in linears:
        if linear.is_expert and linear.place.expert is not None:
            role = str(linear.place.role)
            if role == "gate_up":
                role = "gate" if linear.rows is not None and linear.rows[0] == 0 else "up"
            found.setdefault(linear.place.expert, {})[role] = linear
    return {
        expert: ExpertLinears(parts.get("gate"), parts["up"], parts["down"])
        for expert, parts in sorted(found.items())
    }


def widest_of(experts: Mapping[int, ExpertLinears]) -> int:
    """Inputs of the widest matrix of an expert."""
    first = next(iter(experts.values()))
    return max(first.up.shape[1], first.down.shape[1])
