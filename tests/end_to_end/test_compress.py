"""One pass gives the plan of `score` and `prune` and the bytes of `prune` and `quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.compress import compress, prune_ahead, still_unpruned
from models.opening import open_model
from models.processes import ALONE
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import SCHEMES, Scheme, scheme_with
from quant.verify import verify_checkpoint
from reap.damage import SAMPLED_TOKENS
from reap.damage_file import DamageStats
from reap.plan import make_plan
from reap.prune import prune_checkpoint
from reap.score import ScoreSettings, score
from tests.kills import assert_same_after_kills
from tests.tiny import tiny_model
from tests.token_sets import random_token_set


@pytest.mark.parametrize(
    ("family", "scheme", "fp8"),
    [
        ("qwen3_moe", scheme_with("W3A16", group_size=8), False),
        ("deepseek_v32", scheme_with("W4A16", group_size=8), True),
        ("llama4", SCHEMES["FP8_DYNAMIC"], False),
        ("longcat_flash", scheme_with("W8A16", group_size=8), False),
    ],
    ids=["qwen3_moe-W3A16", "deepseek_v32-fp8-W4A16", "llama4-FP8", "longcat-W8A16"],
)
def test_one_pass_equals_three_commands(
    family: str, scheme: Scheme, fp8: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tmp_path / "model", dtype="bfloat16", fp8=fp8)
    opened = open_model(model)
    tokens = random_token_set(opened.spec.text["vocab_size"], (40,) * 6, (0, 1) * 3)
    keep = opened.spec.num_experts // 2
    settings = QuantizeSettings(batch_tokens=128)
    stats = score(model, tokens, tmp_path / "scores", ScoreSettings(batch_tokens=128))
    plan = make_plan(stats, opened.spec, keep=keep)
    prune_checkpoint(opened.source, plan, tmp_path / "pruned")
    pruned = open_model(tmp_path / "pruned")
    quantize(pruned, uniform(scheme), tmp_path / "two", settings, tokens=tokens)

    view = still_unpruned(opened, keep, "reap", "keep")
    ahead = prune_ahead(opened, view, tokens, settings, ALONE)
    quantize(view, uniform(scheme), tmp_path / "one", settings, tokens=tokens, ahead=ahead)

    made = json.loads((tmp_path / "one" / "plan.json").read_text())
    assert made["layers"] == {str(layer): list(kept) for layer, kept in plan.layers.items()}
    for file in sorted((tmp_path / "two").iterdir()):
        if file.name in ("thresher.json", "plan.json"):
            continue
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes(), file.name
    assert verify_checkpoint(tmp_path / "one").ok


def test_one_pass_measures_the_damage_score_measures(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v32", tmp_path / "model", dtype="bfloat16", fp8=True)
    opened = open_model(model)
    tokens = random_token_set(opened.spec.text["vocab_size"], (40,) * 6, (0, 1) * 3)
    keep = opened.spec.num_experts // 2
    score_settings = ScoreSettings(batch_tokens=128, damage_tokens=SAMPLED_TOKENS)
    stats = score(model, tokens, tmp_path / "scores", score_settings)
    damage = DamageStats.load(tmp_path / "scores")
    plan = make_plan(stats, opened.spec, keep=keep, criterion="output-error", damage=damage)

    settings = QuantizeSettings(batch_tokens=128, method="rtn")
    view = still_unpruned(opened, keep, "output-error", "keep")
    ahead = prune_ahead(opened, view, tokens, settings, ALONE)
    recipe = uniform(scheme_with("W4A16", group_size=8))
    quantize(view, recipe, tmp_path / "one", settings, tokens=tokens, ahead=ahead)
    made = json.loads((tmp_path / "one" / "plan.json").read_text())
    assert made["layers"] == {str(layer): list(kept) for layer, kept in plan.layers.items()}
    assert made["evidence"] == plan.evidence


def compressing(out: Path, model: str, tokens_file: str) -> None:
    options = ["--keep", "8", "--scheme", "W3A16", "--group-size", "8", "--memory", "60KB"]
    compress.main(
        [model, *options, "--tokens", tokens_file, "-o", str(out), "--quiet"],
        standalone_mode=False,
    )


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """The real command; in six layers a kill falls into scoring, rounding and writing."""
    model = tiny_model(
        "deepseek_v32", tmp_path / "model", dtype="bfloat16", fp8=True, num_hidden_layers=6
    )
    vocabulary = open_model(model).spec.text["vocab_size"]
    random_token_set(vocabulary, (60,) * 8, (0, 1) * 4).save(tmp_path / "tokens.safetensors")
    found = assert_same_after_kills(
        compressing, tmp_path / "runs", model, tmp_path / "tokens.safetensors"
    )
    assert {"plan.json", "config.json", "model.safetensors.index.json"} < found.keys()
