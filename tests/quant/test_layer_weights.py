"""Weights that are read to be rounded: NaN and infinity are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import InputError
from models.opening import OpenModel, open_model
from quant.layer import LayerRounder
from quant.layer_rounding import LayerRounding
from quant.layer_weights import LayerWeights
from quant.linears import Linear, find_linears
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


def linears_of(opened: OpenModel) -> tuple[Linear, ...]:
    """All its matrices."""
    shapes = {one: opened.source.shape(one) for one in opened.source.names()}
    return tuple(find_linears(opened.spec, shapes))


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


@pytest.mark.parametrize(("family", "name", "value"), CASES)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
def test_what_is_asked_once_is_refused_too(
    scheme: str,
    family: str,
    name: str,
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where no matrix is asked by itself: those outside the experts once a layer."""
    monkeypatch.setattr(LayerWeights, "asks_once", True)
    opened = open_model(broken(tmp_path / "model", family, name, value))
    settings = QuantizeSettings(method="rtn", device="cpu")
    with pytest.raises(InputError, match=rf"{name} .* holds NaN or infinite values"):
        quantize(opened, uniform(SCHEMES[scheme]), tmp_path / "out", settings)


def test_matrices_outside_experts_are_asked_once_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerWeights, "asks_once", True)
    opened = open_model(tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16"))
    linears = linears_of(opened)
    rounder = LayerRounder(
        opened.source,
        {one.module: SCHEMES["FP8_DYNAMIC"] for one in linears},
        damping={},
        scale_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    asked: list[int] = []

    def isfinite(sums: torch.Tensor) -> torch.Tensor:
        asked.append(len(sums))
        return sums.isfinite()

    monkeypatch.setattr(torch, "isfinite", isfinite)
    own = [one for one in linears if one.layer == 1 and not one.is_expert]
    rounder.round_linears(own, None, LayerRounding())
    assert asked == [len(own)]
    assert len(own) > 1
    rounder.round_linears([], None, LayerRounding())  # nothing read, nothing asked
    assert asked == [len(own)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_a_gpu_refuses_matrices_outside_experts(tmp_path: Path) -> None:
    family, name, value = CASES[1]
    opened = open_model(broken(tmp_path / "model", family, name, value))
    settings = QuantizeSettings(method="rtn", device="cuda")
    with pytest.raises(InputError, match=rf"{name} .* holds NaN or infinite values"):
        quantize(opened, uniform(SCHEMES["FP8_DYNAMIC"]), tmp_path / "out", settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_a_gpu_asks_behind_the_last_matrix(tmp_path: Path) -> None:
    family, name, value = CASES[0]
    opened = open_model(broken(tmp_path / "model", family, name, value))
    linears = [one for one in linears_of(opened) if one.is_expert]
    reader = LayerWeights(opened.source, torch.device("cuda"))
    with pytest.raises(InputError, match=rf"{name} .* holds NaN or infinite values"):
        list(reader.read(linears))
