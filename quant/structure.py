"""What can be said against a checkpoint from its headers and config.json, no weight read.

Every function yields findings: one line each, naming the tensor, module or key. The matching of
targets and ignore is compressed-tensors' own, because that is what engines will do with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.utils.match import match_name

from models.checkpoint import Checkpoint, torch_dtype
from models.errors import InputError
from models.model_spec import ModelSpec
from models.shard_index import INDEX
from models.shards import DTYPE_BITS
from quant.export import Layout, stored
from quant.fused import fused_sets
from quant.linears import Linear, find_linears, head_module
from quant.recipe_files import GROUP_FIELDS, scheme_from, validated_group
from quant.schemes import Scheme
from quant.stored import StoredMatrix, StoredModel

SCALE_DTYPES = frozenset({"BF16", "F16", "F32"})


def check_files(checkpoint: Checkpoint) -> Iterator[str]:
    """The index's size, and weights that no index names."""
    path = checkpoint.root / INDEX
    held = {file.name for file in checkpoint.headers}
    for stray in sorted(checkpoint.root.glob("*.safetensors")):
        if stray.name not in held:
            yield f"{stray.name} is not part of the checkpoint, engines that list files load it"
    if path.is_file():
        said = json.loads(path.read_text()).get("metadata", {}).get("total_size")
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        if said != total:
            yield f"{INDEX}: total_size is {said}, the tensors have {total} bytes"
    for info in checkpoint.tensors.values():
        elements = 1
        for size in info.shape:
            elements *= size
        if elements * DTYPE_BITS[info.dtype] != info.nbytes * 8:
            yield f"{info.name}: {info.nbytes} bytes are not {list(info.shape)} of {info.dtype}"


