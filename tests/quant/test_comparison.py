"""What verification says of tensors beside their source's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.opening import open_model
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import SCHEMES, scheme_with
from quant.verify import verify_checkpoint
from tests.tiny import tiny_model


def changed(folder: Path, name: str, change: str) -> None:
    """One tensor of a checkpoint of one file, changed in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "zero":
        tensors[name].zero_()
    else:
        tensors[name].view(torch.int16).view(-1)[0] += 1  # the next number of bfloat16
    save_file(tensors, file, metadata={"format": "pt"})


def quantized(source: Path, out: Path, name: str) -> Path:
    scheme = scheme_with(name, group_size=8) if name.startswith("W") else SCHEMES[name]
    how = QuantizeSettings(method="rtn")
    quantize(open_model(source), uniform(scheme), out, how)
    return out


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.gate.weight"])
def test_a_plain_tensor_has_the_source_s_bits(name: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16", shards=1)
    out = quantized(model, tmp_path / "out", "W4A16")
    assert verify_checkpoint(out, model).ok
    other = tmp_path / "other"
    shutil.copytree(model, other)
    changed(other, name, "ulp")
    (finding,) = verify_checkpoint(out, other).findings
    assert f"{name} is not the source's" in finding


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_zeros_are_right_where_the_source_has_them(scheme: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model", dtype="bfloat16", shards=1)
    name = "model.layers.0.mlp.experts.3.up_proj"
    whole = tmp_path / "whole"
    shutil.copytree(model, whole)
    changed(model, f"{name}.weight", "zero")
    out = quantized(model, tmp_path / "out", scheme)
    assert verify_checkpoint(out, model).ok
    for source in (None, whole):
        (finding,) = verify_checkpoint(out, source).findings
        assert finding == f"{name} is all zero"
