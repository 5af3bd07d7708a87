"""Hessians summed while a layer runs, against brute force in float64."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.batches import PADDING, Batch
from models.experts import ExpertWeights, RoutedBatch, RoutedExperts
from models.opening import open_model
from quant import expert_sums
from quant.expert_sums import ExpertSums
from quant.hessians import add_products, made_symmetric
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import scheme_with
from quant.verify import verify_checkpoint
from tests.tiny import tiny_model
from tests.token_sets import random_token_set

E, D, F, K = 6, 48, 32, 2
SETS = ((0, 1), (2, 3), (4, 5))
DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU"),
    ),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("size", [128, 200, 384, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_groups(size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Groups with many rows, none, and one; sums that go on."""
    if size == 4096 and device.type == "cpu":
        pytest.skip("the kernel's higher tiles")
    counts = torch.tensor([133, 0, 1, 70])
    inputs = torch.randn(int(counts.sum()), size).to(device, dtype)
    end_E = counts.cumsum(0).to(device)
    begin_E = end_E - counts.to(device)
    before = torch.randn(4, size, size)
    before = before + before.mT
    found = before.clone().to(device)
    add_products(found, inputs, begin_E, end_E)
    made_symmetric(found)
    assert torch.equal(found, found.mT)
    for group, (begin, end) in enumerate(zip(begin_E.tolist(), end_E.tolist(), strict=True)):
        rows = inputs[begin:end].cpu().double()
        expected = before[group].double() + rows.T @ rows
        error = (found[group].cpu().double() - expected).norm() / expected.norm()
        assert error < 1e-5, (group, float(error))


class Activation(nn.Module):
    """As much of transformers' experts module as `RoutedExperts` asks for."""

    has_gate = True
    act_fn = nn.SiLU()


def random_batches(weighted: bool) -> tuple[list[tuple[RoutedBatch, Batch]], torch.Tensor]:
    """Three batches, two with padding, in which expert 3 gets nothing and expert 5 little; and the
    inputs of real pairs by expert, as a list of rows in float64."""
    batches, rows = [], [[] for _ in range(E)]
    for number in range(3):
        tokens = 40 + number
        inputs = torch.randn(tokens, D).bfloat16()
        real_T = torch.rand(tokens) > 0.2 * (number < 2)
        chance = torch.tensor([1.0, 1, 1, 0, 1, 0.03]) + torch.zeros(tokens, E)
        expert_TK = torch.multinomial(chance, K)
        expert_P, order = expert_TK.flatten().sort(stable=True)
        token_P = order // K
        weight_P = torch.rand(len(token_P)).bfloat16()
        record = RoutedBatch(
            layer=0,
            offsets_E=torch.bincount(expert_P, minlength=E).cumsum(0),
            expert_P=expert_P,
            token_P=token_P,
            router_weights_P=weight_P,
            inputs_TD=inputs,
            outputs_PD=torch.empty(0),
            weights_applied_to_input=weighted,
            inputs_PD=None if weighted else inputs[token_P],
            top_k=None if weighted else K,
        )
        domain_T = torch.where(real_T, 0, PADDING).to(torch.uint8)
        batch = Batch((0,), (tokens,), torch.zeros(1, tokens, dtype=torch.int64), None, domain_T)
        batches.append((record, batch))
        for expert, token, weight in zip(expert_P, token_P, weight_P, strict=True):
            if real_T[token]:
                x = inputs[token] * weight if weighted else inputs[token]
                rows[int(expert)].append(x)
    return batches, [torch.stack(x).double() if x else torch.zeros(0, D).double() for x in rows]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held", [1, 2, 3])
