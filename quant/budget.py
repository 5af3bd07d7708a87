"""A byte budget shared out: which part of which layer gets which scheme.

A part is all matrices of one kind in one layer (attention, dense MLP, shared expert, routed
experts): what engines let differ. With d(p, s) the measured damage of part p under scheme s
(evals/part_damage.py) and b(p, s) its exact bytes, the choice s(p) is that of

    least  sum_p d(p, s(p))     with     fixed + sum_p b(p, s(p)) <= budget

a multiple-choice knapsack, solved over the frontier of (bytes, damage) that no other choice beats
in both. Up to `STATES` choices are carried from part to part, which is exact for small models;
beyond, of those within slack / STATES bytes of each other only the least damaging goes on. Sizes
stay exact, so the budget is never exceeded. Refused: greedy gain per byte, which leaves a gap
wherever the last large part does not fit.

Layers beyond the decoder (MTP) only draft: they get the smallest scheme. The result is an
ordinary recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import yaml

from models.errors import InputError
from models.opening import OpenModel
from quant.config import patterns
from quant.export import stored
from quant.linears import Linear
from quant.output import SAFETENSORS_DTYPES, Planned
from quant.quantize_plan import Method, QuantizeSettings, plan_quantization
from quant.recipe_files import MODIFIERS
from quant.recipes import uniform
from quant.schemes import SCHEMES, Scheme

STATES = 1 << 16


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """The matrices of one kind in one layer (absolute index)."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """What can be chosen: `nbytes` of each part by scheme, smallest scheme first.

    `fixed` are the bytes of everything that no scheme touches. `linears` are all matrices.
    """

    schemes: tuple[Scheme, ...]
    linears: tuple[Linear, ...]
    parts: Mapping[Part, tuple[Linear, ...]]
    nbytes: Mapping[Part, tuple[int, ...]]
    fixed: int
    num_layers: int

    @property
    def measured(self) -> tuple[Part, ...]:
        """The parts that the model's output depends on."""
        return tuple(part for part in self.parts if part.layer < self.num_layers)

    @property
    def smallest(self) -> int:
        """Bytes with the smallest scheme everywhere."""
        return self.size(dict.fromkeys(self.parts, 0))

    @property
    def largest(self) -> int:
        """Bytes that no choice exceeds."""
        return self.size(self.widest())

    def size(self, chosen: Mapping[Part, int]) -> int:
        """Bytes of all tensors under a choice."""
        return self.fixed + sum(self.nbytes[part][index] for part, index in chosen.items())

    def widest(self) -> dict[Part, int]:
        """The largest scheme for every part that counts."""
        last = len(self.schemes) - 1
        return {part: last if part.layer < self.num_layers else 0 for part in self.parts}


def menu_of(opened: OpenModel, schemes: Sequence[Scheme], settings: QuantizeSettings) -> Menu:
    """The parts of a model and their bytes. InputError when a scheme cannot store them all."""
    distinct = tuple(dict.fromkeys(schemes))
    if len(distinct) < 2:
        raise InputError("--budget chooses between schemes; give two or more by --schemes")
    if settings.layout != "compressed-tensors":
        raise InputError(
            f"--format {settings.layout} holds one scheme and --budget mixes them; "
            "use --format compressed-tensors"
        )
    plans = {scheme: plan_quantization(opened, uniform(scheme), settings) for scheme in distinct}
    ordered = sorted(plans, key=lambda scheme: (plans[scheme].shards.total_size, scheme.name))
    plan = plans[ordered[0]]
    parts: dict[Part, list[Linear]] = {}
    for linear in plan.linears:
        if plan.schemes[linear.module] is not None:
            assert linear.layer is not None
            parts.setdefault(Part(linear.layer, linear.place.kind), []).append(linear)
    nbytes = {
        part: tuple(
            sum(bytes_of(linear, scheme, plan.dtype) for linear in linears) for scheme in ordered
        )
        for part, linears in sorted(parts.items())
    }
    return Menu(
        schemes=tuple(ordered),
        linears=plan.linears,
        parts={part: tuple(parts[part]) for part in nbytes},
        nbytes=nbytes,
        fixed=plan.shards.total_size - sum(sizes[0] for sizes in nbytes.values()),
        num_layers=opened.spec.num_layers,
    )


