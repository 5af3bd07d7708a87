"""llm-compressor's AutoRound as an option: verified by our decoder, refused where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings, evaluate
from models.errors import InputError
from models.opening import OpenModel, open_model
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import scheme_with
from quant.verify import verify_checkpoint
from quant.whole_model import quantize_whole
from tests.tiny import tiny_model
from tests.token_sets import random_token_set

RECIPE = uniform(scheme_with("W3A16", group_size=32))


def model_and_tokens(folder: Path, **overrides: object) -> tuple[OpenModel, TokenSet]:
    sizes = {"moe_intermediate_size": 64, "intermediate_size": 64, "mlp_only_layers": []}
    path = tiny_model("qwen3_moe", folder / "model", dtype="bfloat16", **(sizes | overrides))
    opened = open_model(path)
    tokens = random_token_set(opened.spec.text["vocab_size"], (60, 40) * 4, (0, 1) * 4)
    return opened, tokens


@pytest.mark.filterwarnings(
    "ignore:Attempting to save a model with offloaded modules",
    "ignore:In CPU autocast, but the target",  # auto-round on CPUs without bfloat16 instructions
)
def test_autoround_is_verified_and_better_than_nearest(tmp_path: Path) -> None:
    opened, tokens = model_and_tokens(tmp_path)
    manifest = quantize_whole(
        opened, RECIPE, tmp_path / "tuned", "autoround", tokens=tokens, steps=40
    )
    quantize(opened, RECIPE, tmp_path / "nearest", QuantizeSettings(method="rtn"))
    report = verify_checkpoint(tmp_path / "tuned", opened.checkpoint.root)
    assert report.ok, report.findings
    nearest = verify_checkpoint(tmp_path / "nearest")
    assert list(report.quantized.values()) == list(nearest.quantized.values())
    assert manifest["rounding"]["model"]["matrices"] == sum(report.quantized.values())
    kl = {
        name: evaluate(tmp_path / name, tokens, EvalSettings(), reference=opened.checkpoint.root)[
            "kl"
        ]
        for name in ("tuned", "nearest")
    }
    assert 0 < kl["tuned"] < 0.9 * kl["nearest"]
    again = quantize_whole(opened, RECIPE, tmp_path / "tuned", "autoround", tokens=tokens, steps=40)
    assert again["files"] == manifest["files"]


def test_what_it_cannot_do_is_said_first(tmp_path: Path) -> None:
    opened, tokens = model_and_tokens(tmp_path, moe_intermediate_size=48)
    out = tmp_path / "out"
    narrow = uniform(scheme_with("W4A16", group_size=16))
    with pytest.raises(InputError, match="32 does not divide"):
        quantize_whole(opened, narrow, out, "autoround", tokens=tokens)
    if not torch.accelerator.is_available():
        with pytest.raises(InputError, match="needs a GPU"):
            quantize_whole(opened, narrow, out, "awq", tokens=tokens)
    even, _ = model_and_tokens(tmp_path / "even")
    with pytest.raises(InputError, match="--mix or --tokens"):
        quantize_whole(even, RECIPE, out, "autoround", tokens=None)
    fp8 = open_model(
        tiny_model(
            "qwen3_moe", tmp_path / "fp8", dtype="bfloat16", fp8=True, moe_intermediate_size=64,
            intermediate_size=64,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="16 or 32 bits"):
        quantize_whole(fp8, RECIPE, out, "autoround", tokens=tokens)
    assert not out.exists()
