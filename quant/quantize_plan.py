"""What a quantization will write, decided before the first byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from models.errors import InputError
from models.model_spec import ModelSpec
from models.opening import OpenModel, compute_dtype
from models.writer import MAX_SHARD_BYTES
from quant.export import Layout, check_export
from quant.gptq import GptqSettings
from quant.linears import Linear, find_linears
from quant.output import UnitShards
from quant.recipes import Recipe, Rule, schemes_of
from quant.schemes import Scheme
from quant.tensors import OutputTensors

Method = Literal["gptq", "rtn"]
REST = "rest"  # unit of what lies outside the layers


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """How to compute. `memory` bounds hidden states in host RAM, in bytes (None: no bound)."""

    method: Method = "gptq"
    propagate: Literal["compressed", "original"] = "compressed"
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    batch_tokens: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    layout: Layout = "compressed-tensors"


@dataclass(slots=True)
class QuantizePlan:
    """Everything that is decided before the first byte: matrices, schemes, shards."""

    opened: OpenModel
    recipe: Recipe
    linears: tuple[Linear, ...]
    schemes: dict[str, Scheme | None]
    damping: dict[str, float]  # modules rounded by GPTQ -> relative damping
    dtype: torch.dtype
    layout: Layout
    tensors: OutputTensors
    shards: UnitShards
    by_unit: dict[str, list[str]] = field(default_factory=dict)  # unit -> logical tensors


def plan_quantization(
    opened: OpenModel, recipe: Recipe, settings: QuantizeSettings
) -> QuantizePlan:
    """Join model and recipe. InputError for conflicts and matrices that cannot be stored."""
    source, spec = opened.source, opened.spec
    dtype = compute_dtype(spec, settings.dtype)
    linears, rules = meet(opened, recipe)
    schemes = schemes_of(rules)
    damping = {
        module: float(rule.options.get("dampening_frac", GptqSettings().damping))
        for module, rule in rules.items()
        if rule is not None and (rule.method or settings.method) == "gptq"
    }
    check_export(settings.layout, linears, schemes)
    by_unit: dict[str, list[str]] = {}
    for name in ordered_names(opened):
        by_unit.setdefault(unit_of_tensor(spec, name), []).append(name)
    ordered = {unit: by_unit[unit] for unit in sorted(by_unit, key=unit_order)}
    tensors = OutputTensors(source, linears, schemes, dtype, settings.layout)
    units = {
        unit: [planned for name in names for planned in tensors.planned(name)]
        for unit, names in ordered.items()
    }
    shards = UnitShards(units, settings.max_shard_bytes)
    return QuantizePlan(
        opened, recipe, linears, schemes, damping, dtype, settings.layout, tensors, shards, ordered
    )


def meet(opened: OpenModel, recipe: Recipe) -> tuple[tuple[Linear, ...], dict[str, Rule | None]]:
    """The model's matrices and what becomes of each. InputError where the recipe does not fit.

    Nothing is read but shapes: commands ask before they make tokens.
    """
    shapes = {name: opened.source.shape(name) for name in ordered_names(opened)}
    linears = find_linears(opened.spec, shapes)
    rules = recipe.assign(linears)
    if not any(rules.values()):
        raise InputError(f"{recipe.where} quantizes nothing of {opened.checkpoint.root}")
    return linears, rules


def ordered_names(opened: OpenModel) -> list[str]:
    """Sorted, so that a checkpoint and the same one seen through a plan give the same files."""
    return sorted(opened.source.names(), key=natural_order)


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sorting key by which expert 10 comes after expert 9."""
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in name.split("."))


def unit_of_tensor(spec: ModelSpec, name: str) -> str:
    """The unit a tensor is written with: its layer, or what lies outside."""
    layer = spec.place(name).layer
    return REST if layer is None else f"layer {layer}"


def unit_order(unit: str) -> tuple[int, int]:
    """What lies outside the layers first, then layers by number."""
    return (0, 0) if unit == REST else (1, int(unit.split()[1]))


def needs_tokens(plan: QuantizePlan) -> bool:
    """True when something must be run: GPTQ on a format it can help, or stored input scales."""
    used = {module: scheme for module, scheme in plan.schemes.items() if scheme is not None}
    return any(
        scheme.needs_tokens or (module in plan.damping and not scheme.kind.startswith("fp8"))
        for module, scheme in used.items()
    )


def linears_of(plan: QuantizePlan, layer: int | None) -> list[Linear]:
    """The matrices of a layer (None: outside the layers)."""
    return [linear for linear in plan.linears if linear.layer == layer]
