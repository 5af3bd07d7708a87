"""A family joined with one config.json: the only object the rest of the program asks about layers,
experts and groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from models.architecture import HASH_COUNT_KEY, Architecture, Config, ExpertTensor, Kind, Place
from models.errors import InputError
from models.moe_layers import number


def first_present(config: Config, keys: tuple[str, ...], family: str) -> str:
    """The first of `keys` that the config has. InputError when none is there."""
    for key in keys:
        if config.get(key) is not None:
            return key
    raise InputError(
        f"config.json of a {family} model has none of the keys {', '.join(keys)}; "
        "restore the original config.json"
    )


def whole_number(config: Config, key: str, family: str) -> int:
    """A count from the config (a list of equal counts is one count: Hunyuan)."""
    value = config[key]
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(
            f"config.json: {key} is {value!r}, a {family} model needs one whole number there; "
            "restore the original config.json"
        )
    return value


@dataclass(frozen=True)
class ModelSpec:
    """A family joined with one config.json. Every number is of the language model itself."""

    architecture: Architecture
    config: Mapping[str, Any]  # config.json as read

    @property
    def family(self) -> str:
        """The family's name."""
        return self.architecture.name

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The language model's own config (config.json itself when nothing is nested)."""
        key = self.architecture.text_config
        return self.config[key] if key and key in self.config else self.config

    def _count(self, keys: tuple[str, ...]) -> int:
        name = self.architecture.name
        return whole_number(self.text, first_present(self.text, keys, name), name)

    @cached_property
    def num_layers(self) -> int:
        """Decoder layers, MTP layers not counted."""
        arch = self.architecture
        value = self.text[first_present(self.text, arch.num_layers, arch.name)]
        return len(value) if isinstance(value, (list, str)) else self._count(arch.num_layers)

    @cached_property
    def num_experts(self) -> int:
        """Routed experts of a layer (zero-computation and shared experts not counted)."""
        return self._count(self.architecture.moe.num_experts)

    def num_experts_of(self, layer: int) -> int:
        """Routed experts of one layer. Hash layers keep the source's number when others are cut.

        No format has two counts, so our pruned config.json adds `HASH_COUNT_KEY` for them.
        """
        if layer in self.hash_layers and self.text.get(HASH_COUNT_KEY) is not None:
            return whole_number(self.text, HASH_COUNT_KEY, self.architecture.name)
        return self.num_experts

    @cached_property
    def top_k(self) -> int:
        """Routed experts a token."""
        return self._count(self.architecture.moe.top_k)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._count(("hidden_size",))

    @cached_property
    def expert_intermediate(self) -> int:
        """Inner width of one routed expert."""
        return self._count(self.architecture.moe.intermediate)

    @cached_property
    def num_groups(self) -> int:
        """n_group of group-limited routing; 1 where the router has no groups."""
        keys = self.architecture.moe.groups
        return number(self.text, keys[0], 1) or 1 if keys else 1

    @cached_property
    def topk_groups(self) -> int:
        """topk_group of group-limited routing; 1 where the router has no groups."""
        keys = self.architecture.moe.groups
        return number(self.text, keys[1], 1) or 1 if keys and self.num_groups > 1 else 1

    @cached_property
    def zero_experts(self) -> int:
        """Router rows of zero-computation experts behind the real ones (LongCat)."""
        key = self.architecture.moe.zero_experts
        return number(self.text, key, 0) if key else 0

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with routed experts, MTP not counted, ascending."""
        return tuple(self.architecture.moe.layers(self.text))

    @cached_property
    def hash_layers(self) -> tuple[int, ...]:
        """MoE layers whose experts are chosen by token id: never scored, never pruned."""
        return tuple(self.architecture.moe.hash_layers(self.text))

    @cached_property
    def scored_layers(self) -> tuple[int, ...]:
        """MoE layers with a learned router: what can be scored and pruned."""
        return tuple(layer for layer in self.moe_layers if layer not in self.hash_layers)

    @cached_property
    def num_mtp_layers(self) -> int:
        """MTP layers the config announces (the files may hold none)."""
        mtp = self.architecture.mtp
        if mtp is None:
            return 0
        return number(self.text, mtp.count, mtp.default) if mtp.count else mtp.default

    @cached_property
    def mtp_layers(self) -> tuple[int, ...]:
        """Checkpoint indices of MTP layers that continue the numbering; () for `mtp.` prefixes."""
        mtp = self.architecture.mtp
        if mtp is None or not mtp.numbered:
            return ()
        return tuple(range(self.num_layers, self.num_layers + self.num_mtp_layers))

    def canonical(self, name: str) -> str | None:
        """The language model's own name of an on-disk tensor; None for vision and the like."""
        arch = self.architecture
        if any(name.startswith(prefix) for prefix in arch.vision):
            return None
        for prefix, replacement in arch.wrappers:
            if name.startswith(prefix):
                return replacement + name[len(prefix) :]
        return name

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.architecture.layer).replace(r"\{layer\}", r"(\d+)")
        return re.compile(pattern + "(.+)")

    @cached_property
    def _expert_patterns(self) -> tuple[tuple[re.Pattern[str], ExpertTensor], ...]:
        return tuple(
            (re.compile(re.escape(e.name).replace(r"\{expert\}", r"(?P<expert>\d+)") + "$"), e)
            for e in self.architecture.moe.experts
        )

    def place(self, name: str) -> Place:
        """Where the logical tensor `name` belongs."""
        arch = self.architecture
        own = self.canonical(name)
        if own is None:
            return Place("vision")
        if arch.mtp is not None and not arch.mtp.numbered and own.startswith(arch.mtp.prefix):
            return Place("mtp")
        fixed: dict[str, Kind] = {arch.embed: "embed", arch.norm: "norm", arch.head: "head"}
        if own in fixed:
            return Place(fixed[own])
        match = self._layer_pattern.match(own)
        if match is None:
            return Place("other")
        layer, rest = int(match[1]), match[2]
        if layer >= self.num_layers and layer not in self.mtp_layers:
            return Place("other", layer)
        return self._place_in_layer(layer, rest)

    def _place_in_layer(self, layer: int, rest: str) -> Place:
        arch = self.architecture
        moe, mtp_layer = arch.moe, layer in self.mtp_layers
        block = moe.block + "." if moe.block else ""
        is_moe = mtp_layer or layer in self.moe_layers
        if is_moe and rest.startswith(block):
            inner = rest[len(block) :]
            for pattern, tensor in self._expert_patterns:
                match = pattern.match(inner)
                if match:
                    expert = None if tensor.stacked else int(match["expert"])
                    return Place("expert", layer, expert, tensor.role)
            if inner in moe.router:
                return Place("router", layer)
            if inner in moe.router_other:
                return Place("router_other", layer)
            if any(inner.startswith(prefix) for prefix in moe.shared):
                return Place("shared_expert", layer)
        if any(rest.startswith(prefix) for prefix in arch.attention):
            return Place("attention", layer)
        if any(rest.startswith(p) for p in arch.dense if not (is_moe and p == block)):
            return Place("dense_mlp", layer)
        if any(rest.startswith(prefix) for prefix in moe.shared):
            return Place("shared_expert", layer)
        if mtp_layer and "norm" not in rest.split(".")[0]:
            return Place("mtp", layer)
        return Place("layer_norm" if "norm" in rest else "other", layer)

    def expert_name(self, layer: int, expert: int | None, tensor: ExpertTensor) -> str:
        """Canonical name of one expert tensor (`expert` None for a stacked one)."""
        return self.block_prefix(layer) + tensor.name.format(expert=expert)

    def layer_prefix(self, layer: int) -> str:
        """Canonical prefix of a decoder (or numbered MTP) layer, with the closing dot."""
        return self.architecture.layer.format(layer=layer)

    def block_prefix(self, layer: int) -> str:
        """Canonical prefix of the MoE block of a layer, with the closing dot."""
        block = self.architecture.moe.block
        return self.layer_prefix(layer) + (block + "." if block else "")