def check_experts(spec: ModelSpec, modules: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Expert counts, router rows and empty layers. `modules`: logical name -> decoded shape."""
    experts: dict[tuple[int, str], set[int]] = {}
    layers: set[int] = set()
    zeros = spec.zero_experts
    for name, shape in modules.items():
        place = spec.place(name)
        if place.layer is None:
            continue
        layers.add(place.layer)
        count = spec.num_experts_of(place.layer)
        if place.kind == "router" and count + zeros not in shape:
            yield f"{name} of shape {list(shape)} has no {count + zeros} rows, as config.json says"
        if place.kind == "expert":
            mine = experts.setdefault((place.layer, str(place.role)), set())
            mine.update(range(shape[0]) if place.expert is None else (place.expert,))
    for layer in range(spec.num_layers):
        if layer not in layers:
            yield f"layer {layer} has no tensors, config.json says {spec.num_layers} layers"
    for layer in spec.moe_layers:
        if layer in layers and (layer, "down") not in experts:
            yield f"layer {layer} has no routed experts"
    for (layer, role), ids in sorted(experts.items()):
        count = spec.num_experts_of(layer)
        if ids != set(range(count)):
            odd = sorted(ids ^ set(range(count)))[0]
            yield (
                f"layer {layer} has {role} weights of {len(ids)} experts (see expert {odd}), "
                f"config.json says {count}"
            )


def check_routing(spec: ModelSpec) -> Iterator[str]:
    """Whether top_k experts can be chosen from what config.json counts."""
    experts, groups = spec.num_experts, spec.num_groups
    if spec.top_k > experts + spec.zero_experts:
        yield f"config.json: the router chooses {spec.top_k} of {experts} experts"
    if groups > 1:
        if experts % groups:
            yield f"config.json: {experts} experts are not divisible into {groups} groups"
            return
        if not 1 <= spec.topk_groups <= groups:
            yield f"config.json: {spec.topk_groups} of {groups} groups cannot be chosen"
        if spec.topk_groups * (experts // groups) < spec.top_k:
            yield (
                f"config.json: {spec.topk_groups} groups of {experts // groups} experts hold "
                f"fewer than the {spec.top_k} a token chooses"
            )
        if experts // groups < spec.architecture.moe.group_top:
            yield f"config.json: groups of {experts // groups} are too small to be scored"


class ConfigGroups:
    """config_groups and ignore of a quantization_config, matched as engines do."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """InputError for groups that are no scheme known here."""
        self.schemes: dict[str, Scheme] = {}
        self.targets: dict[str, list[str]] = {}
        self.settings: dict[str, Mapping[str, Any]] = {}
        for name, group in (settings.get("config_groups") or {}).items():
            where = f"config.json: {name}"
            known = {key: group[key] for key in GROUP_FIELDS & group.keys()}
            parsed = validated_group(known, where)
            self.schemes[name] = scheme_from(parsed.weights, parsed.input_activations, where)
            self.targets[name] = list(group.get("targets") or ())
            self.settings[name] = known
        self.ignore = list(settings.get("ignore") or ())
        self.ignored_paths = {entry for entry in self.ignore if not entry.startswith("re:")}
        self.ignore_patterns = [entry for entry in self.ignore if entry.startswith("re:")]

    layout: Layout = "compressed-tensors"

    def translate(
        self, module: str, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of `module` in compressed-tensors' words, which they are in here."""
        return dict(tensors)

    def ignored(self, module: str) -> bool:
        """Whether an entry of ignore matches."""
        return module in self.ignored_paths or any(
            match_name(module, pattern) for pattern in self.ignore_patterns
        )

    def groups_of(self, module: str) -> list[str]:
        """Names of all groups that target a Linear of this path."""
        return [
            name
            for name, targets in self.targets.items()
            if any(target == "Linear" or match_name(module, target) for target in targets)
        ]


def logical_shapes(model: StoredModel, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Logical name -> shape of everything; `shapes` are those of the quantized matrices."""
    plain = {name: info.shape for name, info in model.plain.items()}
    return {**plain, **{f"{module}.weight": shape for module, shape in shapes.items()}}


def check_config(
    spec: ModelSpec,
    model: StoredModel,
    shapes: Mapping[str, tuple[int, int]],
    groups: ConfigGroups,
    *,
    ours: bool,
) -> Iterator[str]:
    """Targets and ignore against what is quantized in the files, both ways.

    Publishers leave routers and vision towers out of ignore where transformers' classes are no
    Linears (Kimi); vLLM's may be, so `ours` must name them.
    """
    try:
        linears = find_linears(spec, logical_shapes(model, shapes))
    except InputError as error:
        yield str(error)
        return
    modules = {linear.module for linear in linears}
    for module in sorted(model.matrices.keys() - modules):
        yield f"{module} is quantized and no matrix of a {spec.architecture.title} model"
    for linear in linears:
        found = groups.groups_of(linear.module)
        ignored = groups.ignored(linear.module)
        if linear.module in model.matrices:
            if ignored or len(found) != 1:
                how = "ignored" if ignored else f"targeted by {len(found)} groups"
                yield f"{linear.module} is quantized, config.json has it {how}"
        elif found and not ignored and (ours or linear.place.kind not in ("router", "vision")):
            yield f"{linear.module} is not quantized, config.json targets it and does not ignore it"
    head = head_module(spec, {**model.plain, **{f"{m}.weight": 0 for m in model.matrices}})
    if head not in model.matrices and groups.groups_of(head) and not groups.ignored(head):
        yield f"{head} is not quantized and not in config.json's ignore"
    yield from _unmatched(groups, linears, head)


def _unmatched(groups: ConfigGroups, linears: Sequence[Linear], head: str) -> Iterator[str]:
    modules = {linear.module for linear in linears} | {head}
    for entry in sorted(groups.ignored_paths - modules):
        if "." in entry or entry == "lm_head":  # others may be class names
            yield f"config.json ignores {entry}, which is no matrix of the checkpoint"
    for pattern in groups.ignore_patterns:
        if not any(match_name(module, pattern) for module in modules):
            yield f"config.json ignores {pattern}, which matches no matrix"
    for name, targets in groups.targets.items():
        for target in targets:
            if target != "Linear" and not any(match_name(module, target) for module in modules):
                yield f"config.json: target {target} of {name} matches no matrix"


def check_layout(
    matrix: StoredMatrix, scheme: Scheme, shape: tuple[int, int], layout: Layout
) -> Iterator[str]:
    """Suffixes, types and shapes of one quantized matrix against its scheme."""
    name = "scales" if layout in ("gptq", "auto-round") else "weight_scale"
    scale = matrix.parts.get(name)
    if scale is None:
        yield f"{matrix.module} has no {name}"
        return
    expected = stored(layout, scheme, shape, torch_dtype(scale))
    if layout == "gptq" and "g_idx" not in matrix.parts:
        del expected["g_idx"]  # optional there
    for suffix in sorted(expected.keys() - matrix.parts.keys()):
        yield f"{matrix.module} has no {suffix}, which {scheme.name} needs"
    for suffix in sorted(matrix.parts.keys() - expected.keys()):
        yield f"{matrix.module} has a {suffix}, which {scheme.name} does not know"
    for suffix in sorted(expected.keys() & matrix.parts.keys()):
        info = matrix.parts[suffix]
        dtype, own = expected[suffix]
        wide = suffix == "weight_scale" and scheme.kind != "nvfp4"
        same_type = info.dtype in SCALE_DTYPES if wide else torch_dtype(info) == dtype
        if info.shape != own or not same_type:
            older = scheme.kind == "int" and suffix == "weight_packed"
            padded = older and info.shape[-1:] == (-(-shape[1] // (32 // scheme.bits)),)
            hint = " (the layout of compressed-tensors up to 0.17: quantize again)"
            yield (
                f"{info.name} is {info.dtype} {list(info.shape)}, {scheme.name} of "
                f"{list(shape)} needs {list(own)}{hint if padded else ''}"
            )


def check_partners(
    spec: ModelSpec, modules: Sequence[str], schemes: Mapping[str, Scheme | None]
) -> Iterator[str]:
    """One scheme for fused partners, and for all experts of a layer."""
    for partners in fused_sets(modules):
        names = {_name(schemes.get(module)) for module in partners}
        if any(schemes.get(module) != schemes.get(partners[0]) for module in partners):
            yield f"{' and '.join(partners)} are run as one matrix and stored as {sorted(names)}"
    first: dict[int, str] = {}
    for module in modules:
        place = spec.place(module + ".weight")
        if place.kind == "expert" and place.layer is not None:
            known = first.setdefault(place.layer, module)
            if schemes.get(known) != schemes.get(module):
                yield (
                    f"experts of layer {place.layer} differ: {known} is "
                    f"{_name(schemes.get(known))}, {module} is {_name(schemes.get(module))}"
                )
                first[place.layer] = module


def _name(scheme: Scheme | None) -> str:
    return "unquantized" if scheme is None else scheme.name