def bytes_of(linear: Linear, scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Bytes of the tensors that a matrix becomes."""
    tensors = stored("compressed-tensors", scheme, linear.shape, scale_dtype)
    return sum(
        Planned(suffix, SAFETENSORS_DTYPES[dtype], shape).nbytes
        for suffix, (dtype, shape) in tensors.items()
    )


def check_budget(menu: Menu, budget: int) -> None:
    """InputError for a budget below the smallest size, which it names."""
    if budget < menu.smallest:
        names = ", ".join(scheme.name for scheme in menu.schemes)
        raise InputError(
            f"--budget {budget:,} bytes is too small: with {names} the model takes "
            f"{menu.smallest:,} bytes ({menu.smallest / 1e9:.2f} GB) at least; allow that much, "
            "add a smaller scheme to --schemes, or prune experts first"
        )


def share_out(menu: Menu, damage: Mapping[Part, Sequence[float]], budget: int) -> dict[Part, int]:
    """Part -> index of its scheme, of least summed damage within `budget` bytes.

    `damage` is by scheme in the menu's order, for every measured part.
    """
    check_budget(menu, budget)
    harmless = (0.0,) * len(menu.schemes)
    options = [
        list(zip(sizes, damage[part] if part.layer < menu.num_layers else harmless, strict=True))
        for part, sizes in menu.nbytes.items()
    ]
    return dict(zip(menu.parts, least_damage(options, budget - menu.fixed), strict=True))


def least_damage(options: Sequence[Sequence[tuple[int, float]]], room: int) -> list[int]:
    """One of each list of (bytes, damage), of least summed damage in `room` bytes, by index.

    Of equal damages the fewest bytes. The smallest of each must fit.
    """
    smallest = [min(size for size, _ in own) for own in options]
    slack = room - sum(smallest)
    assert slack >= 0
    extra_N = torch.zeros(1, dtype=torch.int64)  # bytes beyond the smallest, ascending
    damage_N = torch.zeros(1, dtype=torch.float64)  # descending
    came_from: list[tuple[torch.Tensor, torch.Tensor]] = []
    for own, least in zip(options, smallest, strict=True):
        size_S = torch.tensor([size - least for size, _ in own])
        harm_S = torch.tensor([harm for _, harm in own], dtype=torch.float64)
        extra = (extra_N[:, None] + size_S).flatten()
        damage = (damage_N[:, None] + harm_S).flatten()
        kept = frontier(extra, damage, slack)
        extra_N, damage_N = extra[kept], damage[kept]
        came_from.append((kept // len(own), kept % len(own)))
    state, chosen = len(extra_N) - 1, []
    for parent, option in reversed(came_from):
        chosen.append(int(option[state]))
        state = int(parent[state])
    return chosen[::-1]


def frontier(extra: torch.Tensor, damage: torch.Tensor, slack: int) -> torch.Tensor:
    """Indices of the choices within `slack` that no smaller one equals, by size; thinned."""
    by_damage = damage.argsort(stable=True)
    order = by_damage[extra[by_damage].argsort(stable=True)]
    order = order[extra[order] <= slack]
    best = damage[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = best[1:] < best[:-1]
    order = order[better]
    if len(order) > STATES:
        bucket = extra[order] // max(1, slack // STATES)
        last = torch.ones(len(order), dtype=torch.bool)
        last[:-1] = bucket[1:] != bucket[:-1]
        order = order[last]
    return order


def recipe_text(menu: Menu, chosen: Mapping[Part, int], method: Method) -> str:
    """The choice as a recipe file in llm-compressor's form."""
    groups: dict[str, object] = {}
    for index, scheme in enumerate(menu.schemes):
        mine = [linear for part, at in chosen.items() if at == index for linear in menu.parts[part]]
        if not mine:
            continue
        targets = patterns(mine, menu.linears)
        if SCHEMES.get(scheme.name) == scheme:
            groups[scheme.name] = targets
        else:
            fields = ("num_bits", "type", "strategy", "group_size", "symmetric")
            weights = scheme.weights.model_dump(mode="json", include=set(fields))
            groups[scheme.name] = {"targets": targets, "weights": weights}
    modifier = next(name for name, own in MODIFIERS.items() if own == method)
    content = {"quant_stage": {"quant_modifiers": {modifier: {"config_groups": groups}}}}
    return yaml.safe_dump(content, sort_keys=False, width=1000)
