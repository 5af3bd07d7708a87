"""Weights that are read to be rounded: NaN and infinity are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import InputError
from models.opening import open_model
from quant.layer_weights import LayerWeights
from quant.linears import find_linears
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import SCHEMES
from tests.tiny import tiny_model


def broken(path: Path, family: str, name: str, value: float) -> Path:
    """A tiny model with one value of one tensor replaced."""
    tiny_model(family, path, dtype="bfloat16", shards=1)
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[-7] = value
    save_file(tensors, path / "model.safetensors")
    return path


CASES = [
    ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", float("nan")),
    ("qwen3_moe", "model.layers.2.self_attn.k_proj.weight", float("inf")),
    ("qwen3_5_moe_text", "model.layers.1.mlp.experts.down_proj", float("-inf")),
]


@pytest.mark.parametrize(("family", "name", "value"), CASES)
def test_what_is_not_finite_is_refused(
    family: str, name: str, value: float, tmp_path: Path
) -> None:
    opened = open_model(broken(tmp_path / "model", family, name, value))
    settings = QuantizeSettings(method="rtn", device="cpu")
    with pytest.raises(InputError, match=rf"{name} .* holds NaN or infinite values"):
        quantize(opened, uniform(SCHEMES["FP8_DYNAMIC"]), tmp_path / "out", settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_a_gpu_asks_behind_the_last_matrix(tmp_path: Path) -> None:
    family, name, value = CASES[0]
    opened = open_model(broken(tmp_path / "model", family, name, value))
    shapes = {one: opened.source.shape(one) for one in opened.source.names()}
    linears = [one for one in find_linears(opened.spec, shapes) if one.is_expert]
    reader = LayerWeights(opened.source, torch.device("cuda"))
    with pytest.raises(InputError, match=rf"{name} .* holds NaN or infinite values"):
        list(reader.read(linears))
