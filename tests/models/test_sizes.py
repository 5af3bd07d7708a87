"""Sizes against published totals, against transformers' own counts and against real files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.errors import InputError
from models.families import spec_of
from models.inventory import Inventory, take
from models.machines import MACHINES
from models.model_spec import ModelSpec
from models.needs import SNAPSHOTS, needs
from models.serving import cache_bytes, caches, fitting
from models.sizes import SCHEMES, Storage, bytes_in, largest_layer, quantized, storage, tensors_in
from quant.export import Layout
from quant.recipes import uniform
from quant.schemes import SCHEMES as QUANT_SCHEMES
from quant.schemes import Scheme, int_scheme
from tests.quant.checkpoints import quantized_checkpoint
from tests.tiny import read_all, tiny_model

NVFP4 = QUANT_SCHEMES["NVFP4"]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "deepseek_v32" / "config.json"


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """transformers' default config of a family, which is that of a published model."""
    return {**AutoConfig.for_model(model_type).to_dict(), **changes}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def deepseek(config: dict[str, Any]) -> Inventory:
    return take(spec_of(config))


def test_deepseek_v32_parameters(deepseek: Inventory) -> None:
    assert deepseek.total == 671_877_944_064
    # published names: REAP-508B-A37B, REAP-345B-A37B
    assert round(deepseek.keep(192).total / 1e9, 1) == 508.4
    assert round(deepseek.keep(128).total / 1e9, 1) == 344.9
    assert round(deepseek.active / 1e9, 1) == 37.5


def test_deepseek_v32_bytes_on_disk(deepseek: Inventory, config: dict[str, Any]) -> None:
    form = storage(config, config)
    # a public listing: 92,425 tensors, 685.4B elements, 642.1 GiB
    assert bytes_in(deepseek, form, mtp=True) == 689_469_018_240
    assert tensors_in(deepseek, form, mtp=True) == 92_425
    assert largest_layer(deepseek, form) == 11_526_369_728
    expert = next(w for w in deepseek.main if w.kind == "expert")
    assert form.bytes_of(expert) // expert.count == 44_050_944 // 3


def test_deepseek_v31_has_no_indexer(config: dict[str, Any]) -> None:
    v31 = {k: v for k, v in config.items() if not k.startswith("index_")}
    v31["model_type"] = "deepseek_v3"
    inventory, form = take(spec_of(v31)), storage(v31, v31)
    assert tensors_in(inventory, form, mtp=True) == 91_991
    assert round(bytes_in(inventory, form, mtp=True) / 1e9, 2) == 688.57


def test_published_three_bit_size(deepseek: Inventory) -> None:
    # DeepSeek-V3.2-345B-W3A16 is published with 138 GB
    assert bytes_in(deepseek.keep(128), quantized("W3A16")) == pytest.approx(138e9, rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    # bits a weight of a wide matrix with its scales: formats' definitions
    [("W3A16", 3.125), ("W4A16", 4.125), ("W8A16", 8.125), ("NVFP4", 4.5), ("NVFP4A16", 4.5),
     ("FP8_BLOCK", 8 + 32 / 16384), ("FP8_DYNAMIC", 8 + 16 / 7168)],
)  # fmt: skip
def test_scheme_bits(scheme: str, bits: float) -> None:
    packing = SCHEMES[scheme]
    values = 2048 * 7168
    assert (packing.bytes_of((2048, 7168)) - packing.constants) * 8 / values == pytest.approx(bits)


def test_scheme_table_is_the_contracts() -> None:
    contract = "W3A16 W4A16 W8A16 NVFP4 NVFP4A16 FP8_BLOCK FP8_DYNAMIC"
    assert list(SCHEMES) == contract.split()


