"""What can be said against a checkpoint from its headers and config.json, no weight read.

Every function yields findings: one line each, naming the tensor, module or key. The matching of
targets and ignore is compressed-tensors' own, because that is what engines will do with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compressed_tensors.utils.match import match_name

from models.checkpoint import Checkpoint, torch_dtype
from models.dequantize import blocks_of
from models.errors import InputError
from models.model_spec import ModelSpec
from models.shard_index import INDEX, read_json
from models.shards import DTYPE_BITS
from models.source_formats import FP4_BLOCK, Source, quantization_config
from models.stored_parts import Format
from quant.config_groups import ConfigGroups, names_in
from quant.export import Layout, stored
from quant.fused import fused_sets
from quant.linears import find_linears, head_module
from quant.schemes import Scheme
from quant.stored import StoredMatrix, StoredModel

SCALE_DTYPES = frozenset({"BF16", "F16", "F32"})
NARROW_FLOATS = ("F8_E4M3", "F8_E5M2", "F4")  # nothing without a scale
# what a quant_method of config.json lets a reader expect, besides plain tensors
ANNOUNCED: Mapping[str | None, frozenset[Format]] = {
    None: frozenset(),
    "fp8": frozenset({"fp8_block", "fp4_block"}),
    "mxfp4": frozenset({"mxfp4"}),
    "compressed-tensors": frozenset({"int_packed", "nvfp4", "scaled"}),
    "gptq": frozenset({"gptq"}),
    "auto-round": frozenset({"gptq"}),
    "modelopt": frozenset({"modelopt"}),
}


def check_files(checkpoint: Checkpoint) -> Iterator[str]:
    """The index's size, and weights that no index names."""
    path = checkpoint.root / INDEX
    held = {file.name for file in checkpoint.headers}
    for stray in sorted(checkpoint.root.glob("*.safetensors")):
        if stray.name not in held:
            yield f"{stray.name} is not part of the checkpoint, engines that list files load it"
    if path.is_file():
        metadata = read_json(path, "").get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        if said != total:
            yield f"{INDEX}: total_size is {said}, the tensors have {total} bytes"
    for info in checkpoint.tensors.values():
        elements = 1
        for size in info.shape:
            elements *= size
        if elements * DTYPE_BITS[info.dtype] != info.nbytes * 8:
            yield f"{info.name}: {info.nbytes} bytes are not {list(info.shape)} of {info.dtype}"


def check_settings(spec: ModelSpec) -> Iterator[str]:
    """A quantization_config that is no object, lists in it that are none of names."""
    for config in (spec.config, spec.text):
        value = config.get("quantization_config")
        if value is not None and not isinstance(value, dict):
            yield f"config.json: quantization_config is {value!r}, not an object"
            return
    for key in ("ignore", "modules_to_not_convert"):
        try:
            names_in(quantization_config(spec), key, "config.json")
        except InputError as error:
            yield str(error)


def check_formats(source: Source) -> Iterator[str]:
    """Stored formats that config.json does not announce, and scales that do not fit its blocks.

    What has groups of its own (compressed-tensors and the like) is judged by `check_layout`.
    """
    announced = ANNOUNCED[source.quantization.get("quant_method")]
    unknown: dict[str, list[str]] = {}
    for name, own in source.stored.items():
        if own.format != "plain" and own.format not in announced:
            unknown.setdefault(own.format, []).append(name)
        elif own.format == "plain" and own.parts["weight"].dtype.startswith(NARROW_FLOATS):
            yield f"{name} is {own.parts['weight'].dtype} without a scale beside it"
        elif own.format in ("fp8_block", "fp4_block"):
            try:
                block = FP4_BLOCK if own.format == "fp4_block" else source.scale_block(name)
            except InputError as error:
                yield str(error)
                return  # the config's affair: the same for all
            shape, scale = source.shape(name), own.parts["scale_inv"].shape
            if len(shape) < 2 or scale != blocks_of(shape, block):
                yield (
                    f"{name} of shape {list(shape)} has scales {list(scale)}, which do not fit "
                    f"config.json's blocks of {block[0]}x{block[1]}"
                )
        elif own.format == "mxfp4":
            blocks, scales = own.parts["blocks"].shape, own.parts["scales"].shape
            if len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
                yield f"{name} is no MXFP4 pair: blocks {list(blocks)}, scales {list(scales)}"
    for form, names in unknown.items():
        more = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
        yield (
            f"{names[0]}{more} stored as {form}, which config.json's quantization_config does "
            "not say"
        )


