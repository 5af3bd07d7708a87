"""DeepSeek and the families built on its mould: Kimi, GLM, dots.

Routers here score with a sigmoid (DeepSeek-V2: softmax), choose with a correction bias that
does not enter the weight, and may choose in groups of consecutive experts. Facts were read in
transformers 5.17 (models/*/modeling_*.py, conversion_mapping.py) and in the model cards.
"""

from __future__ import annotations

from dataclasses import replace

from models.architecture import MTP, Architecture, ExpertTensor, MoE
from models.moe_layers import (
    after_first_dense,
    all_but_first,
    deepseek_v4_hash_layers,
    every_layer,
    listed_sparse,
)

PER_EXPERT = (
    ExpertTensor(role="gate", name="experts.{expert}.gate_proj.weight"),
    ExpertTensor(role="up", name="experts.{expert}.up_proj.weight"),
    ExpertTensor(role="down", name="experts.{expert}.down_proj.weight"),
)
# Mixtral's names: w1 is the gate, w3 the up and w2 the down projection
PER_EXPERT_W123 = (
    ExpertTensor(role="gate", name="experts.{expert}.w1.weight"),
    ExpertTensor(role="up", name="experts.{expert}.w3.weight"),
    ExpertTensor(role="down", name="experts.{expert}.w2.weight"),
)
ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")
GROUPS = ("n_group", "topk_group")
NUMBERED_MTP = MTP(prefix="model.layers.{layer}.", count="num_nextn_predict_layers")

NOAUX_TC = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}

BIASED_MOE = MoE(
    block="mlp",
    experts=PER_EXPERT,
    router=("gate.weight", "gate.e_score_correction_bias"),
    shared=("shared_experts.",),
    num_experts=ROUTED,
    groups=GROUPS,
    layers=after_first_dense(default=3),
)

DEEPSEEK_V2 = Architecture(
    name="deepseek_v2",
    title="DeepSeek-V2",
    model_types=("deepseek_v2",),
    transformers_type="deepseek_v2",
    moe=replace(
        BIASED_MOE, router=("gate.weight",), group_top=1, layers=after_first_dense(default=0)
    ),
    requires={
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),  # transformers never normalises here
        "moe_layer_freq": (1,),
    },
)

DEEPSEEK_V3 = Architecture(
    name="deepseek_v3",
    title="DeepSeek-V3",
    model_types=("deepseek_v3",),
    transformers_type="deepseek_v3",
    moe=BIASED_MOE,
    mtp=NUMBERED_MTP,
    requires=NOAUX_TC,
    notes="V3, R1 and V3.1. transformers drops the MTP layer on loading and on saving.",
)

DEEPSEEK_V32 = Architecture(
    name="deepseek_v32",
    title="DeepSeek-V3.2",
    model_types=("deepseek_v32",),
    transformers_type="deepseek_v32",
    indexer="self_attn.indexer",
    moe=replace(BIASED_MOE, layers=listed_sparse(after_first_dense(default=3))),
    mtp=NUMBERED_MTP,
    requires=NOAUX_TC,
    notes=(
        "Layers need an explicit 4D mask, never None (the indexer adds its own to it). "
        "transformers' FP8 loader fails on the ragged blocks: decode first."
    ),
)

DEEPSEEK_V4 = Architecture(
    name="deepseek_v4",
    title="DeepSeek-V4",
    model_types=("deepseek_v4",),
    transformers_type="deepseek_v4",
    moe=MoE(
        block="ffn",
        experts=PER_EXPERT_W123,
        router=("gate.weight", "gate.bias"),
        router_other=("gate.tid2eid",),  # expert ids by token id, hash layers only
        shared=("shared_experts.",),
        num_experts=ROUTED,
        layers=every_layer,
        hash_layers=deepseek_v4_hash_layers,
    ),
    mtp=MTP(prefix="mtp.", count="num_nextn_predict_layers"),
    layer="layers.{layer}.",
    embed="embed.weight",
    norm="norm.weight",
    head="head.weight",
    attention=("attn.", "hc_attn_", "hc_ffn_"),
    dense=(),
    float32_only=True,
    notes=(
        "Layers take input_ids (hash routing) and hidden states [B, S, hc_mult, D]; hc_head_* at "
        "the top level joins the streams before the final norm. Hash layers stay uncut: the "
        "pruned config.json has their count in thresher_hash_num_experts, which transformers "
        "does not know. Loaded in bfloat16, transformers 5.17 keeps the norms in float32 and "
        "fails at the first projection."
    ),
)

KIMI_K2 = Architecture(
    name="kimi_k2",
    title="Kimi-K2",
    model_types=("kimi_k2", "kimi_k25"),
    transformers_type="deepseek_v3",
    moe=BIASED_MOE,
    mtp=NUMBERED_MTP,
    text_config="text_config",
    wrappers=(("language_model.", ""),),
    vision=("vision_tower.", "mm_projector."),
    requires=NOAUX_TC,
    notes=(
        "K2 is FP8 in blocks; K2-Thinking and K2.5 keep routed experts in compressed-tensors "
        "INT4. K2.5 nests the language model's config, quantization_config included."
    ),
)

GLM4_MOE = Architecture(
    name="glm4_moe",
    title="GLM-4.5/4.6/4.7",
    model_types=("glm4_moe",),
    transformers_type="glm4_moe",
    moe=replace(BIASED_MOE, layers=after_first_dense(default=1)),
    mtp=NUMBERED_MTP,
    requires=NOAUX_TC,
)

GLM4_MOE_LITE = Architecture(
    name="glm4_moe_lite",
    title="GLM-4.7-Flash",
    model_types=("glm4_moe_lite",),
    transformers_type="glm4_moe_lite",
    moe=replace(BIASED_MOE, layers=listed_sparse(all_but_first)),
    mtp=NUMBERED_MTP,
    requires=NOAUX_TC,
)

GLM_MOE_DSA = Architecture(
    name="glm_moe_dsa",
    title="GLM-5",
    model_types=("glm_moe_dsa",),
    transformers_type="glm_moe_dsa",
    indexer="self_attn.indexer",
    moe=replace(BIASED_MOE, layers=listed_sparse(after_first_dense(default=3))),
    mtp=NUMBERED_MTP,
    carry=("prev_topk_indices",),
    requires=NOAUX_TC,
    notes=(
        "A layer returns (hidden states, top-k indices); layers without an indexer of their own "
        "(indexer_types) use the indices of the last that has one."
    ),
)

DOTS1 = Architecture(
    name="dots1",
    title="dots.llm1",
    model_types=("dots1",),
    transformers_type="dots1",
    moe=replace(BIASED_MOE, layers=after_first_dense(default=0)),
    requires=NOAUX_TC,
)

DEEPSEEK_FAMILIES = (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    KIMI_K2,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    DOTS1,
)
