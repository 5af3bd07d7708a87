"""What a Mixture-of-Experts family is, as data: on-disk tensor names and config keys.

One `Architecture` constant describes one family (models/families.py holds the table). All names
are the *logical* ones of the checkpoint's files (models/source_formats.py joins `weight` with its
scales before anything here is asked), never those of transformers' modules: files are what is
read, cut and written. models/model_spec.py joins a family with one config.json.

Python data was chosen over JSON templates: "the first k layers are dense" is a function of the
config, and a template language without it grows escape hatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]

HASH_COUNT_KEY = "thresher_hash_num_experts"  # our config key: experts of an uncut hash layer

Role = Literal["gate", "up", "gate_up", "down", "gate_up_bias", "up_bias", "down_bias"]
Kind = Literal[
    "embed",
    "head",
    "norm",
    "attention",
    "layer_norm",
    "dense_mlp",
    "router",
    "router_other",
    "expert",
    "expert_other",
    "shared_expert",
    "mtp",
    "vision",
    "other",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensor:
    """One kind of expert weight below the MoE block.

    `name` holds `{expert}` where each expert has its own tensor ([out, in], or [in, out] when
    `transposed`); without it all experts are stacked along dim 0.
    """

    role: Role
    name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """True when one tensor holds all experts along dim 0."""
        return "{expert}" not in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """The MoE block of a family.

    `router` names the tensors with one row an expert (LongCat: rows of zero-computation experts
    follow and stay): they are cut with the experts. `router_other` are router tensors that are
    never cut. `groups` are the config keys (n_group, topk_group); `group_top` is how many expert
    scores make a group's score (DeepSeek-V3: the sum of 2; V2: the maximum, 1).
    """

    block: str
    experts: tuple[ExpertTensor, ...]
    router: tuple[str, ...]
    router_columns: tuple[str, ...] = ()  # of `router`: shaped [1, E], cut along dim 1
    router_other: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    module: str = "mlp"  # transformers' path of the block inside its decoder layer
    weights_input: bool = False  # the router weight multiplies the expert's input (Llama-4)
    num_experts: tuple[str, ...]  # config keys that may hold the count; every one present is edited
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    intermediate: tuple[str, ...] = ("moe_intermediate_size",)
    groups: tuple[str, str] | None = None
    group_top: int = 2
    layers: Callable[[Config], tuple[int, ...]]
    hash_layers: Callable[[Config], tuple[int, ...]] = lambda config: ()
    zero_experts: str | None = None  # config key: router rows after the real experts
    feeds_linears: bool = False  # what its experts give goes into a Linear of the same layer


@dataclass(frozen=True, slots=True, kw_only=True)
class MTP:
    """Multi-token-prediction layers as stored beside the model.

    `prefix` is their on-disk prefix: with `{layer}` they continue the layer numbers (DeepSeek,
    GLM) and can be pruned by their own saliency; a fixed one (`mtp.`) can only be dropped.
    `count` is the config key of their number, `block` the MoE block below the prefix.
    """

    prefix: str
    count: str | None
    default: int = 0  # where the config has no count key

    @property
    def numbered(self) -> bool:
        """True when MTP layers continue the decoder's numbering."""
        return "{layer}" in self.prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model family: how its files are named and which transformers code runs it."""

    name: str  # our name and the table's key
    title: str
    model_types: tuple[str, ...]  # config.json model_type values it answers to
    transformers_type: str  # model_type of the transformers causal LM that runs it
    moe: MoE
    mtp: MTP | None = None
    text_config: str | None = None  # config key that holds the language model's config
    # (prefix on disk, canonical prefix) of wrapped models, tried in order
    wrappers: tuple[tuple[str, str], ...] = ()
    vision: tuple[str, ...] = ()  # on-disk prefixes of parts that are carried, never run
    layer: str = "model.layers.{layer}."
    embed: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    attention: tuple[str, ...] = ("self_attn.",)
    indexer: str | None = None  # module below a layer that models/sparse_attention.py stands in for
    dense: tuple[str, ...] = ("mlp.",)
    # config keys of the number of decoder layers; a list or string there counts by its length
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    # names of what a decoder layer hands to the next besides hidden states (GLM-5)
    carry: tuple[str, ...] = ()
    # transformers keeps norms in float32 whatever the type asked for and then mixes types
    float32_only: bool = False
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. `layer` is the checkpoint's index; `row` tells a router tensor."""

    kind: Kind
    layer: int | None = None
    expert: int | None = None
    role: Role | None = None


def expert_axis(shape: Sequence[int]) -> int:
    """The axis of a router's tensor that counts experts: 0, but 1 where [E] is stored as [1, E]."""
    return next((axis for axis, size in enumerate(shape) if size != 1), 0)