def check_shapes(spec: ModelSpec, modules: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Embedding, head and final norm against the config's sizes; `modules` as in check_experts."""
    width, rows = spec.hidden_size, spec.text.get("vocab_size")
    found = set()
    for name, shape in modules.items():
        kind = spec.place(name).kind
        found.add(kind)
        if kind == "norm" and tuple(shape) != (width,):
            yield f"{name} has shape {list(shape)}, config.json says hidden_size {width}"
        table = shape[:1] if rows is None else (rows,)
        if kind in ("embed", "head") and tuple(shape) != (*table, width):
            yield (
                f"{name} has shape {list(shape)}, config.json says vocab_size {rows} and "
                f"hidden_size {width}"
            )
    if "embed" not in found:
        yield f"{spec.architecture.embed} is missing"
    if "norm" not in found:
        yield f"{spec.architecture.norm} is missing"


def check_layers(spec: ModelSpec, modules: Iterable[str]) -> Iterator[str]:
    """Layers that config.json does not count, and norms that only some of the layers have."""
    norms: dict[int, set[str]] = {}
    tails: dict[int, set[str]] = {}  # of MTP layers
    beyond: set[int] = set()
    for name in modules:
        place = spec.place(name)
        if place.layer is None:
            continue
        tail = (spec.canonical(name) or "").removeprefix(spec.layer_prefix(place.layer))
        if place.layer < spec.num_layers:
            own = norms.setdefault(place.layer, set())
            own.update([tail] if place.kind == "layer_norm" else [])
        elif place.layer in spec.mtp_layers:
            tails.setdefault(place.layer, set()).add(tail)
        else:
            beyond.add(place.layer)
    for layer in sorted(beyond):
        yield (
            f"layer {layer} is in the files, config.json says {spec.num_layers} layers"
            + (f" and {spec.num_mtp_layers} MTP layers" if spec.mtp_layers else "")
        )
    for layer, own in tails.items():
        if "eh_proj.weight" not in own:
            yield (
                f"layer {layer} would be an MTP layer, as config.json says {spec.num_layers} "
                "layers, and has no eh_proj"
            )
    every = set().union(*norms.values())
    for layer, own in sorted(norms.items()):
        for tail in sorted(every - own):
            yield f"layer {layer} has no {tail}, other layers have one"


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
    head = head_module(spec, {**model.plain, **{f"{m}.weight": 0 for m in model.matrices}})
    # publishers may name a wrapped model's head without its wrapper (Kimi-K2.5)
    names = {head} if ours else {head, head.rpartition(".")[2]}
    head_ignored = any(groups.ignored(name) for name in names)
    for linear in linears:
        found = groups.groups_of(linear.module)
        ignored = groups.ignored(linear.module) or (linear.module == head and head_ignored)
        if linear.module in model.matrices:
            if ignored or len(found) != 1:
                how = "ignored" if ignored else f"targeted by {len(found)} groups"
                yield f"{linear.module} is quantized, config.json has it {how}"
        elif found and not ignored and (ours or linear.place.kind not in ("router", "vision")):
            yield f"{linear.module} is not quantized, config.json targets it and does not ignore it"
    if head not in modules and groups.groups_of(head) and not head_ignored:  # tied, not stored
        yield f"{head} is not quantized and not in config.json's ignore"
    yield from _unmatched(groups, modules | names)


def _unmatched(groups: ConfigGroups, modules: set[str]) -> Iterator[str]:
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