def resolve(config: Mapping[str, Any], families: tuple[Architecture, ...]) -> ModelSpec:
    """Join a config.json with its family.

    Raises InputError when the model type is unknown or dense (with the list of what is known),
    when a required key is missing, or when a value is one that the family's code here does not
    implement.
    """
    known = ", ".join(sorted({t for family in families for t in family.model_types}))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("config.json has no model_type; restore the original config.json")
    matches = [family for family in families if model_type in family.model_types]
    if not matches:
        raise InputError(
            f"model_type {model_type!r} is not a Mixture-of-Experts family known here; "
            f"known: {known}"
        )
    spec = ModelSpec(matches[0], config)
    check_required(spec)
    return spec


def check_required(spec: ModelSpec) -> None:
    """Refuse configs whose counts cannot be true or whose options the family does not implement."""
    arch = spec.architecture
    for key, allowed in arch.requires.items():
        if key in spec.text and spec.text[key] not in allowed:
            raise InputError(
                f"config.json: {key} is {spec.text[key]!r}, {arch.title} is implemented for "
                f"{' or '.join(repr(value) for value in allowed)} only"
            )
    for key in ("hidden_size", "vocab_size"):
        value = spec.text.get(key, 1)  # where there is none transformers has a default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"config.json: {key} is {value!r}, a {arch.title} model needs a whole number above "
                "0 there; restore the original config.json"
            )
    if spec.num_mtp_layers < 0:
        raise InputError(
            f"config.json counts {spec.num_mtp_layers} MTP layers; restore the original config.json"
        )
    if spec.num_layers < 1 or not spec.moe_layers:
        raise InputError(
            f"config.json describes a {arch.title} model without a single MoE layer; "
            "there are no experts to score or prune"
        )
    if spec.top_k < 1 or spec.top_k > spec.num_experts + spec.zero_experts:
        raise InputError(
            f"config.json: {spec.top_k} experts a token of {spec.num_experts} experts; "
            "restore the original config.json"
        )
    if spec.num_experts % spec.num_groups or spec.topk_groups > spec.num_groups:
        raise InputError(
            f"config.json: {spec.num_experts} experts do not form {spec.num_groups} equal groups "
            f"(topk_group {spec.topk_groups}); restore the original config.json"
        )
