"""The quantizing job: what it writes is read by others, resumes, and never loses an expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings, evaluate
from models.errors import InputError
from models.journal import Journal
from models.opening import open_model
from models.skeleton import Skeleton
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import Recipe, Rule, uniform
from quant.schemes import SCHEMES, Scheme, int_scheme, scheme_with
from quant.verify import verify_checkpoint
from tests.kills import assert_same_after_kills
from tests.models.test_skeleton import walk
from tests.tiny import read_all, tiny_model
from tests.token_sets import random_token_set

ROOT = Path(__file__).parents[2]


def scheme_of(name: str) -> Scheme:
    return scheme_with(name, group_size=8) if name.startswith("W") else SCHEMES[name]


def run(model: Path, out: Path, name: str, method: str, **settings: Any) -> dict[str, Any]:
    opened = open_model(model)
    tokens = random_token_set(opened.spec.text["vocab_size"], (60,) * 8, (0, 1) * 4)
    return quantize(
        opened,
        uniform(scheme_of(name)),
        out,
        QuantizeSettings(method=method, **settings),
        tokens=tokens,
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["W4A16", "W3A16", "FP8_DYNAMIC"])
def test_transformers_reads_the_same_model(name: str, method: str, tmp_path: Path) -> None:
    """transformers' own loading of compressed-tensors gives our decoder's logits."""
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    run(model, tmp_path / "out", name, method)
    assert_transformers_agrees(tmp_path / "out", name)


@pytest.mark.parametrize("name", ["W4A16", "W3A16", "FP8_DYNAMIC"])
def test_transformers_reads_the_demo_model(name: str, tmp_path: Path) -> None:
    """DeepSeek-V3.2's form: FP8 blocks in, MTP layer carried along."""
    opened = open_model(ROOT / "demo" / "model")
    scheme = SCHEMES[name]
    quantize(opened, uniform(scheme), tmp_path / "out", QuantizeSettings(method="rtn"))
    assert_transformers_agrees(tmp_path / "out", name)


@pytest.mark.parametrize("name", ["NVFP4A16", "FP8_BLOCK", "asymmetric"])
def test_what_transformers_does_not_read(name: str, tmp_path: Path) -> None:
    """README's table of compatibility says so; when this fails, the table is to be mended."""
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 256)
    path = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16", head_dim=32, **sizes)
    scheme = SCHEMES["W4A16"] if name == "asymmetric" else SCHEMES[name]
    if name == "asymmetric":
        scheme = scheme_with("W4A16", group_size=32, symmetric=False)
    quantize(open_model(path), uniform(scheme), tmp_path / "out", QuantizeSettings(method="rtn"))
    assert verify_checkpoint(tmp_path / "out", path).ok
    if name == "NVFP4A16":  # huggingface/transformers #48371: no exception, other weights
        with pytest.raises(AssertionError):
            assert_transformers_agrees(tmp_path / "out", name)
    else:
        with pytest.raises(RuntimeError, match="automatic conversion"):
            assert_transformers_agrees(tmp_path / "out", name)


def assert_transformers_agrees(folder: Path, name: str) -> None:
    """Logits of transformers' own loading against our decoder's in the same layers."""
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    opened = open_model(folder)
    ours = Skeleton(opened.source, dtype=torch.bfloat16, attention="eager")
    ids = torch.randint(0, opened.spec.text["vocab_size"], (2, 20))
    with torch.inference_mode():
        expected = theirs(input_ids=ids, use_cache=False).logits.float()
    got = walk(ours, ids, None).float()
    # FP8 activations are rounded by transformers and not by our decoder
    worst = 0.02 if name != "FP8_DYNAMIC" else 0.2
    assert (got - expected).norm() / expected.norm() < worst


@pytest.mark.parametrize("name", ["W3A16", "NVFP4", "FP8_DYNAMIC"])
@pytest.mark.parametrize("family", ["deepseek_v32", "qwen3_moe", "llama4"])
def test_verified_and_close(family: str, name: str, tmp_path: Path) -> None:
    overrides = {"hidden_size": 64, "kv_lora_rank": 32} if family == "deepseek_v32" else {}
    model = tiny_model(family, tmp_path / "model", dtype="bfloat16", **overrides)
    if name == "NVFP4" and family == "deepseek_v32":  # has matrices not divisible into 16s
        with pytest.raises(InputError, match="K = "):
            run(model, tmp_path / "out", name, "gptq")
        return
    manifest = run(model, tmp_path / "out", name, "gptq")
    report = verify_checkpoint(tmp_path / "out", model)
    assert report.ok, report.findings
    assert manifest["total_size"] < sum(t.nbytes for t in tensors_of(model).values())
    tokens = random_token_set(open_model(model).spec.text["vocab_size"])
    result = evaluate(tmp_path / "out", tokens, EvalSettings(), reference=model)
    assert result["kl"] < 0.6


