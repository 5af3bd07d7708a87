"""Every weight of a model with its shape, from the config alone.

transformers builds the model on the meta device (0.2 s for DeepSeek-V3.2, no memory) and each
parameter's shape is read off. That is exact for every family by construction; formulas written
per family were refused, because they would state a second time what the model code states.
MTP layers that continue the layer numbers (DeepSeek, GLM), which transformers leaves out, are
added as DeepSeek publishes them: the last decoder layer, three norms, a projection from twice the
width, and copies of embedding and head. Those stored elsewhere (`mtp.`) differ by family, some
without experts; only a checkpoint's files tell their size.

torch is imported by `take` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from models.architecture import HASH_COUNT_KEY
from models.model_spec import ModelSpec

WeightKind = Literal["embed", "head", "router", "expert", "linear", "indexer", "other"]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """`count` tensors of one shape; a matrix is [out, in] whatever the file's orientation.

    `path` is transformers' module path below the layer (of the model, where `layer` is None).
    `expert` tensors exist once an expert, `router` ones have one row an expert, `indexer` ones
    belong to sparse attention; `linear` are all other matrices but embedding and head.
    """

    kind: WeightKind
    path: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None = None
    count: int = 1
    mtp: bool = False

    @property
    def parameters(self) -> int:
        """Weights in all of its tensors (tables of integers are none)."""
        return 0 if self.dtype.startswith("int") else prod(self.shape) * self.count

    @property
    def plain_bytes(self) -> int:
        """Bytes of all of its tensors in its own dtype."""
        return prod(self.shape) * self.count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Inventory:
    """All weights of a model, and its config with transformers' defaults filled in."""

    spec: ModelSpec
    weights: tuple[Weight, ...]
    config: Mapping[str, Any]

    @property
    def main(self) -> Iterator[Weight]:
        """All weights but those of MTP layers."""
        return (weight for weight in self.weights if not weight.mtp)

    @property
    def total(self) -> int:
        """Parameters, MTP layers not counted."""
        return sum(weight.parameters for weight in self.main)

    @property
    def mtp(self) -> int:
        """Parameters of MTP layers, their copies of embedding and head included."""
        return sum(weight.parameters for weight in self.weights if weight.mtp)

    @property
    def routed(self) -> int:
        """Parameters of routed experts, MTP layers not counted."""
        return sum(weight.parameters for weight in self.main if weight.kind == "expert")

    @property
    def active(self) -> int:
        """Parameters that multiply one token: top_k experts of each layer, and the embedding only
        where it is the head too (otherwise it is a look-up)."""
        tied = not any(weight.kind == "head" for weight in self.weights)
        active = 0
        for weight in self.main:
            if weight.kind == "expert":
                assert weight.layer is not None
                experts = self.spec.num_experts_of(weight.layer)
                active += weight.parameters * min(self.spec.top_k, experts) // experts
            elif weight.kind != "embed" or tied:
                active += weight.parameters
        return active

    def keep(self, experts: int) -> Inventory:
        """The model with `experts` experts left in every layer that can be pruned, MTP dropped.

        The number must have been checked against top_k and the groups.
        """
        pruned, before = set(self.spec.scored_layers), self.spec.num_experts
        rows = before + self.spec.zero_experts
        weights = []
        for weight in self.main:
            if weight.layer in pruned and weight.kind == "expert":
                weight = replace(weight, count=weight.count * experts // before)
            elif weight.layer in pruned and weight.kind == "router":
                axis = weight.shape.index(rows)
                shape = list(weight.shape)
                shape[axis] -= before - experts
                weight = replace(weight, shape=tuple(shape))
            weights.append(weight)
        arch = self.spec.architecture
        counts = {key: experts for key in arch.moe.num_experts if key in self.spec.text}
        if self.spec.hash_layers:  # they keep theirs
            counts[HASH_COUNT_KEY] = self.spec.num_experts_of(self.spec.hash_layers[0])
        text = {**self.spec.text, **counts}
        config: Mapping[str, Any] = text
        if arch.text_config is not None and arch.text_config in self.spec.config:
            config = {**self.spec.config, arch.text_config: text}
        return Inventory(ModelSpec(arch, config), tuple(weights), self.config)


def take(spec: ModelSpec) -> Inventory:
    """List every weight of the model that `spec`'s config describes.

    Raises InputError when transformers refuses the config.
    """
    import torch

    from models.meta_model import meta_model

    stored = str(spec.text.get("dtype") or spec.text.get("torch_dtype")).removeprefix("torch.")
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    model = meta_model(spec, dtypes.get(stored, torch.bfloat16), None)
    fixed: dict[int, WeightKind] = {id(model.get_input_embeddings().weight): "embed"}
    head = model.get_output_embeddings()
    if head is not None:
        fixed.setdefault(id(head.weight), "head")
    layers = {id(layer): index for index, layer in enumerate(model.model.layers)}
    seen: set[int] = set()
    weights: list[Weight] = []
    # (module, path, layer index) from the root down; a decoder layer starts a path of its own
    stack: list[tuple[Any, str, int | None]] = [(model, "", None)]
    while stack:
        module, path, layer = stack.pop()
        if id(module) in layers:
            path, layer = "", layers[id(module)]
        for name, tensor in _own_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            kind = fixed.get(id(tensor)) or _kind(spec, module, path, name, tensor, layer)
            full = f"{path}.{name}" if path else name
            weights.append(_as_on_disk(spec, kind, full, tensor, layer))
        children = [
            (child, f"{path}.{name}" if path else name, layer)
            for name, child in module.named_children()
        ]
        stack.extend(reversed(children))
    return Inventory(spec, (*weights, *_mtp_weights(spec, weights)), model.config.to_dict())


def _own_tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and stored buffers of one module, children not included."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _kind(
    spec: ModelSpec, module: Any, path: str, name: str, tensor: Any, layer: int | None
) -> WeightKind:
    import torch

    block = spec.architecture.moe.module
    if layer is not None and layer in spec.moe_layers and f"{path}.".startswith(f"{block}."):
        inner = path[len(block) + 1 :]
        if inner.split(".")[0] == "experts":
            return "expert"
        rows = spec.num_experts_of(layer) + spec.zero_experts
        if rows in tensor.shape and "shared" not in inner and "proj" not in inner:
            return "router"
    if "indexer" in path.split("."):
        return "indexer"
    linear = isinstance(module, torch.nn.Linear) and name == "weight" and tensor.shape[0] > 1
    return "linear" if linear else "other"


