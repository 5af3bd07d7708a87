"""Repaired experts: the fit against one joint solve in float64, the model against transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from calibration.tokens import TokenSet
from models.errors import InputError
from models.fp8_blocks import encode_fp8_blocks
from models.opening import open_model
from reap.plan import PrunePlan
from reap.prune import prune_checkpoint
from reap.repair import Repair, RepairSettings
from reap.repair_fit import LayerTokens, RepairKind, RoutedInputs, fit, repair_kinds
from tests.kills import assert_same_after_kills
from tests.reap.test_prune import open_source, plan_for
from tests.tiny import read_all, reference_model, tiny_model
from tests.tiny_formats import read_fp8, write_fp8
from tests.token_sets import random_token_set

CHANGED = {
    "down": re.compile(r"experts\.(\d+\.down_proj\.weight(_scale_inv)?|down_proj)$"),
    "up": re.compile(r"experts\.(\d+\.(gate|up)_proj\.weight(_scale_inv)?|gate_up_proj)$"),
}
T, E, D, F = 200, 3, 5, 4


def made_up(seed: int = 0) -> tuple[LayerTokens, torch.Tensor]:
    """Tokens of three experts, the last of which has none."""
    draw = torch.Generator().manual_seed(seed)
    experts = [
        RoutedInputs(
            torch.randperm(T, generator=draw)[:count], torch.randn(count, F, generator=draw)
        )
        for count in (150, 120, 0)
    ]
    tokens = LayerTokens(
        experts,
        torch.randn(T, D, generator=draw),
        torch.rand(T, generator=draw) + 0.1,
        torch.arange(T) % 4 == 3,
    )
    return tokens, torch.randn(E, D, F, generator=draw)


def design(tokens: LayerTokens) -> torch.Tensor:
    """Every token's inputs to all experts side by side, float64 [T, E * F]."""
    wide = torch.zeros(T, E, F, dtype=torch.float64)
    for expert, own in enumerate(tokens.experts):
        wide[own.token_N, expert] = own.inputs_NF.double()
    return wide.flatten(1)


def test_down_is_the_joint_ridge_regression() -> None:
    tokens, down = made_up()
    wide, weight = design(tokens), tokens.weight_T.double()[:, None]
    normal = wide.T @ (weight * wide)
    mu = 0.7 * float(normal.diagonal().mean())
    change = torch.linalg.solve(
        normal + mu * torch.eye(E * F), wide.T @ (weight * tokens.lacking_TD.double())
    )
    wanted = down.double() + change.view(E, F, D).mT
    found, lacking = fit(tokens, down, ("down",), 0.7, sweeps=100)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    left = tokens.lacking_TD.double() - wide @ change
    torch.testing.assert_close(lacking.double(), left, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], down[2])  # no token, no change


def test_scales_are_the_joint_regression_on_outputs() -> None:
    tokens, down = made_up(1)
    outputs = torch.zeros(E, T, D, dtype=torch.float64)
    for expert, own in enumerate(tokens.experts):
        outputs[expert, own.token_N] = (own.inputs_NF @ down[expert].T).double()
    root = tokens.weight_T.double().sqrt()[:, None]
    wide = (outputs * root).flatten(1).T
    more = torch.linalg.lstsq(wide[:, :2], (tokens.lacking_TD.double() * root).flatten()).solution
    found, _ = fit(tokens, down, ("scales",), None, sweeps=100)
    for expert in range(2):
        wanted = down[expert].double() * (1 + more[expert])
        torch.testing.assert_close(found[expert].double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], down[2])


