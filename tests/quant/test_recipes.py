"""Recipes and the quantization_config made of them, on every family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from models.checkpoint import Checkpoint
from models.errors import InputError
from models.families import spec_of
from models.inventory import take
from models.model_spec import ModelSpec
from models.sizes import bytes_in
from models.sizes import quantized as sized
from models.source_formats import Source
from quant.config import quantization_config, with_quantization
from quant.config_groups import ConfigGroups, check_format
from quant.fused import fused_sets
from quant.linears import Linear, find_linears, head_module
from quant.recipe_files import load_recipe
from quant.recipes import Recipe, Rule, schemes_of, uniform
from quant.schemes import SCHEMES, int_scheme, scheme_with
from tests.tiny import FAMILIES, tiny_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "deepseek_v32" / "config.json"
STACKED_ONLY = {"gpt_oss", "gpt_oss_mxfp4", "granitemoe", "granitemoeshared", "granitemoehybrid"}
SMALL = int_scheme(3, 8, True)


def tiny(family: str, path: Path) -> tuple[ModelSpec, tuple[Linear, ...]]:
    checkpoint = Checkpoint.open(tiny_model(family, path / family))
    spec = spec_of(checkpoint.config)
    source = Source(checkpoint, spec)
    return spec, find_linears(spec, {name: source.shape(name) for name in source.names()})


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, tuple[Linear, ...]]:
    return tiny("deepseek_v32", tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_default_recipe_is_what_inspect_counts(family: str, tmp_path: Path) -> None:
    """The matrices found from files are transformers' nn.Linears and experts, MTP aside."""
    spec, linears = tiny(family, tmp_path)
    if family in STACKED_ONLY:
        with pytest.raises(InputError, match="cannot be written as W3A16"):
            uniform(SMALL).assign(linears)
        return
    assigned = uniform(SMALL).assign(linears)
    mine = sum(
        linear.shape[0] * linear.shape[1]
        for linear in linears
        if assigned[linear.module] and (linear.layer or 0) < spec.num_layers
    )
    theirs = [w for w in take(spec).main if w.kind in ("expert", "linear") and len(w.shape) == 2]
    assert mine == sum(weight.parameters for weight in theirs)
    assert len({linear.module for linear in linears}) == len(linears)


def matched(config: dict[str, Any], module: str) -> list[str]:
    """Groups that compressed-tensors' own matching gives a Linear of this path."""
    if any(match_name(module, entry) for entry in config["ignore"]):
        return []
    return [
        name
        for name, group in config["config_groups"].items()
        if any(target == "Linear" or match_name(module, target) for target in group["targets"])
    ]


def check_exact(config: dict[str, Any], linears: Sequence[Linear], schemes: dict) -> None:
    QuantizationConfig.model_validate({k: v for k, v in config.items() if k[:4] != "vers"})
    assert list(check_format(config, ConfigGroups(config), ours=True)) == []
    for linear in linears:
        groups = matched(config, linear.module)
        scheme = schemes[linear.module]
        if scheme is None:
            assert groups == [], linear.module
        else:
            assert len(groups) == 1, (linear.module, groups)
            group = config["config_groups"][groups[0]]
            assert group["format"] == scheme.format
            assert group["weights"]["num_bits"] == scheme.bits


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STACKED_ONLY])
def test_config_matches_exactly_what_is_quantized(family: str, tmp_path: Path) -> None:
    spec, linears = tiny(family, tmp_path)
    head = head_module(spec, {linear.logical: 0 for linear in linears})
    schemes = schemes_of(uniform(SMALL).assign(linears))
    config = quantization_config(linears, schemes, head)
    check_exact(config, linears, schemes)
    assert head in config["ignore"]
    assert set(config["ignore"]) <= {linear.module for linear in linears} | {head}
    # experts of the last MoE layer in 4 bits, others in 3; attention in FP8, shared as it is
    last = spec.moe_layers[-1]
    mixed: dict[str, Any] = {}
    for linear in linears:
        mixed[linear.module] = None
        if linear.is_expert:
            mixed[linear.module] = int_scheme(4 if linear.layer == last else 3, 8, True)
        elif linear.place.kind == "attention" and linear.use == "default":
            mixed[linear.module] = SCHEMES["FP8_DYNAMIC"]
    config = quantization_config(linears, mixed, head)
    check_exact(config, linears, mixed)
    assert config["format"] == "mixed-precision"
    assert "experts" in config["config_groups"]["group_0"]["targets"][0]