def test_gptq_beats_rounding_to_nearest(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    tokens = random_token_set(open_model(model).spec.text["vocab_size"], seed=5)
    kl = {}
    for method in ("rtn", "gptq"):
        run(model, tmp_path / method, "W3A16", method)
        kl[method] = evaluate(tmp_path / method, tokens, EvalSettings(), reference=model)["kl"]
    assert kl["gptq"] < 0.9 * kl["rtn"]


def test_experts_that_saw_no_token_keep_their_weights(tmp_path: Path) -> None:
    """One token repeated reaches top_k experts of a layer; the others must not become zeros."""
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    opened = open_model(model)
    tokens = random_token_set(opened.spec.text["vocab_size"], (20,), (0,))
    tokens.input_ids.fill_(7)
    quantize(
        opened, uniform(scheme_of("W4A16")), tmp_path / "out", QuantizeSettings(), tokens=tokens
    )
    facts = json.loads((tmp_path / "out" / "thresher.json").read_text())["rounding"]
    assert sum(unit["without_tokens"] for unit in facts.values()) > 0
    written, source = open_model(tmp_path / "out").source, opened.source
    for name in source.names():
        if ".experts." in name:
            true, got = source.read(name, torch.float32), written.read(name, torch.float32)
            assert (got - true).norm() / true.norm() < 0.35, name


def test_fp8_blocks_are_copied(tmp_path: Path) -> None:
    model = tiny_model(
        "qwen3_moe", tmp_path / "model", dtype="bfloat16", fp8=True, hidden_size=128,
        moe_intermediate_size=128, intermediate_size=128, head_dim=32,
    )  # fmt: skip
    run(model, tmp_path / "out", "FP8_BLOCK", "rtn")
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    copied = [name for name in before if name.endswith("weight_scale_inv")]
    assert copied
    for name in copied:
        base = name.removesuffix("_scale_inv")
        assert torch.equal(before[base].view(torch.uint8), after[base].view(torch.uint8))
        assert torch.equal(before[name], after[base + "_scale"])
    written, source = open_model(tmp_path / "out").source, open_model(model).source
    for name in source.names():  # single blocks, whose scale is one number, among them
        if source.format(name) == "fp8_block":
            assert torch.equal(written.read(name), source.read(name)), name


def test_tokens_only_where_needed(tmp_path: Path) -> None:
    opened = open_model(tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16"))
    settings = QuantizeSettings(method="rtn")
    quantize(opened, uniform(SCHEMES["NVFP4A16"]), tmp_path / "a16", settings)
    with pytest.raises(InputError, match="--mix or --tokens"):
        quantize(opened, uniform(SCHEMES["NVFP4"]), tmp_path / "nvfp4", settings)
    with pytest.raises(InputError, match="--mix or --tokens"):
        quantize(opened, uniform(scheme_of("W3A16")), tmp_path / "gptq", QuantizeSettings())
    assert not (tmp_path / "gptq").exists()


def quantizing(out: Path, model: str, tokens_file: str) -> None:
    quantize(
        open_model(model),
        uniform(scheme_of("W3A16")),
        out,
        QuantizeSettings(memory=30_000),
        tokens=TokenSet.load(tokens_file),
    )


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16", num_hidden_layers=6)
    vocabulary = open_model(model).spec.text["vocab_size"]
    random_token_set(vocabulary, (60,) * 8, (0, 1) * 4).save(tmp_path / "tokens.safetensors")
    found = assert_same_after_kills(
        quantizing, tmp_path / "runs", model, tmp_path / "tokens.safetensors"
    )
    assert any(name.endswith(".safetensors") for name in found)


# sides that NVFP4 cuts into its groups
WIDE = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_with_other_scales_keep_their_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(
        "qwen3_moe", tmp_path / "model", dtype="bfloat16", fp8=True, hidden_size=128, shards=1,
        moe_intermediate_size=128, intermediate_size=128, head_dim=32,
    )  # fmt: skip
    tensors = tensors_of(model)
    for name in tensors:
        if name.endswith("weight_scale_inv"):
            tensors[name] = tensors[name].log2().ceil().exp2().to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run(model, tmp_path / "out", "FP8_BLOCK", "rtn")
    written, source = open_model(tmp_path / "out").source, open_model(model).source
    blocks = [name for name in source.names() if source.format(name) == "fp8_block"]
    assert blocks
    for name in blocks:
        wanted = source.read(name, torch.float32)
        assert torch.equal(written.read(name, torch.float32), wanted), name
    assert verify_checkpoint(tmp_path / "out", model).ok


class Killed(Exception):
    """A job that ends in the middle."""


def stopped_after(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job from now on ends once `unit` is recorded."""
    record = Journal.record

    def recording(self: Journal, name: str, **facts: Any) -> None:
        record(self, name, **facts)
        if name == unit:
            raise Killed(unit)

    monkeypatch.setattr(Journal, "record", recording)


def test_an_mtp_layer_has_the_last_layer_s_input_ranges_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32)
    model = tiny_model("deepseek_v3", tmp_path / "model", dtype="bfloat16", **WIDE, **sizes)
    layers = open_model(model).spec.num_layers
    run(model, tmp_path / "whole", "NVFP4", "rtn")
    with monkeypatch.context() as patch:
        stopped_after(f"hidden {layers - 1}", patch)
        with pytest.raises(Killed):
            run(model, tmp_path / "killed", "NVFP4", "rtn")
    run(model, tmp_path / "killed", "NVFP4", "rtn")
    whole, killed = (read_all(tmp_path / name) for name in ("whole", "killed"))
    ranges = [n for n in whole if f"layers.{layers}." in n and n.endswith("input_global_scale")]
    assert ranges
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_shard_cut_short_after_a_kill_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    whole = run(model, tmp_path / "whole", "W4A16", "rtn")
    with monkeypatch.context() as patch:
        stopped_after("rounded layer 1", patch)
        with pytest.raises(Killed):
            run(model, tmp_path / "killed", "W4A16", "rtn")
    shard = next(iter(sorted((tmp_path / "killed").glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-100])
    found = run(model, tmp_path / "killed", "W4A16", "rtn")
    assert {n: f["sha256"] for n, f in found["files"].items()} == {
        n: f["sha256"] for n, f in whole["files"].items()
    }
    assert found["rounding"] == whole["rounding"]


def test_an_output_in_the_model_s_own_folder_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    run(model, tmp_path / "once", "W8A16", "rtn")
    before = sorted(path.name for path in (tmp_path / "once").iterdir())
    for out in (tmp_path / "once", tmp_path / "once" / "again"):
        with pytest.raises(InputError, match="overlaps with the source"):
            quantize(
                open_model(tmp_path / "once"),
                uniform(SCHEMES["FP8_DYNAMIC"]),
                out,
                QuantizeSettings(method="rtn"),
                force=True,
            )
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == before


def test_seven_and_eight_bits_are_told_apart(tmp_path: Path) -> None:
    """7 bits of compressed-tensors up to 0.17 are as wide as 8 bits of today's."""
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    rules = (
        Rule(scheme=int_scheme(7, 8, True), targets=("re:.*experts.*",)),
        Rule(scheme=int_scheme(8, 8, True), targets=("re:.*self_attn.*",)),
    )
    how = QuantizeSettings(method="rtn")
    quantize(open_model(model), Recipe(rules), tmp_path / "mixed", how)
    source = open_model(tmp_path / "mixed").source
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.integer_layout(name)[0] == 8
    assert torch.isfinite(source.read(name, torch.float32)).all()


def test_transformers_gives_all_experts_one_scheme(tmp_path: Path) -> None:
    """README says so of experts that differ by layer; when this fails, it is to be mended."""
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16")
    rules = tuple(
        Rule(scheme=scheme_of(name), targets=(rf"re:.*layers[.]{layers}[.]",))
        for name, layers in (("W4A16", "[01]"), ("W8A16", "2"))
    )
    settings = QuantizeSettings(method="rtn")
    quantize(open_model(model), Recipe(rules), tmp_path / "out", settings)
    assert verify_checkpoint(tmp_path / "out", model).ok
    with pytest.raises((AssertionError, RuntimeError)):
        assert_transformers_agrees(tmp_path / "out", "W4A16")
