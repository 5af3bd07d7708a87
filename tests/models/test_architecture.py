"""How a config becomes a spec, and how names are placed: the types of models/architecture.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.architecture import HASH_COUNT_KEY, Place
from models.errors import InputError
from models.families import FAMILIES, spec_of
from models.model_spec import resolve
from tests.tiny_configs import CONFIGS

FIXTURES = Path(__file__).parent.parent / "fixtures"


def deepseek_v32() -> dict[str, Any]:
    """The real model's config.json."""
    return json.loads((FIXTURES / "deepseek_v32" / "config.json").read_text())


def test_numbers_of_deepseek_v32() -> None:
    spec = spec_of(deepseek_v32())
    assert spec.family == "deepseek_v32"
    assert (spec.num_layers, spec.hidden_size, spec.expert_intermediate) == (61, 7168, 2048)
    assert (spec.num_experts, spec.top_k, spec.num_groups, spec.topk_groups) == (256, 8, 8, 4)
    assert spec.moe_layers == spec.scored_layers == tuple(range(3, 61))
    assert spec.mtp_layers == (61,)
    assert spec.num_mtp_layers == 1
    assert spec.hash_layers == ()
    assert spec.zero_experts == 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", Place("embed")),
        ("model.norm.weight", Place("norm")),
        ("lm_head.weight", Place("head")),
        ("model.layers.0.input_layernorm.weight", Place("layer_norm", 0)),
        ("model.layers.0.mlp.gate_proj.weight", Place("dense_mlp", 0)),
        ("model.layers.2.self_attn.q_a_layernorm.weight", Place("attention", 2)),
        ("model.layers.2.self_attn.indexer.k_norm.bias", Place("attention", 2)),
        ("model.layers.3.mlp.gate.weight", Place("router", 3)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Place("router", 3)),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Place("shared_expert", 3)),
        ("model.layers.60.mlp.experts.255.down_proj.weight", Place("expert", 60, 255, "down")),
        ("model.layers.61.mlp.experts.7.gate_proj.weight", Place("expert", 61, 7, "gate")),
        ("model.layers.61.mlp.gate.e_score_correction_bias", Place("router", 61)),
        ("model.layers.61.self_attn.o_proj.weight", Place("attention", 61)),
        ("model.layers.61.eh_proj.weight", Place("mtp", 61)),
        ("model.layers.61.embed_tokens.weight", Place("mtp", 61)),
        ("model.layers.61.shared_head.head.weight", Place("mtp", 61)),
        ("model.layers.61.shared_head.norm.weight", Place("mtp", 61)),
        # what no DeepSeek file has is named as such, never guessed
        ("model.layers.3.mlp.gate_proj.weight", Place("other", 3)),
        ("model.layers.3.mlp.experts.7.gate_proj.bias", Place("other", 3)),
        ("model.layers.62.mlp.gate.weight", Place("other", 62)),
        ("visual.proj.weight", Place("other")),
    ],
)
def test_places_of_deepseek_v32(name: str, place: Place) -> None:
    assert spec_of(deepseek_v32()).place(name) == place


def test_names_of_experts_are_placed_where_they_were_made() -> None:
    for name, config in CONFIGS.items():
        spec = spec_of(config)
        for layer in (*spec.moe_layers, *spec.mtp_layers):
            for tensor in spec.architecture.moe.experts:
                expert = None if tensor.stacked else 11
                place = spec.place(spec.expert_name(layer, expert, tensor))
                assert place == Place("expert", layer, expert, tensor.role), name


def test_wrapped_models_have_canonical_names() -> None:
    kimi, qwen = spec_of(CONFIGS["kimi_k25"]), spec_of(CONFIGS["qwen3_5_moe"])
    assert kimi.canonical("language_model.lm_head.weight") == "lm_head.weight"
    assert kimi.place("language_model.model.layers.1.mlp.gate.weight") == Place("router", 1)
    assert kimi.place("vision_tower.patch_embed.proj.weight") == Place("vision")
    assert qwen.place("model.language_model.layers.0.mlp.gate.weight") == Place("router", 0)
    assert qwen.place("model.visual.merger.norm.weight") == Place("vision")
    assert qwen.place("mtp.fc.weight") == Place("mtp")


def test_the_nested_config_is_the_models_own() -> None:
    spec = spec_of(CONFIGS["kimi_k25"])
    assert spec.config["model_type"] == "kimi_k25"
    assert spec.text["model_type"] == "kimi_k2"
    assert spec.num_experts == 16


def test_layers_count_by_the_length_of_a_pattern() -> None:
    spec = spec_of(CONFIGS["nemotron_h"])
    assert spec.num_layers == 5
    assert spec.moe_layers == (1, 3)


def test_hash_layers_keep_the_sources_count() -> None:
    config = CONFIGS["deepseek_v4"]
    spec = spec_of(config)
    assert spec.hash_layers == (0, 1)
    assert spec.scored_layers == (2, 3)
    assert [spec.num_experts_of(layer) for layer in range(4)] == [12] * 4
    pruned = spec_of({**config, "n_routed_experts": 8, HASH_COUNT_KEY: 12})
    assert [pruned.num_experts_of(layer) for layer in range(4)] == [12, 12, 8, 8]
    assert pruned.num_experts == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "llama"}, "'llama' is not a Mixture-of-Experts family known here"),
        ({"model_type": "qwen9_moe"}, "deepseek_v32"),
        ({"n_routed_experts": None}, "none of the keys n_routed_experts"),
        ({"n_routed_experts": "many"}, "n_routed_experts is 'many'"),
        ({"n_routed_experts": True}, "n_routed_experts is True"),
        ({"n_routed_experts": -8}, "n_routed_experts is -8"),
        ({"num_experts_per_tok": 0}, "0 experts a token"),
        ({"num_experts_per_tok": 300}, "300 experts a token"),
        ({"n_routed_experts": 250}, "do not form 8 equal groups"),
        ({"topk_group": 9}, "topk_group 9"),
        ({"first_k_dense_replace": 61}, "without a single MoE layer"),
        ({"first_k_dense_replace": "3"}, "first_k_dense_replace is '3'"),
        ({"num_hidden_layers": None}, "none of the keys num_hidden_layers"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "implemented for 'noaux_tc' only"),
    ],
)
def test_configs_that_cannot_be_true_are_refused(changes: dict[str, Any], words: str) -> None:
    config = {key: value for key, value in (deepseek_v32() | changes).items() if value is not None}
    with pytest.raises(InputError) as caught:
        spec_of(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_refusal_lists_every_known_model_type() -> None:
    with pytest.raises(InputError) as caught:
        resolve({"model_type": "llama"}, FAMILIES)
    for family in FAMILIES:
        for model_type in family.model_types:
            assert model_type in str(caught.value)
