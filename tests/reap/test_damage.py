"""The damage of a set of experts against a pruned layer that is really run.

The oracle is transformers' own: the pruned checkpoint is written, loaded by transformers, and its
MoE block runs on the very hidden states that entered the whole model's. Float32; with every token
sampled the estimate is the whole truth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.batches import cut
from calibration.packing import cut_packed
from calibration.tokens import TokenSet
from models.errors import InputError
from models.opening import open_model
from reap.criteria import CRITERIA
from reap.damage import LayerDamage, sampled_rows
from reap.damage_file import DamageStats
from reap.elimination import KeptSet, kept_error, least_damaging
from reap.plan import PrunePlan, make_plan
from reap.prune import prune_checkpoint
from reap.quotas import GroupMode
from reap.score import ScoreSettings, score
from reap.stats import SaliencyStats
from tests.kills import assert_same_after_kills
from tests.reap.brute_force import CONFIGS, random_samples, write_model
from tests.tiny import tiny_model
from tests.token_sets import random_token_set

LENGTHS = [24, 17, 31, 9, 2, 12, 30, 1, 24, 18]
KEEP = {"qwen3_moe": 8, "deepseek_v32": 8, "gpt_oss": 6}
EVERY = 10_000  # more tokens than there are


def token_set(lengths: list[int]) -> TokenSet:
    samples = random_samples(lengths)
    return TokenSet(
        input_ids=torch.cat([torch.tensor(s, dtype=torch.int32) for s in samples]),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        domain=torch.tensor([i % 2 for i in range(len(lengths))], dtype=torch.uint8),
        domains=["code", "tools"],
        mix="random",
        seed=1,
        tokenizer_sha256="",
    )


class Case:
    """A model, what it was scored to, and the plans made of it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.model = write_model(family, folder / "model")
        self.opened = open_model(folder / "model")
        settings = ScoreSettings(
            device="cpu", dtype="float32", batch_tokens=64, damage_tokens=EVERY
        )
        self.stats = score(folder / "model", token_set(LENGTHS), folder / "scores", settings)
        self.damage = DamageStats.load(folder / "scores")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def blocks_seen(model: nn.Module) -> tuple[dict[int, list[Any]], list[Any]]:
    """Every call of each layer's MoE block (what entered, what left) and what left the layer."""
    calls: dict[int, list[Any]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        seen = calls.setdefault(index, [])

        def block(_: nn.Module, args: Any, out: Any, seen: list[Any] = seen) -> None:
            seen.append([args[0].detach(), routed_of(out).detach()])

        def whole(_: nn.Module, args: Any, out: Any, seen: list[Any] = seen) -> None:
            left = out[0] if isinstance(out, tuple) else out
            seen[-1].append(left.detach())

        handles.append(layer.mlp.register_forward_hook(block))
        handles.append(layer.register_forward_hook(whole))
    return calls, handles


def routed_of(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def brute_force_error(
    case: Case, layers: dict[int, tuple[int, ...]], groups: GroupMode
) -> dict[int, float]:
    """The pruned checkpoint's blocks on the whole model's inputs, sample by sample."""
    plan = PrunePlan(
        criterion="random",
        num_experts=case.opened.spec.num_experts,
        keep=len(next(iter(layers.values()))),
        layers=layers,
        groups=groups,
    )
    out = case.folder / "pruned"
    prune_checkpoint(case.opened.source, plan, out, force=True)
    pruned = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    calls, handles = blocks_seen(case.model)
    for sample in random_samples(LENGTHS):
        case.model(torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, seen in calls.items():
        lost = total = 0.0
        for entered, left_block, left_layer in seen:
            other = routed_of(pruned.model.layers[layer].mlp(entered))
            shared = getattr(case.model.model.layers[layer].mlp, "shared_experts", None)
            routed = left_block if shared is None else left_block - shared(entered)
            weight = 1 / left_layer.double().square().sum(-1)
            lost += (weight * (left_block - other).double().square().sum(-1)).sum().item()
            total += (weight * routed.double().square().sum(-1)).sum().item()
        found[layer] = lost / total
    return found


def spread_out(spec: Any, keep: int, seed: int, num_groups: int) -> tuple[int, ...]:
    """Random experts, the same number of each group."""
    generator = torch.Generator().manual_seed(seed)
    size = spec.num_experts // num_groups
    kept = [
        group * size + expert
        for group in range(num_groups)
        for expert in torch.randperm(size, generator=generator)[: keep // num_groups].tolist()
    ]
    return tuple(sorted(kept))


@pytest.mark.parametrize("groups", ["keep", "flatten"])
def test_the_error_of_any_set_is_that_of_the_pruned_layer(case: Case, groups: GroupMode) -> None:
    spec = case.opened.spec
    if groups == "flatten" and spec.num_groups == 1:
        pytest.skip("no groups to give up")
    slices = spec.num_groups if groups == "keep" else 1
    keep = KEEP[case.family]
    layers = {
        layer: spread_out(spec, keep, seed=layer, num_groups=slices) for layer in spec.scored_layers
    }
    wanted = brute_force_error(case, layers, groups)
    for layer, kept in layers.items():
        assert 0.05 < wanted[layer] < 2
        found = kept_error(case.damage.layers[layer], kept, slices)
        assert found == pytest.approx(wanted[layer], rel=2e-3), layer


def test_the_chosen_set_is_better_than_any_criterions(case: Case) -> None:
    """Measured by running the layer, not by our own error."""
    spec, keep = case.opened.spec, KEEP[case.family]
    plan = make_plan(case.stats, spec, keep=keep, criterion="output-error", damage=case.damage)
    found = brute_force_error(case, dict(plan.layers), "keep")
    for layer, error in plan.evidence["layer_error"].items():
        assert error == pytest.approx(found[int(layer)], rel=2e-3)
    for criterion in CRITERIA:
        other = make_plan(case.stats, spec, keep=keep, criterion=criterion)
        errors = brute_force_error(case, dict(other.layers), "keep")
        for layer in spec.scored_layers:
            assert found[layer] <= errors[layer] * (1 + 1e-6), (criterion, layer)


def test_elimination_with_swaps_is_near_the_best_of_all_sets(case: Case) -> None:
    from itertools import combinations

    spec = case.opened.spec
    layer = spec.scored_layers[0]
    damage, keep = case.damage.layers[layer], KEEP[case.family]
    sums = case.stats.pooled(layer)
    kept, error = least_damaging(damage, keep, spec.num_groups, sums)
    size, quota = spec.num_experts // spec.num_groups, keep // spec.num_groups
    assert [sum(e // size == g for e in kept) for g in range(spec.num_groups)] == (
        [quota] * spec.num_groups
    )
    state = KeptSet(damage, damage.law)
    generator = torch.Generator().manual_seed(0)
    if spec.num_groups > 1:
        sets = [spread_out(spec, keep, seed, spec.num_groups) for seed in range(300)]
    else:
        every = list(combinations(range(spec.num_experts), keep))
        picks = torch.randperm(len(every), generator=generator)[:300].tolist()
        sets = [every[pick] for pick in picks]
    best = float("inf")
    for one in sets:
        kept_E = torch.zeros(spec.num_experts, dtype=torch.bool)
        kept_E[list(one)] = True
        state.set(kept_E)
        best = min(best, state.error())
    assert error <= best * (1 + 1e-6)


def test_removing_one_by_one_is_the_same_as_routing_anew(case: Case) -> None:
    damage = case.damage.layers[case.opened.spec.scored_layers[-1]]
    state = KeptSet(damage, damage.law)
    for _ in range(4):
        ranked = state.removal_errors()
        fresh = KeptSet(damage, damage.law)
        fresh.set(state.kept_E)
        assert state.error() == pytest.approx(fresh.error(), rel=1e-6, abs=1e-9)
        if damage.law.num_groups == 1:  # else a removal can change groups of tokens it did not rank
            torch.testing.assert_close(fresh.removal_errors(), ranked, rtol=1e-4, atol=1e-6)
        expert = int(ranked.argmin())
        state.remove(expert)
        assert not state.kept_E[expert]
        if damage.law.num_groups == 1:
            assert state.error() == pytest.approx(float(ranked[expert]), rel=1e-4, abs=1e-7)


def test_sampled_rows_are_tokens_and_the_same_every_time() -> None:
    tokens = token_set(LENGTHS)
    cuts = cut(tokens, 64)
    assert any(len(samples) > 1 for samples in cuts)
    rows = sampled_rows(tokens, cuts, 40, packed=False)
    again = sampled_rows(tokens, cuts, 40, packed=False)
    assert sum(len(r) for r in rows.values()) == 40
    lengths = tokens.lengths()
    for samples, found in rows.items():
        assert torch.equal(found, again[samples])
        width = max(lengths[s] for s in samples)
        for row in found.tolist():
            assert row % width < lengths[samples[row // width]], "padding"


def test_sampled_rows_of_packed_samples_follow_each_other() -> None:
    tokens = token_set(LENGTHS)
    cuts = cut_packed(tokens, 64)
    assert any(len(samples) > 1 for samples in cuts)
    rows = sampled_rows(tokens, cuts, EVERY, packed=True)
    lengths = tokens.lengths()
    for samples, found in rows.items():
        assert torch.equal(found, torch.arange(sum(lengths[s] for s in samples)))


def test_packed_samples_have_the_damage_of_padded_ones(tmp_path: Path) -> None:
    path, tokens = tiny_model("qwen3_moe", tmp_path / "model"), token_set(LENGTHS)
    found = []
    for pack in (False, True):
        how = ScoreSettings(
            device="cpu", dtype="float32", batch_tokens=64, damage_tokens=EVERY, pack=pack
        )
        score(path, tokens, tmp_path / f"scores-{pack}", how)
        found.append(DamageStats.load(tmp_path / f"scores-{pack}"))
    for layer, padded in found[0].layers.items():
        packed = found[1].layers[layer]
        torch.testing.assert_close(packed.gram_EE, padded.gram_EE, rtol=1e-4, atol=1e-7)
        kept = tuple(range(8))
        errors = [kept_error(one, kept, 1) for one in (padded, packed)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_sample_is_close_to_the_whole(case: Case, tmp_path: Path) -> None:
    """The estimate from a third of the tokens, corrected by all tokens' inner products."""
    settings = ScoreSettings(device="cpu", dtype="float32", batch_tokens=64, damage_tokens=60)
    score(case.folder / "model", token_set(LENGTHS), tmp_path / "scores", settings)
    sampled = DamageStats.load(tmp_path / "scores")
    spec = case.opened.spec
    for layer in spec.scored_layers:
        part, whole = sampled.layers[layer], case.damage.layers[layer]
        torch.testing.assert_close(part.gram_EE, whole.gram_EE)  # over all tokens in either
        for seed in range(8):
            kept = spread_out(spec, KEEP[case.family], seed, spec.num_groups)
            wanted = kept_error(whole, kept, spec.num_groups)
            assert kept_error(part, kept, spec.num_groups) == pytest.approx(wanted, rel=0.3)


def test_experts_without_tokens_go_first(case: Case) -> None:
    layer = case.opened.spec.scored_layers[0]
    damage = case.damage.layers[layer]
    sums = case.stats.pooled(layer)
    spec = case.opened.spec
    rarest = [
        int(sums.count[g * (spec.num_experts // spec.num_groups) :][: spec.num_experts //
            spec.num_groups].argmin()) + g * (spec.num_experts // spec.num_groups)
        for g in range(spec.num_groups)
    ]  # fmt: skip
    logits = damage.logits_RE.clone()
    logits[:, rarest] = -30  # no token would choose them
    weights = damage.weights_RE.clone()
    weights[:, rarest] = 0
    gram = damage.gram_EE.clone()
    gram[rarest], gram[:, rarest] = 0, 0
    changed = LayerDamage(
        **{
            name: getattr(damage, name)
            for name in LayerDamage.__dataclass_fields__
            if name not in ("logits_RE", "weights_RE", "gram_EE")
        },
        logits_RE=logits,
        weights_RE=weights,
        gram_EE=gram,
    )
    kept, _ = least_damaging(changed, spec.num_experts - spec.num_groups, spec.num_groups, sums)
    assert not set(kept) & set(rarest)


def test_saliency_and_reaps_plan_are_the_same_bytes_with_damage(case: Case, tmp_path: Path) -> None:
    settings = ScoreSettings(device="cpu", dtype="float32", batch_tokens=64)
    score(case.folder / "model", token_set(LENGTHS), tmp_path / "plain", settings)
    for name in ("saliency.safetensors", "saliency.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            case.folder / "scores" / name
        ).read_bytes()
    assert not (tmp_path / "plain" / "damage.safetensors").exists()
    stats = SaliencyStats.load(tmp_path / "plain")
    for damage in (None, case.damage):
        plan = make_plan(stats, case.opened.spec, keep=KEEP[case.family], damage=damage)
        assert list(plan.to_json()) == [
            "format", "criterion", "num_experts", "keep", "groups", "mtp", "seed",
            "saliency_sha256", "model_digest", "dead_experts", "layers",
        ]  # fmt: skip
        for layer, kept in plan.layers.items():
            sums = stats.pooled(layer)
            size = case.opened.spec.num_experts // case.opened.spec.num_groups
            quota = KEEP[case.family] // case.opened.spec.num_groups
            mean = (sums.weighted_norm_sum / sums.count).nan_to_num(-1).tolist()
            for start in range(0, len(mean), size):
                order = sorted(range(start, start + size), key=lambda e: (-mean[e], e))
                assert sorted(order[:quota]) == [e for e in kept if start <= e < start + size]


def test_what_cannot_be_done_is_refused(case: Case, tmp_path: Path) -> None:
    spec, keep = case.opened.spec, KEEP[case.family]
    with pytest.raises(InputError, match="--damage"):
        make_plan(case.stats, spec, keep=keep, criterion="output-error")
    with pytest.raises(InputError, match="--damage"):
        DamageStats.load(tmp_path)
    foreign = DamageStats(
        layers=case.damage.layers, saliency_sha256="x", model_digest="", tokens_digest=""
    )
    with pytest.raises(InputError, match="another scoring run"):
        make_plan(case.stats, spec, keep=keep, criterion="output-error", damage=foreign)


@pytest.mark.parametrize("family", ["llama4", "longcat_flash"])
def test_families_that_cannot_be_rerouted_are_refused(family: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model")
    tokens = random_token_set(open_model(path).spec.text["vocab_size"])
    with pytest.raises(InputError, match="without --damage"):
        score(path, tokens, tmp_path / "out", ScoreSettings(batch_tokens=64, damage_tokens=50))


def scoring(out: Path, model: str, tokens_file: str) -> None:
    tokens = TokenSet.load(tokens_file)
    score(model, tokens, out, ScoreSettings(batch_tokens=256, memory=30_000, damage_tokens=100))


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = tiny_model("deepseek_v32", tmp_path / "model", num_hidden_layers=6)
    vocabulary = open_model(path).spec.text["vocab_size"]
    tokens = random_token_set(vocabulary, lengths=(60,) * 24, domains=(0, 1) * 12)
    tokens.save(tmp_path / "tokens.safetensors")
    found = assert_same_after_kills(
        scoring, tmp_path / "runs", path, tmp_path / "tokens.safetensors"
    )
    assert "damage.safetensors" in found