def _as_on_disk(
    spec: ModelSpec, kind: WeightKind, path: str, tensor: Any, layer: int | None
) -> Weight:
    """One parameter as the tensors it is on disk: stacked experts come apart, gate from up."""
    shape, count = tuple(tensor.shape), 1
    if kind == "expert":
        # LongCat's stack has rows for its zero-computation experts, which hold nothing
        count = min(shape[0], spec.num_experts_of(_moe_layer(layer)))
        shape = _projection(path, shape[1:], spec.expert_intermediate)
        if "gate_up" in path:
            shape, count = (shape[0] // 2, *shape[1:]), count * 2
    dtype = str(tensor.dtype).removeprefix("torch.")
    if path.startswith("self_attn.indexer.k_norm."):
        dtype = "float32"  # so stored by DeepSeek, whatever the model computes in
    return Weight(kind=kind, path=path, shape=shape, dtype=dtype, layer=layer, count=count)


def _moe_layer(layer: int | None) -> int:
    assert layer is not None, "experts lie in decoder layers"
    return layer


def _projection(path: str, shape: tuple[int, ...], inner: int) -> tuple[int, ...]:
    """One expert's matrix as [out, in]; transformers stores some families' [in, out]."""
    if len(shape) == 1:  # a bias
        return shape
    if "down" in path:
        return shape if shape[1] == inner else shape[::-1]
    rows = 2 * inner if "gate_up" in path else inner
    return shape if shape[0] == rows else shape[::-1]


def _mtp_weights(spec: ModelSpec, weights: list[Weight]) -> Iterator[Weight]:
    width = spec.hidden_size
    vocabulary = next(weight.shape for weight in weights if weight.kind == "embed")
    extra: tuple[tuple[WeightKind, str, tuple[int, ...]], ...] = (
        ("other", "enorm.weight", (width,)),
        ("other", "hnorm.weight", (width,)),
        ("other", "eh_proj.weight", (width, 2 * width)),
        ("other", "shared_head.norm.weight", (width,)),
        ("embed", "embed_tokens.weight", vocabulary),
        ("head", "shared_head.head.weight", vocabulary),
    )
    for layer in spec.mtp_layers:
        for weight in weights:
            if weight.layer == spec.num_layers - 1:
                yield replace(weight, layer=layer, mtp=True)
        for kind, path, shape in extra:
            yield Weight(kind=kind, path=path, shape=shape, dtype="bfloat16", layer=layer, mtp=True)