def test_unquantized_experts_are_ignored(deepseek: tuple[ModelSpec, tuple[Linear, ...]]) -> None:
    _, linears = deepseek
    recipe = Recipe((Rule(scheme=SMALL, ignore=("re:.*mlp.experts.*",)),))
    schemes = schemes_of(recipe.assign(linears))
    config = quantization_config(linears, schemes, "lm_head")
    check_exact(config, linears, schemes)
    assert len([entry for entry in config["ignore"] if "experts" in entry]) == 3


def test_deepseek_v32_at_128_experts_has_138_gb() -> None:
    spec = spec_of(json.loads(FIXTURE.read_text()))
    kept = take(spec).keep(128)
    shapes: dict[str, tuple[int, ...]] = {}
    plain = 0
    for weight in kept.main:
        plain += weight.plain_bytes
        prefix = "" if weight.layer is None else spec.layer_prefix(weight.layer)
        if weight.kind != "expert":
            shapes[prefix + weight.path] = weight.shape
            continue
        roles = ("down",) if "down" in weight.path else ("gate", "up")
        for expert in range(weight.count // len(roles)):
            for role in roles:
                name = f"{prefix}mlp.experts.{expert}.{role}_proj.weight"
                shapes[name] = weight.shape
    linears = find_linears(kept.spec, shapes)
    scheme = SCHEMES["W3A16"]
    assigned = uniform(scheme).assign(linears)
    total = plain
    for linear in linears:
        if assigned[linear.module]:
            rows, columns = linear.shape
            stored = scheme.packed(linear.shape, torch.bfloat16).values()
            total += sum(torch.empty(own, dtype=t, device="meta").nbytes for t, own in stored)
            total -= rows * columns * 2
    assert total == bytes_in(kept, sized("W3A16"))
    assert total == pytest.approx(138e9, rel=0.01)  # as published; here the indexer has 16 bits


def write(path: Path, text: str) -> Recipe:
    (path / "recipe.yaml").write_text(text)
    return load_recipe(path / "recipe.yaml")


MIXED = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      dampening_frac: 0.05
      actorder: static
      config_groups:
        group_0:
          targets: ["re:.*mlp.experts.*"]
          weights: {num_bits: 3, type: int, strategy: group, group_size: 16, symmetric: true}
    QuantizationModifier:
      targets: [Linear]
      ignore: ["re:.*mlp.experts.*", lm_head]
      scheme: FP8_DYNAMIC
"""


def test_recipe_file(tmp_path: Path, deepseek: tuple[ModelSpec, tuple[Linear, ...]]) -> None:
    _, linears = deepseek
    recipe = write(tmp_path, MIXED)
    assert [rule.method for rule in recipe.rules] == ["gptq", "rtn"]
    assert recipe.rules[0].options == {"actorder": "static", "dampening_frac": 0.05}
    assigned = recipe.assign(linears)
    for linear in linears:
        rule = assigned[linear.module]
        if linear.is_expert:
            assert rule is not None
            assert rule.scheme == int_scheme(3, 16, True)
        elif linear.use == "default":
            assert rule is not None
            assert rule.scheme == SCHEMES["FP8_DYNAMIC"]
        else:
            assert rule is None, linear.module
    assert json.dumps(recipe.to_json())


def test_llmcompressor_reads_the_same_file(tmp_path: Path) -> None:
    from llmcompressor.recipe import Recipe as Theirs

    mine = write(tmp_path, MIXED)
    theirs = Theirs.create_instance(str(tmp_path / "recipe.yaml"))
    for rule, modifier in zip(mine.rules, theirs.modifiers, strict=True):
        group = next(iter(modifier.resolved_config.config_groups.values()))
        assert tuple(group.targets) == rule.targets
        assert tuple(modifier.ignore) == rule.ignore
        assert group.weights.num_bits == rule.scheme.bits
        assert group.weights.group_size == rule.scheme.group_size


def test_presets_by_name(tmp_path: Path) -> None:
    recipe = write(tmp_path, "QuantizationModifier: {scheme: {W4A16_ASYM: [Linear]}}")
    assert recipe.rules[0].scheme == scheme_with("W4A16", symmetric=False)
    recipe = write(tmp_path, "GPTQModifier: {config_groups: {NVFP4: ['re:.*experts.*']}}")
    assert recipe.rules[0].scheme is SCHEMES["NVFP4"]
    head = write(tmp_path, "QuantizationModifier: {scheme: fp8_block, targets: lm_head}")
    assert head.rules[0].targets == ("lm_head",)


def test_head_and_indexer_when_asked(deepseek: tuple[ModelSpec, tuple[Linear, ...]]) -> None:
    spec, linears = deepseek
    named = Recipe((Rule(scheme=SMALL, targets=("lm_head", "re:.*indexer.wk$")),))
    taken = {m for m, rule in named.assign(linears).items() if rule}
    assert taken == {"lm_head"} | {
        f"model.layers.{layer}.self_attn.indexer.wk"
        for layer in (*range(spec.num_layers), *spec.mtp_layers)
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "holds no modifiers"),
        ("a: : b", "is no YAML"),
        ("AWQModifier: {scheme: W4A16}", "'AWQModifier' is not known"),
        ("GPTQModifier: {}", "either scheme or config_groups"),
        ("GPTQModifier: {scheme: W9A16}", "'W9A16' is not known"),
        ("GPTQModifier: {scheme: MXFP4}", "no scheme that is written"),
        ("GPTQModifier: {scheme: W4A16, targets: []}", "W4A16 has no targets"),
        ("GPTQModifier: {config_groups: {W4A16: []}}", "W4A16 has no targets"),
        ("GPTQModifier: {scheme: W8A8}", "no scheme that is written"),
        ("GPTQModifier: {scheme: W4A16, kv_cache_scheme: {num_bits: 8}}", "kv_cache_scheme is not"),
        ("GPTQModifier: {scheme: W4A16, actorder: group}", "actorder 'group'"),
        ("GPTQModifier: {scheme: W4A16, dampening_frac: -1}", "dampening_frac is -1"),
        ("GPTQModifier: {scheme: W4A16, ignore: {a: b}}", "give a list of module names"),
        ("QuantizationModifier: {scheme: W4A16, block_size: 64}", "block_size is not carried out"),
        (
            "GPTQModifier: {scheme: W4A16}\nGPTQModifier: {scheme: W3A16}",
            "the key GPTQModifier is given twice",
        ),
        (
            "GPTQModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: 4, "
            "strategy: block}}}}",
            "is no scheme",
        ),
    ],
)
def test_recipe_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        write(tmp_path, text)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ((Rule(scheme=SMALL), Rule(scheme=SCHEMES["FP8_DYNAMIC"])), "to be both W3A16 and FP8_D"),
        ((Rule(scheme=SMALL, targets=("re:.*experts.1.*",)),), "experts of layer 1 differ"),
        ((Rule(scheme=SMALL, targets=("re:.*shared_experts.gate.*",)),), "run them as one matrix"),
        ((Rule(scheme=SMALL, ignore=("re:.*q_a_proj",)),), "kv_a_proj_with_mqa W3A16"),
        (
            (Rule(scheme=SMALL), Rule(scheme=int_scheme(3, 32, True))),
            "both W3A16 in groups of 8 and W3A16 in groups of 32; name it",
        ),
        (
            (
                Rule(scheme=SMALL, method="gptq", options={"dampening_frac": 0.1}),
                Rule(scheme=SMALL, method="rtn"),
            ),
            "both W3A16 in groups of 8 by gptq, dampening_frac 0.1 and W3A16 in groups of 8 by rtn",
        ),
        ((Rule(scheme=SMALL, targets=("model.layers.1.mlp.gate",)),), "only what is never quant"),
        (
            (Rule(scheme=SMALL, targets=("re:.*mlp.gate$", "re:.*experts.*")),),
            r"'re:.*mlp.gate\$' matches only .*\(model.layers.1.mlp.gate: router\); remove it",
        ),
        (
            (Rule(scheme=SMALL, targets=("re:.*experts.*",), ignore=("re:.*mlp.*",)),),
            "ignore leaves nothing of the targets",
        ),
        ((Rule(scheme=SMALL, targets=("re:.*nothing",)),), "matches no matrix"),
        ((Rule(scheme=SMALL, targets=("model.layers.9.x",)),), "matches no matrix"),
        ((Rule(scheme=SMALL, targets=("re:(",)),), "no regular expression"),
        ((Rule(scheme=SCHEMES["FP8_BLOCK"]),), "use FP8_DYNAMIC"),
    ],
)
def test_recipes_that_do_not_fit(
    deepseek: tuple[ModelSpec, tuple[Linear, ...]], rules: tuple[Rule, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Recipe(rules).assign(deepseek[1])


def test_rules_that_say_the_same_may_overlap(
    deepseek: tuple[ModelSpec, tuple[Linear, ...]],
) -> None:
    rule = Rule(scheme=SMALL, method="gptq", options={"dampening_frac": 0.1})
    narrow = replace(rule, targets=("re:.*experts.*",))
    assert Recipe((rule, narrow)).assign(deepseek[1]) == Recipe((rule,)).assign(deepseek[1])


def test_fused_sets() -> None:
    modules = [
        "a.self_attn.q_proj", "a.self_attn.k_proj", "a.self_attn.v_proj", "a.self_attn.o_proj",
        "a.mlp.experts.0.gate_proj", "a.mlp.experts.0.up_proj", "a.mlp.experts.0.down_proj",
        "a.mlp.experts.1.w1", "a.mlp.experts.1.w2", "a.mlp.experts.1.w3",
        "b.q_a_proj", "b.kv_a_proj_with_mqa", "b.kv_b_proj", "c.up_proj",
    ]  # fmt: skip
    assert set(fused_sets(modules)) == {
        ("a.self_attn.q_proj", "a.self_attn.k_proj", "a.self_attn.v_proj"),
        ("a.mlp.experts.0.gate_proj", "a.mlp.experts.0.up_proj"),
        ("a.mlp.experts.1.w1", "a.mlp.experts.1.w3"),
        ("b.q_a_proj", "b.kv_a_proj_with_mqa"),
    }


def test_tied_head_is_named_all_the_same(tmp_path: Path) -> None:
    spec, linears = tiny("llama4", tmp_path)
    names = {linear.logical: 0 for linear in linears if linear.place.kind != "head"}
    assert head_module(spec, names) == "lm_head"  # no embedding seen: the family's own name
    names["language_model.model.embed_tokens.weight"] = 0
    assert head_module(spec, names) == "language_model.lm_head"


def test_config_keeps_what_engines_read() -> None:
    config = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "expert_dtype": "fp4",
        "text_config": {"quantization_config": {"quant_method": "fp8"}, "n_group": 8},
    }
    edited = with_quantization(config, {"quant_method": "x"}, "text_config")
    assert edited == {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "text_config": {"n_group": 8},
        "quantization_config": {"quant_method": "x"},
    }
    assert "quantization_config" in config["text_config"]  # a copy was edited
