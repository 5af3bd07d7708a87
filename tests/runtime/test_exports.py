"""Checkpoints in the layouts of GPTQ, AutoRound and ModelOpt run packed, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import InputError
from models.opening import open_model
from quant.export import Layout
from runtime.load import load_model
from tests.runtime.oracle import decoded, decoded_model, quantized_demo, quantized_qwen
from tests.runtime.test_load import assert_same_text

CASES: list[tuple[Layout, str]] = [
    ("gptq", "W3A16"),
    ("gptq", "W4A16-symmetric-32"),
    ("gptq", "W8A16"),
    ("auto-round", "W3A16"),
    ("auto-round", "W4A16-asymmetric-64"),
    ("modelopt", "NVFP4"),
]


@pytest.mark.parametrize(("layout", "scheme"), CASES)
def test_qwen3_speaks_as_decoded(layout: Layout, scheme: str, tmp_path: Path) -> None:
    path = quantized_qwen(scheme, tmp_path, layout)
    loaded = load_model(path)
    assert not loaded.decoded
    assert_same_text(loaded, decoded_model(path, tmp_path / "decoded"))
    size = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert loaded.nbytes < 1.02 * size  # nothing grew: packed zero points are held as bytes


@pytest.mark.parametrize(("layout", "scheme"), [("gptq", "W3A16"), ("modelopt", "NVFP4")])
def test_the_demo_model_speaks_as_decoded(layout: Layout, scheme: str, tmp_path: Path) -> None:
    path = quantized_demo(scheme, tmp_path / "packed", layout)
    loaded = load_model(path)
    assert not loaded.decoded
    assert_same_text(loaded, decoded_model(path, tmp_path / "decoded"))


@pytest.mark.parametrize(("layout", "scheme"), CASES)
def test_every_weight_is_read_as_others_read_it(
    layout: Layout, scheme: str, tmp_path: Path
) -> None:
    path = quantized_qwen(scheme, tmp_path, layout)
    source = open_model(path).source
    for name, weight in decoded(path).items():
        assert torch.equal(source.read(name), weight), name


def with_settings(path: Path, **changes: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_gptqs_second_format_stores_zero_points_themselves(tmp_path: Path) -> None:
    path = quantized_qwen("W4A16", tmp_path, "gptq")
    expected = open_model(path).source.read("model.layers.2.mlp.experts.1.up_proj.weight")
    with pytest.raises(InputError, match="qzeros are not those of symmetric weights"):
        load_model(with_settings(path, checkpoint_format="gptq_v2"))
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith(".qzeros"):
            assert set(tensors[name].flatten().tolist()) == {0x77777777}
            tensors[name] = torch.full_like(tensors[name], -0x77777778)  # 8 in every nibble
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    source = open_model(path).source
    assert torch.equal(source.read("model.layers.2.mlp.experts.1.up_proj.weight"), expected)


def test_columns_out_of_order_are_decoded_on_loading(tmp_path: Path) -> None:
    """Act-order: a column's group is told by g_idx alone."""
    path = quantized_qwen("W4A16-symmetric-32", tmp_path, "gptq")
    tensors = load_file(path / "model.safetensors")
    turned = "model.layers.1.self_attn.q_proj.g_idx"
    order = tensors[turned].flip(0)
    tensors[turned] = order.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(path)
    assert loaded.decoded == (turned.replace("g_idx", "weight"),)
    held = loaded.model.model.layers[1].self_attn.q_proj.weight
    module = turned.removesuffix(".g_idx")
    scales = tensors[f"{module}.scales"].float()
    codes = decoded(path)[f"{module}.weight"].float() / scales.T.repeat_interleave(32, 1)
    expected = codes.round() * scales.T[:, order.long()]
    assert torch.equal(held, expected.to(torch.bfloat16))
    one = "model.layers.2.mlp.experts.1.up_proj.g_idx"
    tensors[one] = tensors[one].flip(0).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="reordered"):
        load_model(path)
