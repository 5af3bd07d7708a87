"""Verification: what is well passes, and each kind of damage is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cli.main import run
from models.errors import InputError, VerificationError
from models.opening import open_model
from quant.export import Layout
from quant.format import pack_bits
from quant.recipes import Recipe, Rule, uniform
from quant.schemes import SCHEMES, Scheme, int_scheme
from quant.spec_decoder import E4M3, bit_codes
from quant.verify import verify_checkpoint
from reap.plan import PrunePlan
from reap.prune import prune_checkpoint
from tests.quant.checkpoints import quantized_checkpoint
from tests.tiny import FAMILIES, tiny_model

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.2.mlp.experts.3."
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}


@given(rows=st.integers(1, 5), columns=st.integers(1, 99), bits=st.integers(2, 8))
def test_the_spec_decoder_reads_bit_by_bit(rows: int, columns: int, bits: int) -> None:
    """Against Python's big integers: a row's words joined into one number."""
    rng = np.random.default_rng(bits * 1000 + columns)
    words = -(-columns * bits // 32)
    packed = rng.integers(-(2**31), 2**31, (rows, words)).astype(np.int32)
    codes = bit_codes(packed, bits, columns)
    for row in range(rows):
        stream = int.from_bytes(packed[row].astype("<i4").tobytes(), "little")
        for k in range(columns):
            assert codes[row, k] == (stream >> (k * bits)) & ((1 << bits) - 1)


def test_e4m3_table_is_torchs() -> None:
    theirs = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, theirs, equal_nan=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("verify") / "source", **WIDE)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    schemes = {
        "int": int_scheme(3, 32, True),
        "asymmetric": int_scheme(4, 64, False),
        "nvfp4": SCHEMES["NVFP4"],
        "block": SCHEMES["FP8_BLOCK"],
        "channel": SCHEMES["FP8_DYNAMIC"],
    }
    made = {
        name: quantized_checkpoint(source, folder / name, uniform(scheme))
        for name, scheme in schemes.items()
        if name != "block"
    }
    experts = Rule(scheme=SCHEMES["W3A16"], targets=("re:.*experts.*",))
    others = Rule(scheme=SCHEMES["FP8_BLOCK"], ignore=("re:.*experts.*", "re:.*self_attn.*"))
    made["mixed"] = quantized_checkpoint(source, folder / "mixed", Recipe((experts, others)))
    return made


@pytest.mark.parametrize("name", ["int", "asymmetric", "nvfp4", "channel", "mixed"])
def test_what_is_well_passes(name: str, written: dict[str, Path], source: Path) -> None:
    report = verify_checkpoint(written[name], source)
    assert report.findings == []
    assert report.compared == len(open_model(source).source.names())
    assert len(report.worst) == 10
    assert report.worst[0][2] == max(error for _, _, error in report.worst) > 0
    assert sum(report.quantized.values()) > 0
    report.demand()


Damage = Callable[[Tensors, dict[str, Any]], None]


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = value(tensors[name])

    return damage


def edit(**changes: Any) -> Damage:
    def damage(tensors: Tensors, config: dict[str, Any]) -> None:
        config.update(changes)

    return damage


def of_quantization(key: str, value: Callable[[Any], Any]) -> Damage:
    def damage(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"][key] = value(config["quantization_config"][key])

    return damage


def of_group(**changes: Any) -> Damage:
    def damage(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"].update(changes)

    return damage


def drop(name: str) -> Damage:
    def damage(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return damage


def first_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        wide.view(-1)[0] = value
        return wide.to(tensor.dtype)

    return changed


def swap_experts(tensors: Tensors, config: dict[str, Any]) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        one, other = (f"model.layers.2.mlp.experts.{e}.up_proj.{suffix}" for e in (1, 2))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def padded_words(packed: torch.Tensor) -> torch.Tensor:
    """The width that compressed-tensors up to 0.17 gave 128 three-bit codes: 13 words."""
    return torch.nn.functional.pad(packed, (0, 1))


CASES: list[tuple[str, Damage, str]] = [
    ("int", change(EXPERT + "up_proj.weight_scale", first_is(float("nan"))), "NaN or infinite"),
    ("asymmetric", change(EXPERT + "up_proj.weight_scale", first_is(-1.0)), "not positive"),
    ("int", change(EXPERT + "up_proj.weight_scale", first_is(0.0)), "holds zeros"),
    ("int", change(EXPERT + "up_proj.weight_scale", lambda t: t * 3), "relative error"),
    ("int", change(EXPERT + "up_proj.weight_packed", lambda t: t.roll(1, 1)), "relative error"),
    ("int", change(EXPERT + "up_proj.weight_packed", padded_words), "up to 0.17: quantize again"),
    ("int", change(EXPERT + "up_proj.weight_shape", lambda t: t - 1), "needs"),
    ("int", change(EXPERT + "up_proj.weight_shape", lambda t: t * -1), "two sizes of a matrix"),
    ("int", swap_experts, "relative error"),
    ("int", drop(EXPERT + "up_proj.weight_scale"), "has no weight_scale"),
    ("int", change("model.norm.weight", first_is(float("inf"))), "NaN or infinite"),
    ("int", change("model.norm.weight", lambda t: t * 2), "is not the source's"),
    ("int", change("lm_head.weight", lambda t: t.roll(1, 0)), "is not the source's"),
    ("int", drop("lm_head.weight"), "lm_head.weight of the source is missing"),
    ("int", edit(num_experts=4), "config.json says 4"),
    ("int", edit(num_experts_per_tok=99), "99 experts a token of 12"),
    ("int", edit(num_hidden_layers=4), "layer 3 has no tensors"),
    ("int", edit(num_hidden_layers=2), "layer 2 is in the files, config.json says 2 layers"),
    ("int", edit(hidden_size=64), "model.norm.weight has shape [128], config.json says hidden"),
    ("int", edit(vocab_size=7), "embed_tokens.weight has shape [160, 128], config.json says vocab"),
    ("int", edit(vocab_size=None), "vocab_size is None"),
    ("int", edit(quantization_config=None), "stored as int_packed, which config.json's"),
    ("channel", edit(quantization_config=None), "stored as scaled, which config.json's"),
    ("nvfp4", edit(quantization_config={"quant_method": "fp8"}), "stored as nvfp4, which"),
    ("int", edit(quantization_config=[1]), "quantization_config is [1], not an object"),
    ("int", edit(quantization_config="fp8"), "quantization_config is 'fp8', not an object"),
    ("int", drop("model.layers.1.input_layernorm.weight"), "layer 1 has no input_layernorm.weight"),
    ("channel", drop("model.layers.0.self_attn.k_proj.weight_scale"),
     "k_proj.weight is F8_E4M3 without a scale"),
    ("int", drop("model.norm.weight"), "model.norm.weight is missing"),
    ("int", drop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
    ("int", of_quantization("config_groups", lambda old: [1]), "config_groups is [1]"),
    ("int", of_quantization("config_groups", lambda old: "x"), "config_groups is 'x'"),
    ("int", of_quantization("config_groups", lambda old: {"g": None}), "g is None, not a scheme"),
    ("int", of_quantization("ignore", lambda old: [1]), "ignore is [1], not a list of names"),
    ("int", of_quantization("ignore", lambda old: ["re:("]), "'re:(', no regular expression"),
    ("int", of_group(targets=["re:("]), "'re:(', no regular expression"),
    ("int", of_group(targets=[1]), "targets is [1], not a list of names"),
    ("int", of_group(format="float-quantized"), "W3A16 is pack-quantized"),
    ("int", of_quantization("ignore", lambda old: []), "is not quantized, config.json targets it"),
    ("int", of_quantization("ignore", lambda old: [*old, EXPERT + "up_proj"]), "has it ignored"),
    ("int", of_quantization("ignore", lambda old: [*old, "a.b"]), "ignores a.b, which is no"),
    ("int", of_quantization("ignore", lambda old: [*old, "re:x"]), "ignores re:x, which matches"),
    ("int", of_quantization("ignore", lambda old: [e for e in old if e != "lm_head"]),
     "lm_head is not quantized"),
    ("mixed", of_quantization("config_groups", lambda old: {"group_0": old["group_0"]}),
     "targeted by 0 groups"),
    ("int", of_quantization("config_groups", lambda old: {"a": {"weights": None}}), "no scheme"),
    ("nvfp4", change(EXPERT + "up_proj.weight_global_scale", lambda t: t * 2), "one is needed"),
    ("nvfp4", change(EXPERT + "up_proj.input_global_scale", first_is(float("inf"))),
     "not a finite positive"),
    ("nvfp4", drop(EXPERT + "up_proj.input_global_scale"), "has no input_global_scale"),
    ("nvfp4", change(EXPERT + "up_proj.weight_packed", torch.zeros_like), "is all zero"),
    ("nvfp4", change(EXPERT + "down_proj.weight_packed", lambda t: t << 4 | t >> 4),
     "relative error"),
    ("nvfp4", change(EXPERT + "down_proj.weight_scale", first_is(0.0)), "not positive"),
    ("channel", change(EXPERT + "up_proj.weight", first_is(float("nan"))), "NaN or infinite"),
    ("asymmetric", change(EXPERT + "up_proj.weight_zero_point", torch.zeros_like),
     "relative error"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "says"), CASES)
def test_damage_is_found(
    kind: str, damage: Damage, says: str, written: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    config = json.loads((written[kind] / "config.json").read_text())
    tensors = load_file(written[kind] / "model.safetensors")
    damage(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify_checkpoint(tmp_path, source)
    assert any(says in finding for finding in report.findings), report.findings
    with pytest.raises(VerificationError):
        report.demand()


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("gptq", int_scheme(3, 64, True)),
        ("auto-round", int_scheme(3, 32, True)),
        ("auto-round", int_scheme(4, 64, False)),
        ("modelopt", SCHEMES["NVFP4"]),
    ],
)
def test_exports_pass_too(layout: Layout, scheme: Scheme, source: Path, tmp_path: Path) -> None:
    out = quantized_checkpoint(source, tmp_path / "out", uniform(scheme), layout)
    report = verify_checkpoint(out, source)
    assert report.findings == []
    assert report.quantized == {scheme.name: 87}
    assert 0.05 < report.worst[0][2] < 0.3
    tensors = load_file(out / "model.safetensors")
    if layout == "modelopt":
        tensors[EXPERT + "up_proj.weight_scale_2"] *= 2
        says = "one is needed"
    else:  # the other convention: every weight one step off
        name = EXPERT + "up_proj.qzeros"
        zeros = torch.from_numpy(bit_codes(tensors[name].numpy(), scheme.bits, 128)).int() + 1
        tensors[name] = pack_bits((zeros & (2**scheme.bits - 1)).to(torch.uint8), scheme.bits)
        says = "not those of symmetric" if scheme.symmetric else "lean to one side"
    save_file(tensors, out / "model.safetensors")
    findings = verify_checkpoint(out, source).findings
    assert any(says in finding for finding in findings), findings
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    findings = verify_checkpoint(out).findings
    says = "stored as modelopt" if layout == "modelopt" else "a layout not known here"
    assert any(says in finding for finding in findings), findings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_as_it_is_published(family: str, tmp_path: Path) -> None:
    assert verify_checkpoint(tiny_model(family, tmp_path)).findings == []


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4", "qwen3_5_moe"])
def test_fp8_blocks_are_held_to_the_config(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path, fp8=True)
    assert verify_checkpoint(model).findings == []
    whole = (model / "config.json").read_text()
    for settings, says in (
        (None, "stored as fp8_block, which config.json's"),
        ({"weight_block_size": [64, 64]}, "do not fit config.json's blocks of 64x64"),
        ({"weight_block_size": "128"}, "weight_block_size is '128'"),
        ({}, "weight_block_size is None"),
    ):
        config = json.loads(whole)
        holder = config if "quantization_config" in config else config["text_config"]
        del holder["quantization_config"]
        if settings is not None:
            holder["quantization_config"] = {"quant_method": "fp8", **settings}
        (model / "config.json").write_text(json.dumps(config))
        findings = verify_checkpoint(model).findings
        assert any(says in finding for finding in findings), findings


def test_layers_that_would_be_mtp_layers(tmp_path: Path) -> None:
    """Where MTP layers continue the numbers, a layer too few makes the last one an MTP layer."""
    model = tiny_model("deepseek_v3", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (model / "config.json").write_text(json.dumps(config))
    findings = verify_checkpoint(model).findings
    assert any(f.startswith("layer 2 would be an MTP layer") for f in findings), findings
    assert any(f.startswith("layer 3 is in the files") for f in findings), findings


def test_a_difference_to_compressed_tensors_is_found(
    written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second decoder is really asked: one that is off by a scale is noticed."""
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    real = compressor.decompress.__func__

    def doubled(cls: type, state: Tensors, scheme: QuantizationScheme) -> Tensors:
        return {"weight": real(cls, state, scheme)["weight"] * 2}

    monkeypatch.setattr(compressor, "decompress", classmethod(doubled))
    report = verify_checkpoint(written["int"])
    assert "compressed-tensors decodes it to other values" in report.findings[0]


