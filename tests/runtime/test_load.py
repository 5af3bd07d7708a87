"""Packed models say what the same models say decoded by others, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import InputError
from runtime.experts import PackedExperts
from runtime.linear import PackedLinear
from runtime.load import Loaded, LoadSettings, load_model
from tests.runtime.oracle import DEMO, decoded_model, quantized_demo, quantized_qwen
from tests.tiny import FAMILIES, reference_model, tiny_model

SCHEMES = ("W3A16", "W4A16", "W8A16", "NVFP4", "NVFP4A16", "FP8_BLOCK", "FP8_DYNAMIC")
FEW_WEIGHTS = {"hidden_size": 160, "moe_intermediate_size": 96, "intermediate_size": 160}


def greedy(model: Any, ids: torch.Tensor, count: int = 64) -> list[int]:
    """New tokens by transformers' own generate."""
    with torch.inference_mode():
        out = model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=2
        )
    return out[0, ids.shape[1] :].tolist()


def prompt(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, vocabulary, (1, 24), generator=generator)


def assert_same_text(loaded: Loaded, reference: Any) -> None:
    ids = prompt(loaded.spec.text["vocab_size"])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, reference(ids).logits)
    assert greedy(loaded.model, ids) == greedy(reference, ids)


@pytest.mark.parametrize("scheme", ["native", "W3A16", "W4A16", "NVFP4"])
def test_the_demo_model_speaks_as_decoded(scheme: str, tmp_path: Path) -> None:
    path = DEMO if scheme == "native" else quantized_demo(scheme, tmp_path / "packed")
    loaded = load_model(path)
    assert not loaded.decoded
    assert {kernel.split(",")[0] for _, kernel in loaded.choice.used} == {"torch"}
    assert_same_text(loaded, decoded_model(path, tmp_path / "decoded"))


@pytest.mark.parametrize("scheme", [*SCHEMES, "W2A16-symmetric-32", "W5A16-asymmetric-32"])
def test_qwen3_speaks_as_decoded(scheme: str, tmp_path: Path) -> None:
    path = quantized_qwen(scheme, tmp_path)
    assert_same_text(load_model(path), decoded_model(path, tmp_path / "decoded"))


@pytest.mark.parametrize("scheme", ["W4A16-symmetric-32", "NVFP4A16", "FP8_DYNAMIC"])
def test_odd_sizes(scheme: str, tmp_path: Path) -> None:
    """Widths that no tile, word or block divides."""
    path = quantized_qwen(scheme, tmp_path, **FEW_WEIGHTS)
    assert_same_text(load_model(path), decoded_model(path, tmp_path / "decoded"))


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4", "qwen3_5_moe", "kimi_k25"])
@pytest.mark.parametrize("fp8", [False, True])
def test_families_as_released(family: str, fp8: bool, tmp_path: Path) -> None:
    """Ragged FP8 blocks, INT4 experts, stacked experts, hash layers, nested configs."""
    if fp8 and family == "kimi_k25":
        pytest.skip("released in INT4 only")
    path = tiny_model(family, tmp_path / "model", fp8=fp8)
    loaded = load_model(path, LoadSettings(dtype="float32", attention="eager"))
    ids = prompt(60)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, reference_model(path)(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    """Identity experts, biases, shared experts, several routers: nothing quantized."""
    path = tiny_model(family, tmp_path / "model")
    loaded = load_model(path, LoadSettings(dtype="float32", attention="eager"))
    ids = prompt(60)
    with torch.inference_mode():
        found, wanted = (model(ids).logits for model in (loaded.model, reference_model(path)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_held_is_what_was_stored(tmp_path: Path) -> None:
    path = quantized_qwen("W3A16", tmp_path)
    loaded = load_model(path)
    stored = load_file(path / "model.safetensors")
    layer = loaded.model.model.layers[2]
    assert isinstance(layer.self_attn.q_proj, PackedLinear)
    assert isinstance(layer.mlp.experts, PackedExperts)
    name = "model.layers.2.self_attn.q_proj.weight_packed"
    assert torch.equal(layer.self_attn.q_proj.packed.codes[0], stored[name])
    codes = layer.mlp.experts.up.codes
    for expert in range(codes.shape[0]):
        base = f"model.layers.2.mlp.experts.{expert}."
        both = [stored[f"{base}{part}_proj.weight_packed"] for part in ("gate", "up")]
        assert torch.equal(codes[expert], torch.cat(both))
    shapes = sum(t.nbytes for n, t in stored.items() if n.endswith("weight_shape"))
    assert loaded.nbytes - sum(t.nbytes for t in stored.values()) + shapes < 1024  # rotary tables


def test_placement_over_devices_is_accelerates(tmp_path: Path) -> None:
    """All of it on one device of a map gives the same words; what does not fit is refused."""
    path = quantized_qwen("W4A16", tmp_path)
    spread = load_model(path, LoadSettings(memory={"cpu": 1 << 30}))
    ids = prompt(60)
    assert set(spread.placement.values()) == {"cpu"}
    assert greedy(spread.model, ids, 8) == greedy(load_model(path).model, ids, 8)
    with pytest.raises(InputError, match="larger than the memory"):
        load_model(path, LoadSettings(memory={"cpu": 100_000}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LoadSettings(backend="triton"), "--backend triton"),
        (LoadSettings(backend="humming"), "--backend humming"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(settings: LoadSettings, words: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    with pytest.raises(InputError, match=words):
        load_model(DEMO, settings)


def damaged(path: Path, name: str, change: Any) -> Path:
    """The checkpoint with one tensor changed."""
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_damage_is_named(tmp_path: Path) -> None:
    module = "model.layers.2.mlp.experts.3.up_proj"
    path = quantized_qwen("W4A16", tmp_path / "scale")
    name = f"{module}.weight_scale"
    with pytest.raises(InputError, match=name):
        load_model(damaged(path, name, lambda scale: scale * torch.nan))
    path = quantized_qwen("FP8_DYNAMIC", tmp_path / "code")
    nan = torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=module):
        load_model(damaged(path, f"{module}.weight", lambda w: nan.expand(w.shape).contiguous()))
    path = quantized_qwen("W4A16", tmp_path / "missing")
    tensors = load_file(path / "model.safetensors")
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{module}.{suffix}"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{module}.weight is missing"):
        load_model(path)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    path = quantized_qwen("W4A16", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["num_attention_heads"] *= 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="do not belong together"):
        load_model(path)
