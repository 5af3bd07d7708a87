"""Damage of single parts, against transformers' whole model with the rounded weights in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings
from evals.part_damage import Damage, part_damage, some_samples
from models.errors import InputError
from models.opening import open_model
from quant.budget import Part, menu_of
from quant.quantize_plan import QuantizeSettings
from quant.rounding import round_to_nearest
from quant.schemes import Scheme, scheme_with
from tests.kills import assert_same_after_kills
from tests.tiny import reference_model, tiny_model
from tests.token_sets import random_token_set

SCHEMES = tuple(scheme_with(name, group_size=8) for name in ("W3A16", "W8A16"))


def damage(model: Path, out: Path, tokens: TokenSet, **settings: Any) -> Damage:
    opened = open_model(model)
    menu = menu_of(opened, SCHEMES, QuantizeSettings())
    return part_damage(opened, menu, tokens, EvalSettings(batch_tokens=64, **settings), out)


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Our scales, compressed-tensors' arithmetic."""
    found = round_to_nearest(weight, scheme, scale_dtype=torch.float32)
    zero = torch.zeros_like(found.scale)
    return fake_quantize(weight, found.scale, zero, scheme.weights)


def round_part(layer: Any, kind: str, scheme: Scheme) -> None:
    """In transformers' layer: attention's Linears, a dense MLP's, or the stacked experts."""
    if kind == "expert":
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            stack.data = torch.stack([rounded(one, scheme) for one in stack.data])
        return
    for module in (layer.self_attn if kind == "attention" else layer.mlp).modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, scheme)


def test_equals_rounding_the_part_in_the_whole_model(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "m")
    tokens = random_token_set(32)
    found = damage(model, tmp_path / "out", tokens)
    original = reference_model(model)
    count = sum(tokens.lengths()) - len(tokens)

    def predictions(network: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [network(row[None].long()).logits[0].double().log_softmax(-1) for row in tokens]

    wanted = predictions(original)
    kinds = {0: "expert", 1: "dense_mlp", 2: "expert"}
    assert found.keys() == {Part(n, kind) for n in kinds for kind in ("attention", kinds[n])}
    for part, values in found.items():
        for scheme, value in zip(SCHEMES, values, strict=True):
            changed = reference_model(model)
            round_part(changed.model.layers[part.layer], part.kind, scheme)
            kl = sum(
                float((log_p.exp() * (log_p - log_q)).sum(-1)[:-1].sum())
                for log_p, log_q in zip(wanted, predictions(changed), strict=True)
            )
            assert value == pytest.approx(kl / count, rel=1e-3, abs=1e-7), part
    assert damage(model, tmp_path / "out", tokens) == found  # read back
    assert damage(model, tmp_path / "spilled", tokens, memory=1) == found


def test_mtp_layers_are_not_measured(tmp_path: Path) -> None:
    """FP8 source, latent attention, shared experts, an MTP layer."""
    model = tiny_model("deepseek_v32", tmp_path / "m", dtype="bfloat16", fp8=True)
    found = damage(model, tmp_path / "out", random_token_set(32))
    layers = open_model(model).spec.num_layers
    assert max(part.layer for part in found) == layers - 1
    assert {part.kind for part in found} == {"attention", "dense_mlp", "shared_expert", "expert"}
    assert all(three > eight > 0 for three, eight in found.values())


def test_other_tokens_are_another_job(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "m")
    damage(model, tmp_path / "out", random_token_set(32))
    with pytest.raises(InputError, match="tokens"):
        damage(model, tmp_path / "out", random_token_set(32, seed=2))


def test_some_samples() -> None:
    tokens = random_token_set(32, (10,) * 40, (0, 1) * 20)
    half = some_samples(tokens, 200)
    assert half.lengths() == [10] * 20
    rows = [row.tolist() for row in tokens]
    places = [rows.index(row.tolist()) for row in half]
    assert places == sorted(places)
    assert max(b - a for a, b in itertools.pairwise(places)) <= 3
    assert [int(d) for d in half.domain] == [int(tokens.domain[place]) for place in places]
    assert some_samples(tokens, 10**6).digest() == tokens.digest()
    assert len(some_samples(tokens, 2)) == 1


def measuring(out: Path, model: str, tokens_file: str) -> None:
    damage(Path(model), out, TokenSet.load(tokens_file), memory=30_000)


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "m", num_hidden_layers=6)
    random_token_set(32, (60,) * 8, (0, 1) * 4).save(tmp_path / "t.safetensors")
    found = assert_same_after_kills(
        measuring, tmp_path / "runs", model, tmp_path / "t.safetensors", kills=5
    )
    assert {"damage.json", "thresher.json"} == found.keys()