def test_ragged_rows_round_up() -> None:
    # kv_a_proj_with_mqa: 576 rows have 5 scale rows
    assert SCHEMES["FP8_BLOCK"].bytes_of((576, 7168)) == 576 * 7168 + 5 * 56 * 4
    # dense 3 bit, K = 120: 360 bits are 12 words, 45 of 48 bytes in use
    assert SCHEMES["W3A16"].bytes_of((1, 120)) == 12 * 4 + 2 + 16
    assert not SCHEMES["W3A16"].fits((1, 120))
    assert SCHEMES["FP8_BLOCK"].fits((576, 120))


FAMILIES = (
    "deepseek_v3", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "qwen2_moe",
    "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "mixtral", "minimax_m2", "gpt_oss", "olmoe",
    "granitemoe", "ernie4_5_moe", "llama4_text", "mimo_v2_flash", "nemotron_h", "kimi_linear",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_total_is_what_transformers_counts(model_type: str) -> None:
    config = config_of(model_type)
    inventory = take(spec_of(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    floats = sum(t.numel() for t in state.values() if t.is_floating_point())
    assert inventory.total == floats


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "deepseek_v4"])
def test_keep_is_the_smaller_model(model_type: str) -> None:
    """Cutting the list of weights gives what transformers builds from the cut config."""
    inventory = take(spec_of(config_of(model_type)))
    half = inventory.keep(inventory.spec.num_experts // 2)
    assert half.spec.num_experts == inventory.spec.num_experts // 2
    assert half.total == sum(w.parameters for w in take(half.spec).main)
    assert half.routed * 2 == inventory.routed


def test_zero_computation_experts_hold_nothing() -> None:
    config = config_of("longcat_flash")
    inventory = take(spec_of(config))
    assert round(inventory.total / 1e9) == 561  # published: 560B
    router = next(w for w in inventory.keep(256).main if w.kind == "router")
    assert router.shape[0] == 256 + config["zero_expert_num"]


def test_hash_layers_keep_their_experts() -> None:
    spec = spec_of(config_of("deepseek_v4"))
    inventory = take(spec)
    half = inventory.keep(128)
    per_layer = {
        layer: sum(w.parameters for w in half.main if w.kind == "expert" and w.layer == layer)
        for layer in (spec.hash_layers[0], spec.scored_layers[0])
    }
    assert per_layer[spec.hash_layers[0]] == 2 * per_layer[spec.scored_layers[0]]


def test_mxfp4_experts_only() -> None:
    config = config_of("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    inventory = take(spec_of(config))
    # gpt-oss-120b is published with 65.2 GB (60.8 GiB)
    assert bytes_in(inventory, storage(config, config)) == pytest.approx(65.2e9, rel=0.01)


def test_fp4_experts_beside_fp8() -> None:
    """DeepSeek-V4: E2M1 experts under one E8M0 scale for 32 values, the rest in FP8 blocks."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = config_of("deepseek_v4", quantization_config=fp8, expert_dtype="fp4")
    inventory, form = take(spec_of(config)), storage(config, config)
    experts = [w for w in inventory.main if w.kind == "expert"]
    assert sum(form.bytes_of(w) for w in experts) * 8 == inventory.routed * (4 + 8 / 32)
    linear = next(w for w in inventory.main if w.kind == "linear")
    rows, columns = linear.shape
    blocks = -(-rows // 128) * -(-columns // 128)
    assert form.bytes_of(linear) == linear.count * (rows * columns + 4 * blocks)


def test_stored_in_float32() -> None:
    config = config_of("olmoe", dtype="float32")
    inventory = take(spec_of(config))
    assert bytes_in(inventory, storage(config, config)) == 4 * inventory.total


def test_mtp_outside_the_numbering_is_not_guessed() -> None:
    config = config_of("mimo_v2_flash")
    spec = spec_of(config)
    assert spec.mtp_layers == ()
    assert take(spec).mtp == 0


def test_compressed_tensors_int4_experts() -> None:
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                   "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }  # fmt: skip
    config = config_of("deepseek_v3", quantization_config=settings)
    inventory, form = take(spec_of(config)), storage(config, config)
    packed = {w.kind for w in inventory.main if form.packing_of(w)}
    assert packed == {"expert"}
    plain = sum(w.plain_bytes for w in inventory.main if w.kind != "expert")
    experts = inventory.routed * 4.5 / 8 + 16 * 3 * 256 * 58
    assert bytes_in(inventory, form) == plain + experts


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("compressed-tensors", int_scheme(4, 32, False)),
        ("gptq", int_scheme(3, 64, True)),
        ("auto-round", int_scheme(4, 32, False)),
        ("modelopt", NVFP4),
    ],
)
def test_our_own_exports(layout: Layout, scheme: Scheme, tmp_path: Path) -> None:
    """Bytes and tensors from the config are those of the files."""
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
    source = tiny_model("qwen3_moe", tmp_path / "source", dtype="bfloat16", **wide)
    out = quantized_checkpoint(source, tmp_path / "out", uniform(scheme), layout)
    config = json.loads((out / "config.json").read_text())
    inventory, form = take(spec_of(config)), storage(config, config)
    tensors = read_all(out)
    assert tensors_in(inventory, form) == len(tensors)
    assert bytes_in(inventory, form) == sum(t.numel() * t.element_size() for t in tensors.values())


CT = {"quant_method": "compressed-tensors"}
FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([1], "quantization_config is"),
        ("fp8", "quantization_config is"),
        ({**FP8, "weight_block_size": "128"}, "weight_block_size is '128'"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size is"),
        ({**FP8, "modules_to_not_convert": ["re:("]}, "no regular expression"),
        ({**FP8, "modules_to_not_convert": [1]}, "not a list of names"),
        ({**CT, "config_groups": [1]}, "config_groups"),
        ({**CT, "config_groups": "x"}, "config_groups"),
        ({**CT, "config_groups": {"g": None}}, "config_groups"),
        ({**CT, "config_groups": {"g": {"weights": {"num_bits": "4"}}}}, "num_bits is '4'"),
        ({"quant_method": "gptq", "bits": "4", "group_size": 128}, "bits, group_size"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "only NVFP4"),
        ({"quant_method": "awq"}, "quant_method 'awq' is not read"),
    ],
)
def test_wrong_settings_are_named(settings: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        storage({"quantization_config": settings}, {})


def test_mla_cache_by_hand(deepseek: Inventory) -> None:
    layers = caches(deepseek)
    # latent 512 + rope key 64 in 16 bits, indexer key 128 in FP8 with a float32 scale
    assert cache_bytes(layers, 1) == 61 * ((512 + 64) * 2 + 128 + 4)
    assert cache_bytes(layers, 4096, gpus=8) == 4096 * cache_bytes(layers, 1)  # copied, not split


def test_sliding_and_grouped_cache_by_hand() -> None:
    config = config_of("gpt_oss")
    layers = caches(take(spec_of(config)))
    token = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    full = config["layer_types"].count("full_attention")
    sliding = len(layers) - full
    assert cache_bytes(layers, 10_000) == token * (full * 10_000 + sliding * 128)
    assert cache_bytes(layers, 10_000, gpus=8) * 8 == cache_bytes(layers, 10_000)


def test_linear_layers_have_a_state_of_fixed_size() -> None:
    config = config_of("qwen3_next")
    layers = caches(take(spec_of(config)))
    linear = [layer for layer in layers if layer.state]
    assert len(linear) == config["layer_types"].count("linear_attention")
    assert linear[0].on_gpu(1, 1) == linear[0].on_gpu(100_000, 1)
    recurrent = 32 * 128 * 128 * 4  # value heads x key dim x value dim in float32
    convolution = (2 * 16 * 128 + 32 * 128) * 3 * 2
    assert linear[0].state == recurrent + convolution


def test_fitting_takes_the_smallest_number(deepseek: Inventory) -> None:
    layers = caches(deepseek)
    fits = dict(fitting(bytes_in(deepseek.keep(128), quantized("W3A16")), layers, 32_768))
    by_size = [count for count in fits.values() if count]
    assert by_size == sorted(by_size, reverse=True)
    assert fits["141 GB (H200)"] == 2
    assert fits["80 GB (A100, H100)"] == 2
    assert dict(fitting(10**13, layers, 1)) == dict.fromkeys(fits)


def test_needs_follow_the_disk_and_the_tokens(deepseek: Inventory, config: dict[str, Any]) -> None:
    form, goal = storage(config, config), quantized("W3A16")
    slow = replace(MACHINES["h200"], read_bytes=1e8)
    jobs = needs(deepseek, form, deepseek.keep(128), goal, slow)
    reading = 689_469_018_240 / 1e8  # it binds
    assert jobs["score"].seconds == pytest.approx(SNAPSHOTS * reading)
    assert jobs["score"].device > 23_042_491_392  # one layer in 16 bits
    assert jobs["score"].spill == 1360 * 2048 * 7168 * 2
    assert jobs["prune"].disk == bytes_in(deepseek.keep(128), form)
    assert jobs["quantize"].disk == bytes_in(deepseek.keep(128), goal)
    fast = replace(MACHINES["h200"], read_bytes=1e15, write_bytes=1e15)
    few, many = (needs(deepseek, form, deepseek.keep(128), goal, fast, n) for n in (1, 1_000_000))
    # 2 flops for each of the matrices' active parameters, and attention's: no rate hides them
    least = 2e6 * (deepseek.active - 2 * 129280 * 7168) / fast.forward_flops
    assert many["score"].seconds - few["score"].seconds > least


def test_needs_are_near_what_a_full_size_layer_took(config: dict[str, Any]) -> None:
    """One MoE layer, `compress --keep 128 --scheme W3A16` on an H200, source in the page cache and
    snapshots left out: 5.6 s on 131,072 tokens and 8.5 s on 393,216, 67.2 and 72.2 GB of the GPU,
    12.0 and 19.5 GB of the host (docs/speed.md)."""
    machine = replace(MACHINES["h200"], read_bytes=1e15)
    for tokens, seconds, device, host in ((131_072, 5.6, 67.2, 12.0), (393_216, 8.5, 72.2, 19.5)):
        jobs = []
        for layers in (4, 5):
            inventory = take(spec_of({**config, "num_hidden_layers": layers}))
            form = storage(inventory.spec.config, inventory.spec.text)
            cut, goal = inventory.keep(128), quantized("W3A16")
            jobs.append(needs(inventory, form, cut, goal, machine, tokens)["compress"])
        taken = (jobs[1].seconds - jobs[0].seconds) / SNAPSHOTS
        assert taken == pytest.approx(seconds, rel=0.25)
        assert jobs[1].device == pytest.approx(device * 1e9, rel=0.25)
        assert jobs[1].host == pytest.approx(host * 1e9, rel=0.25)


def test_tied_embedding_counts_once_and_is_active() -> None:
    config = config_of("ernie4_5_moe")
    assert config["tie_word_embeddings"]
    inventory = take(spec_of(config))
    assert not any(w.kind == "head" for w in inventory.main)
    free = take(spec_of({**config, "tie_word_embeddings": False}))
    table = config["vocab_size"] * config["hidden_size"]
    assert free.total - inventory.total == table
    assert free.active == inventory.active


def test_unquantized_bytes_are_two_a_parameter() -> None:
    inventory = take(spec_of(config_of("mixtral")))
    assert bytes_in(inventory, Storage("bfloat16")) == 2 * inventory.total


def test_spec_is_kept(deepseek: Inventory) -> None:
    smaller = deepseek.keep(128).spec
    assert isinstance(smaller, ModelSpec)
    assert smaller.config["quantization_config"] == deepseek.spec.config["quantization_config"]
