"""Families with their own layout around a biased router (sigmoid; LongCat: softmax).

MiniMax, MiMo, LongCat, Nemotron-H, Hy3, AFMoE and Kimi-Linear. Facts were read in transformers
5.17 (models/*/modeling_*.py, conversion_mapping.py) and in the model cards.
"""

from __future__ import annotations

from models.architecture import MTP, Architecture, ExpertTensor, MoE
from models.families_deepseek import (
    GROUPS,
    NUMBERED_MTP,
    PER_EXPERT,
    PER_EXPERT_W123,
    ROUTED,
)
from models.moe_layers import (
    after_first_dense,
    all_but_first,
    every_layer,
    listed_sparse,
    longcat_layers,
    nemotron_pattern,
)

MINIMAX_M2 = Architecture(
    name="minimax_m2",
    title="MiniMax-M2",
    model_types=("minimax_m2",),
    transformers_type="minimax_m2",
    moe=MoE(
        block="block_sparse_moe",
        experts=PER_EXPERT_W123,
        router=("gate.weight", "e_score_correction_bias"),
        num_experts=("num_local_experts", "num_experts"),
        intermediate=("intermediate_size",),
        layers=every_layer,
    ),
    requires={
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0,),
    },
    notes="The correction bias lies on the block, beside the router. MTP weights are not shipped.",
)

MIMO_V2_FLASH = Architecture(
    name="mimo_v2_flash",
    title="MiMo-V2-Flash",
    model_types=("mimo_v2_flash",),
    transformers_type="mimo_v2_flash",
    moe=MoE(
        block="mlp",
        experts=PER_EXPERT,
        router=("gate.weight", "gate.e_score_correction_bias"),
        num_experts=ROUTED,
        groups=GROUPS,
        layers=listed_sparse(all_but_first),
    ),
    mtp=MTP(prefix="model.mtp.", count="num_nextn_predict_layers", default=3),
    requires={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "n_shared_experts": (None, 0),
        "add_swa_attention_sink_bias": (True,),
        "add_full_attention_sink_bias": (False,),
    },
    notes="Rotary tables are a dict by layer type.",
)

LONGCAT_FLASH = Architecture(
    name="longcat_flash",
    title="LongCat-Flash",
    model_types=("longcat_flash",),
    transformers_type="longcat_flash",
    moe=MoE(
        block="mlp",
        experts=PER_EXPERT,
        router=("router.classifier.weight", "router.e_score_correction_bias"),
        num_experts=ROUTED,
        top_k=("moe_topk", "num_experts_per_tok"),
        intermediate=("expert_ffn_hidden_size", "moe_intermediate_size"),
        layers=longcat_layers,
        zero_experts="zero_expert_num",
    ),
    mtp=MTP(prefix="model.mtp.", count="num_nextn_predict_layers", default=1),
    dense=("mlps.",),
    num_layers=("num_layers",),
    requires={"router_bias": (False,), "zero_expert_type": ("identity",)},
    notes=(
        "A layer is two attentions (self_attn.0, .1), two dense MLPs (mlps.0, .1) and one MoE "
        "block beside them. Router rows from n_routed_experts on are zero-computation experts, "
        "which give their input back; transformers' stacked gate_up_proj has rows for them too, "
        "never read, and files have none."
    ),
)

NEMOTRON_H = Architecture(
    name="nemotron_h",
    title="Nemotron-H",
    model_types=("nemotron_h",),
    transformers_type="nemotron_h",
    moe=MoE(
        block="mixer",
        experts=(
            ExpertTensor(role="up", name="experts.{expert}.up_proj.weight"),
            ExpertTensor(role="down", name="experts.{expert}.down_proj.weight"),
        ),
        router=("gate.weight", "gate.e_score_correction_bias"),
        shared=("shared_experts.", "fc1_latent_proj.", "fc2_latent_proj."),
        feeds_linears=True,  # fc2_latent_proj
        module="mixer",
        num_experts=ROUTED,
        groups=GROUPS,
        layers=nemotron_pattern,
    ),
    mtp=MTP(prefix="mtp.", count="num_nextn_predict_layers"),
    layer="backbone.layers.{layer}.",
    embed="backbone.embeddings.weight",
    norm="backbone.norm_f.weight",
    attention=("mixer.",),
    dense=(),
    num_layers=("layers_block_type", "layer_types", "hybrid_override_pattern"),
    notes=(
        "One mixer a layer: Mamba, attention, MLP or MoE. Experts have no gate (relu squared); "
        "with moe_latent_size they work between fc1_latent_proj and fc2_latent_proj. "
        "transformers sums the experts in the router weights' float32."
    ),
)

HY_V3 = Architecture(
    name="hy_v3",
    title="Hy3",
    model_types=("hy_v3",),
    transformers_type="hy_v3",
    moe=MoE(
        block="mlp",
        experts=PER_EXPERT,
        router=("router.gate.weight", "expert_bias"),
        shared=("shared_mlp.",),
        num_experts=("num_experts", "num_local_experts"),
        layers=listed_sparse(all_but_first),
    ),
    mtp=NUMBERED_MTP,
)

AFMOE = Architecture(
    name="afmoe",
    title="AFMoE",
    model_types=("afmoe",),
    transformers_type="afmoe",
    moe=MoE(
        block="mlp",
        experts=PER_EXPERT,
        router=("router.gate.weight", "expert_bias"),
        shared=("shared_experts.",),
        num_experts=("num_experts", "num_local_experts"),
        layers=after_first_dense(default=1, key="num_dense_layers"),
    ),
    requires={"n_group": (None, 1), "score_func": ("sigmoid",), "route_norm": (True,)},
)

KIMI_LINEAR = Architecture(
    name="kimi_linear",
    title="Kimi-Linear",
    model_types=("kimi_linear",),
    transformers_type="kimi_linear",
    moe=MoE(
        block="block_sparse_moe",
        experts=PER_EXPERT_W123,
        router=("gate.weight", "gate.e_score_correction_bias"),
        shared=("shared_experts.",),
        num_experts=("num_experts", "num_local_experts", "n_routed_experts"),
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        groups=("num_expert_group", "topk_group"),
        layers=listed_sparse(after_first_dense(default=1)),
    ),
    requires={"moe_router_activation_func": ("sigmoid",), "moe_layer_freq": (1,)},
)

SIGMOID_FAMILIES = (
    MINIMAX_M2,
    MIMO_V2_FLASH,
    LONGCAT_FLASH,
    NEMOTRON_H,
    HY_V3,
    AFMOE,
    KIMI_LINEAR,
)