@pytest.mark.parametrize("shape", [(256, 128), (200, 130), (3, 5)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_blocks_are_those_of_the_format(shape: tuple[int, int], power_of_two: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight[0, 0] = 0.75 * 448 / 256  # a scale that is a power of two as it stands
    _, old = write_fp8(weight * 1.3, power_of_two=power_of_two)
    codes, scale = encode_fp8_blocks(weight, (128, 128), old)
    wanted_codes, wanted_scale = write_fp8(weight, power_of_two=power_of_two)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    error = (read_fp8(codes, scale) - weight).abs().max()
    wanted_error = (read_fp8(wanted_codes, wanted_scale) - weight).abs().max()
    assert error <= wanted_error * 1.01


def repaired(
    folder: Path,
    model: Path,
    plan: PrunePlan,
    kinds: tuple[RepairKind, ...],
    samples: int = 16,
    batch_tokens: int = 64,
) -> Path:
    opened = open_model(model)
    tokens = random_token_set(
        opened.spec.text["vocab_size"], LENGTHS[:samples], ((0, 1) * 8)[:samples]
    )
    settings = RepairSettings(kinds=kinds, tokens=tokens, device="cpu", batch_tokens=batch_tokens)
    prune_checkpoint(opened.source, plan, folder, repair=Repair(opened, plan, settings))
    return folder


LENGTHS = (40, 33, 21, 40, 2, 30, 17, 40) * 2


@pytest.mark.parametrize("kinds", [("scales", "down"), ("up",), ("scales", "down", "up")])
@pytest.mark.parametrize(
    ("family", "fp8"),
    [("qwen3_moe", False), ("glm4_moe", False), ("deepseek_v3", True), ("deepseek_v3", False)],
)
def test_only_what_was_asked_for_changes_and_the_output_comes_nearer(
    family: str, fp8: bool, kinds: tuple[RepairKind, ...], tmp_path: Path
) -> None:
    model = tiny_model(family, tmp_path / "model", fp8=fp8)
    source = open_source(model)
    plan = plan_for(source)
    prune_checkpoint(source, plan, tmp_path / "pruned")
    mended = repaired(tmp_path / "mended", model, plan, kinds)
    before, after = read_all(tmp_path / "pruned"), read_all(mended)
    assert before.keys() == after.keys()
    changed = set()
    for name in before:
        assert before[name].dtype == after[name].dtype
        one, two = (t[name].contiguous().view(torch.uint8) for t in (before, after))
        if not torch.equal(one, two):
            changed.add(name)
    allowed = [CHANGED[kind] for kind in kinds if kind != "scales"]
    assert all(any(one.search(name) for one in allowed) for name in changed), changed
    assert any(allowed[0].search(name) for name in changed), changed
    for name in ("plan.json", "config.json"):
        assert (mended / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    facts = json.loads((mended / "thresher.json").read_text())["repair"]
    assert facts["repairs"] == list(kinds)
    assert facts["layers"].keys() == {str(layer) for layer in plan.layers}
    ids = random_token_set(source.spec.text["vocab_size"], lengths=LENGTHS, domains=(0, 1) * 8)
    errors = [hidden_error(model, one, ids) for one in (tmp_path / "pruned", mended)]
    assert errors[1] < 0.95 * errors[0], errors


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Samples alone (no padding) and many in a batch: the same repair but for rounding."""
    model = tiny_model("glm4_moe", tmp_path / "model")
    plan = plan_for(open_source(model))
    kinds: tuple[RepairKind, ...] = ("scales", "down", "up")
    alone = read_all(repaired(tmp_path / "alone", model, plan, kinds, batch_tokens=1))
    padded = read_all(repaired(tmp_path / "padded", model, plan, kinds, batch_tokens=400))
    prune_checkpoint(open_source(model), plan, tmp_path / "pruned")
    before = read_all(tmp_path / "pruned")
    for name in before:
        change = (alone[name].float() - before[name].float()).norm()
        apart = (alone[name].float() - padded[name].float()).norm()
        assert apart <= 0.02 * change, (name, apart, change)


def hidden_error(whole: Path, other: Path, tokens: TokenSet) -> float:
    """Relative error of transformers' own last hidden states over the token set's samples."""
    models = [reference_model(path) for path in (whole, other)]
    error = total = 0.0
    for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        ids = tokens.input_ids[None, start:end].long()
        with torch.no_grad():
            hidden, found = (m(ids, output_hidden_states=True).hidden_states[-1] for m in models)
        error += float(((found - hidden).square().sum(-1) / hidden.square().sum(-1)).sum())
        total += ids.numel()
    return error / total


@pytest.mark.parametrize("kind", ["down", "up"])
@pytest.mark.parametrize("family", ["gpt_oss", "kimi_k2_thinking", "llama4", "longcat_flash"])
def test_models_without_a_known_repair_are_refused(
    family: str, kind: RepairKind, tmp_path: Path
) -> None:
    model = tiny_model(family, tmp_path / "model")
    plan = plan_for(open_source(model))
    with pytest.raises(InputError, match="prune without --repair"):
        repaired(tmp_path / "out", model, plan, (kind,))


def test_kinds_are_read_in_the_order_they_are_made() -> None:
    assert repair_kinds("up,down, scales") == ("scales", "down", "up")
    with pytest.raises(InputError, match="'bias' is unknown"):
        repair_kinds("bias")


@pytest.mark.parametrize("kind", ["down", "up"])
def test_too_few_samples_to_hold_some_out_are_refused(kind: RepairKind, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model")
    with pytest.raises(InputError, match="the token set has 3"):
        repaired(tmp_path / "out", model, plan_for(open_source(model)), (kind,), samples=3)


def repairing(out: Path, model: str, plan_file: str) -> None:
    repaired(out, Path(model), PrunePlan.load(plan_file), ("scales", "down", "up"))


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", tmp_path / "model", fp8=True, num_hidden_layers=4)
    plan_for(open_source(model)).save(tmp_path / "plan.json")
    found = assert_same_after_kills(
        repairing, tmp_path / "runs", model, tmp_path / "plan.json", kills=6
    )
    assert "plan.json" in found