def pruned(family: str, path: Path, **choices: Any) -> tuple[Path, Path]:
    """A tiny model and half of its experts, every second one."""
    model = tiny_model(family, path / "model", dtype="bfloat16", **choices)
    opened = open_model(model)
    count = opened.spec.num_experts
    keep = tuple(range(0, count, 2))
    layers = dict.fromkeys(opened.spec.scored_layers, keep)
    plan = PrunePlan(criterion="random", num_experts=count, keep=len(keep), layers=layers)
    prune_checkpoint(opened.source, plan, path / "pruned")
    return model, path / "pruned"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe", "ernie4_5_moe",
                                    "gpt_oss", "longcat_flash", "deepseek_v4"])  # fmt: skip
def test_pruned_checkpoints(family: str, tmp_path: Path) -> None:
    model, out = pruned(family, tmp_path)
    report = verify_checkpoint(out, model)
    assert report.findings == []
    assert {error for _, _, error in report.worst} == {0.0}
    assert report.files_hashed > 1
    # the manifest's digests: one byte of the weights changed, none of the sizes
    shard = next(out.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    says = verify_checkpoint(out).findings
    assert says == [f"{shard.name} is not what was written: its sha256 differs from thresher.json"]


def test_pruned_fp8_and_int4_sources(tmp_path: Path) -> None:
    model, out = pruned("deepseek_v3", tmp_path / "fp8", fp8=True)
    assert verify_checkpoint(out, model).findings == []
    model, out = pruned("kimi_k2_thinking", tmp_path / "int4")
    report = verify_checkpoint(out, model)
    assert report.findings == []
    assert {error for _, _, error in report.worst} == {0.0}


def test_pruned_and_quantized(tmp_path: Path) -> None:
    model, out = pruned("deepseek_v3", tmp_path)
    small = quantized_checkpoint(out, tmp_path / "small", uniform(int_scheme(3, 8, True)))
    assert verify_checkpoint(small, out).findings == []
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        verify_checkpoint(small, model)
    shutil.copy(out / "plan.json", small)
    report = verify_checkpoint(small, model)
    assert report.findings == []
    assert report.worst[0][2] > 0
    plan = json.loads((small / "plan.json").read_text())
    plan["layers"]["2"] = [number + 1 for number in plan["layers"]["2"]]
    (small / "plan.json").write_text(json.dumps(plan))
    findings = verify_checkpoint(small, model).findings
    assert findings
    assert all(".layers.2.mlp" in finding for finding in findings)


def test_files_beside_the_checkpoint(written: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written["int"], copy)
    tensors = load_file(copy / "model.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors, "model.safetensors"),
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, copy / "stray.safetensors")
    found = verify_checkpoint(copy).findings
    assert any("stray.safetensors is not part" in finding for finding in found)
    assert any("total_size is 1" in finding for finding in found)
    for metadata in (None, [1]):
        odd = json.dumps({**index, "metadata": metadata})
        (copy / "model.safetensors.index.json").write_text(odd)
        found = verify_checkpoint(copy).findings
        assert any("total_size is None" in finding for finding in found)
    digest = hashlib.sha256(b"x").hexdigest()
    files = {
        "gone.json": {"sha256": digest, "bytes": 1},
        "config.json": {"sha256": digest, "bytes": 1},
    }
    (copy / "thresher.json").write_text(json.dumps({"files": files}))
    found = verify_checkpoint(copy).findings
    assert any("gone.json is missing" in finding for finding in found)
    assert any("config.json has" in finding for finding in found)
    (copy / "model.safetensors").unlink()
    assert "is missing" in verify_checkpoint(copy).findings[0]


def test_command(
    written: dict[str, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, model = str(written["nvfp4"]), str(source)
    assert run(["verify", good, "--source", model, "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert said["quantized"] == {"NVFP4": 87}
    assert run(["verify", good, "--source", model, "--quiet"]) == 0
    assert "all is well" in capsys.readouterr().out
    bad = tmp_path / "bad"
    shutil.copytree(written["nvfp4"], bad)
    config = json.loads((bad / "config.json").read_text())
    config["num_experts"] = 8
    (bad / "config.json").write_text(json.dumps(config))
    assert run(["verify", str(bad), "--quiet"]) == 3
    caught = capsys.readouterr()
    assert caught.err.startswith("error: ")
    assert "config.json says 8" in caught.out
    assert run(["verify", str(tmp_path / "none"), "--quiet"]) == 2
    assert run(["verify", good, "--source", str(tmp_path), "--quiet"]) == 2