def test_sums_are_those_of_routed_tokens(held: int, weighted: bool) -> None:
    """Whatever number of sets has room at once."""
    torch.manual_seed(held)
    batches, rows = random_batches(weighted)

    def run() -> None:
        for record, batch in batches:
            sums.add(record, batch)

    sums = ExpertSums(
        SETS, E, with_hessian=True, num_tokens=120, room=held * 2 * 4 * D * D, again=run
    )
    run()
    assert sums.count_E.tolist() == [len(x) for x in rows]
    pairs = sum(len(x) for x in rows)
    pooled = sum(x.T @ x for x in rows) / pairs
    device = torch.device("cpu")
    for one in SETS:
        fed = sums.up(one, device, solved=True)
        assert fed.hessian_BKK is not None
        for index, expert in enumerate(one):
            x = rows[expert]
            expected = (x.T @ x + D * pooled) / (len(x) + D)
            assert_near(fed.hessian_BKK[index], expected, 1e-5)
            assert fed.largest_B[index] == (float(x.abs().max()) if len(x) else 0.0)

    loaded = RoutedExperts(0, Activation(), E)
    loaded.weights = ExpertWeights(
        up=torch.randn(E, 2 * F, D).bfloat16() * D**-0.5,
        down=torch.randn(E, D, F).bfloat16(),
        up_bias=None,
        down_bias=None,
        transposed=False,
    )
    middles = []
    for x, up in zip(rows, loaded.weights.up.double(), strict=True):
        gate, value = (x @ up.T).chunk(2, dim=-1)
        middles.append(nn.functional.silu(gate) * value)
    for one in SETS:
        fed = sums.down(one, loaded, device, solved=True)
        assert fed.hessian_BKK is not None
        seen = [middles[e].square().sum(0).mean() / len(middles[e]) for e in one if len(rows[e])]
        common = sum(seen) / len(seen) if seen else 1.0
        for index, expert in enumerate(one):
            h = middles[expert]
            expected = (h.T @ h + F * common * torch.eye(F).double()) / (len(h) + F)
            assert_near(fed.hessian_BKK[index], expected, 0.02)  # middles are bfloat16


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert torch.equal(found, found.mT)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < bound, float(error)


def test_some_batches_serve_for_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch always, then as many of the others as the bytes allow, evenly."""
    monkeypatch.setattr(expert_sums, "KEPT_BYTES", 3 * 20 * D * 2)
    sums = ExpertSums(SETS, E, with_hessian=False, num_tokens=200, room=0, again=lambda: None)
    seen = []
    for number in range(10):
        inputs = torch.full((20, D), float(number)).bfloat16()
        every = torch.arange(20)
        record = RoutedBatch(
            layer=0,
            offsets_E=torch.tensor([20] * E),
            expert_P=torch.zeros(20, dtype=torch.int64),
            token_P=every,
            router_weights_P=torch.ones(20),
            inputs_TD=inputs,
            outputs_PD=torch.empty(0),
        )
        ids = torch.zeros(1, 20, dtype=torch.int64)
        sums.add(record, Batch((0,), (20,), ids, None, torch.zeros(20, dtype=torch.uint8)))
        seen = [float(pairs.inputs_TD[0, 0]) for pairs in sums.kept]
    assert seen[0] == 0
    assert len(seen) in (3, 4)
    assert max(b - a for a, b in pairwise(seen)) <= 4


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_whole_job_with_sums(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow a GPU takes, on the CPU: nearly the codes of the flow that keeps inputs."""
    model = open_model(tiny_model(family, tmp_path / "model", dtype="bfloat16"))
    tokens = random_token_set(model.spec.text["vocab_size"], (60,) * 8, (0, 1) * 4)
    recipe = uniform(scheme_with("W4A16", group_size=8))
    errors = {}
    for name in ("inputs", "sums"):
        if name == "sums":
            monkeypatch.setattr("quant.walked_layer.SUMMED_ON", ("cpu",))
            monkeypatch.setattr("quant.walked_layer.free_bytes", lambda _: 100_000)
        manifest = quantize(model, recipe, tmp_path / name, QuantizeSettings(), tokens=tokens)
        assert verify_checkpoint(tmp_path / name, model.checkpoint.root).ok
        errors[name] = [
            (unit["mean_error"], unit["without_tokens"], unit["few_tokens"])
            for unit in manifest["rounding"].values()
        ]
    for ours, theirs in zip(errors["sums"], errors["inputs"], strict=True):
        assert ours[1:] == theirs[1:]
        assert ours[0] == pytest.approx(theirs[0], rel=0.02)
