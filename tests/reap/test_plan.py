"""Prune plans: what may be kept, what is kept, and the file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.architecture import MTP, Architecture, ExpertTensor, MoE
from models.errors import InputError
from models.model_spec import ModelSpec
from reap.plan import PrunePlan, best_experts, make_plan
from reap.quotas import check_keep, resolve_keep, valid_keeps
from reap.stats import SaliencyStats
from reap.sums import LayerStats


def model(
    num_experts: int = 16,
    top_k: int = 2,
    *,
    num_layers: int = 4,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
    mtp: str | None = None,
    num_mtp: int = 1,
    zero_experts: int = 0,
    hash_layers: int = 0,
) -> ModelSpec:
    """A made-up family: layer 0 dense, `hash_layers` hash-routed ones after it, then scored."""
    moe = MoE(
        block="mlp",
        experts=(ExpertTensor(role="down", name="experts.{expert}.down_proj.weight"),),
        router=("gate.weight",),
        num_experts=("n_routed_experts",),
        groups=("n_group", "topk_group"),
        group_top=group_top,
        layers=lambda config: tuple(range(1, config["num_hidden_layers"])),
        hash_layers=lambda config: tuple(range(1, 1 + hash_layers)),
        zero_experts="zero_expert_num",
    )
    architecture = Architecture(
        name="made_up",
        title="Made-up",
        model_types=("made_up",),
        transformers_type="made_up",
        moe=moe,
        mtp=MTP(prefix=mtp, count="num_nextn_predict_layers") if mtp else None,
    )
    config = {
        "model_type": "made_up",
        "num_hidden_layers": num_layers,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": top_k,
        "n_group": n_group,
        "topk_group": topk_group,
        "zero_expert_num": zero_experts,
        "num_nextn_predict_layers": num_mtp,
    }
    return ModelSpec(architecture, config)


V3 = model(256, 8, num_layers=61, n_group=8, topk_group=4, mtp="model.layers.{layer}.")


def scored(
    spec: ModelSpec,
    reap_scores: dict[int, list[float]] | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> SaliencyStats:
    """Statistics whose REAP scores are the given ones (None: random; a negative score: dead)."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for layer in spec.scored_layers if layers is None else layers:
        scores = (reap_scores or {}).get(layer)
        if scores is None:
            scores = torch.rand(spec.num_experts, generator=generator).tolist()
        table[layer] = LayerStats.empty(spec.num_experts, ("all",))
        for expert, score in enumerate(scores):
            if score >= 0:
                norm = torch.tensor([score], dtype=torch.float64)
                table[layer].add(expert, torch.zeros(1, dtype=torch.uint8), torch.ones(1), norm)
    return SaliencyStats(layers=table, tokens={"all": 1}, model="made-up", digests={"model": "d1"})


# ---- which numbers


def routable(spec: ModelSpec, keep: int, groups: str) -> bool:
    """By trying: does the routing of transformers' modules run on `keep` experts, and are all
    top_k chosen experts real choices (none from a masked group)?"""
    n_group = spec.num_groups if groups == "keep" else 1
    topk_group = spec.topk_groups if groups == "keep" else 1
    if keep < 1 or keep > spec.num_experts:
        return False
    choice = torch.rand(1, keep + spec.zero_experts)
    try:
        if n_group > 1:
            grouped = choice.view(1, n_group, -1)
            top = grouped.topk(spec.architecture.moe.group_top, dim=-1).values.sum(-1)
            chosen = top.topk(topk_group, dim=-1).indices
            mask = torch.zeros(1, n_group).scatter_(1, chosen, 1.0)
            mask = mask.unsqueeze(-1).expand(grouped.shape).reshape(1, -1)
            choice = choice.masked_fill(mask == 0, -math.inf)
        return bool(torch.isfinite(choice.topk(spec.top_k, dim=-1).values).all())
    except RuntimeError:
        return False


SPECS = [
    model(16, 2),
    model(5, 5),
    model(12, 3, zero_experts=4),
    model(12, 3, zero_experts=2),
    model(32, 4, n_group=4, topk_group=2),
    model(32, 4, n_group=4, topk_group=1),
    model(64, 8, n_group=8, topk_group=4),
    model(64, 8, n_group=8, topk_group=8),
    model(24, 6, n_group=8, topk_group=3, group_top=1),
    model(8, 2, n_group=4, topk_group=2),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("groups", ["keep", "flatten"])
def test_numbers_that_pass_are_those_the_router_can_run(spec: ModelSpec, groups: Any) -> None:
    for keep in range(-1, spec.num_experts + 3):
        possible = routable(spec, keep, groups)
        assert (keep in valid_keeps(spec, groups)) == possible, keep
        if possible:
            check_keep(spec, keep, groups)
        else:
            with pytest.raises(InputError, match=f"cannot keep {keep} of") as error:
                check_keep(spec, keep, groups)
            assert "\n" not in str(error.value)


def test_deepseek_v3_numbers() -> None:
    assert valid_keeps(V3) == range(16, 257, 8)
    assert valid_keeps(V3, "flatten") == range(8, 257)


@pytest.mark.parametrize(
    ("keep", "groups", "message"),
    [
        (100, "keep", r"8 groups must stay of equal size; nearest: 96 or 104 .*--groups flatten"),
        (8, "keep", r"needs 2 experts, 1 would be left; nearest: 16 \(possible are 16 to 256"),
        (7, "flatten", r"chooses 8 experts for every token; nearest: 8 \("),
        (0, "keep", r"at least one expert must stay; nearest: 16"),
        (257, "keep", r"has 256 experts a layer; nearest: 256"),
    ],
)
def test_impossible_numbers_say_why_and_what_else(keep: int, groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_keep(V3, keep, groups)


def test_too_few_reachable_experts_are_named() -> None:
    spec = model(64, 8, n_group=8, topk_group=2)
    with pytest.raises(InputError, match=r"2 groups of 3, too few to choose 8 .*nearest: 32"):
        check_keep(spec, 24)


@pytest.mark.parametrize(
    ("spec", "ratio", "keep"),
    [
        (V3, 0.25, 192),
        (V3, 0.5, 128),
        (V3, 0.4, 152),  # 153.6, between 152 and 160
        (V3, 0.39, 160),  # 156.16 is nearer to 160
        (V3, 0.390625, 160),  # 156 is a tie: the larger
        (V3, 0, 256),
        (V3, 0.9375, 16),
        (V3, 0.95, 16),  # 12.8 rounds to 16
        (model(160, 8), 0.4, 96),
        (model(160, 8), 0.1, 144),  # binary 0.1 must not make it 143.99...
        (model(128, 8), 0.196, 103),
        (model(10, 2), 0.25, 8),  # 7.5: the larger
    ],
)
def test_ratio_is_the_share_removed(spec: ModelSpec, ratio: float, keep: int) -> None:
    assert resolve_keep(spec, ratio=ratio) == keep


@given(ratio=st.floats(0, 1, exclude_max=True), which=st.integers(0, len(SPECS) - 1))
@settings(max_examples=200, deadline=None)
def test_ratio_gives_the_nearest_possible_number_or_none(ratio: float, which: int) -> None:
    spec = SPECS[which]
    wanted = spec.num_experts * (1 - ratio)
    valid = valid_keeps(spec)
    if wanted < valid[0] - valid.step / 2 - 1e-9:
        with pytest.raises(InputError, match=f"nearest: {valid[0]}"):
            resolve_keep(spec, ratio=ratio)
    elif wanted > valid[0] - valid.step / 2 + 1e-9:
        keep = resolve_keep(spec, ratio=ratio)
        assert keep in valid
        assert abs(keep - wanted) <= min(abs(k - wanted) for k in valid) + 1e-9


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_a_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="not a share to remove"):
        resolve_keep(V3, ratio=ratio)


def test_a_ratio_that_leaves_too_few_is_refused() -> None:
    with pytest.raises(InputError, match=r"would keep 2\.56 of 256.*nearest: 16.*at most 0\.9375"):
        resolve_keep(V3, ratio=0.99)


def test_keep_and_ratio_exclude_each_other() -> None:
    for arguments in ({}, {"keep": 128, "ratio": 0.5}):
        with pytest.raises(InputError, match="exactly one of --keep"):
            resolve_keep(V3, **arguments)


# ---- which experts


def kept_by_loop(scores: list[float], keep: int, num_groups: int) -> tuple[int, ...]:
    """Drop one expert at a time: the worst, of equals the highest id, from the fullest groups."""
    size = len(scores) // num_groups
    kept: list[int] = []
    for group in range(num_groups):
        alive = list(range(group * size, (group + 1) * size))
        while len(alive) > keep // num_groups:
            alive.remove(min(alive, key=lambda e: (scores[e], -e)))
        kept += alive
    return tuple(kept)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_best_of_every_group_are_kept(data: st.DataObject) -> None:
    num_groups = data.draw(st.sampled_from([1, 2, 4]))
    size = data.draw(st.integers(1, 6))
    quota = data.draw(st.integers(1, size))
    values = st.sampled_from([-math.inf, 0.0, 0.5, 0.5, 1.0, 2.0]) | st.floats(0, 10)
    scores = data.draw(st.lists(values, min_size=num_groups * size, max_size=num_groups * size))
    kept = best_experts(torch.tensor(scores, dtype=torch.float64), num_groups * quota, num_groups)
    assert kept == kept_by_loop(scores, num_groups * quota, num_groups)


def test_ties_keep_the_lower_expert() -> None:
    assert best_experts(torch.zeros(6, dtype=torch.float64), 2) == (0, 1)
    dead = torch.tensor([-math.inf, 3.0, -math.inf, 1.0, -math.inf, 2.0], dtype=torch.float64)
    assert best_experts(dead, 4) == (0, 1, 3, 5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_plan_is_equal_in_count_and_survives_its_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = data.draw(st.sampled_from(SPECS))
    groups = data.draw(st.sampled_from(["keep", "flatten"]))
    keep = data.draw(st.sampled_from(valid_keeps(spec, groups)))
    criterion = data.draw(st.sampled_from(["reap", "frequency", "random", "max_norm"]))
    chance = st.floats(0, 5) | st.just(-1.0)  # -1: dead
    scores = {
        layer: data.draw(st.lists(chance, min_size=spec.num_experts, max_size=spec.num_experts))
        for layer in spec.scored_layers
    }
    stats = scored(spec, scores)
    plan = make_plan(stats, spec, keep=keep, criterion=criterion, groups=groups, seed=3)
    assert set(plan.layers) == set(spec.scored_layers)
    num_groups = spec.num_groups if groups == "keep" else 1
    size = spec.num_experts // num_groups
    for layer, kept in plan.layers.items():
        assert list(kept) == sorted(set(kept))
        assert sorted((*kept, *plan.dropped(layer))) == list(range(spec.num_experts))
        per_group = [sum(e // size == g for e in kept) for g in range(num_groups)]
        assert per_group == [keep // num_groups] * num_groups
        dead = {e for e, score in enumerate(scores[layer]) if score < 0}
        assert set(plan.dead_experts.get(layer, ())) == dead
        if criterion != "random":
            for g in range(num_groups):
                members = set(range(g * size, (g + 1) * size))
                if (members & dead) & set(kept):  # a dead one stays only if all living ones do
                    assert members - dead <= set(kept)
    assert plan.num_dead == sum(s < 0 for row in scores.values() for s in row)
    assert plan.num_dead_kept == sum(
        scores[y][e] < 0 for y, kept in plan.layers.items() for e in kept
    )
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    loaded = PrunePlan.load(path)
    loaded.validate(spec)
    assert loaded == plan


def test_hash_routed_and_dense_layers_are_not_in_the_plan() -> None:
    spec = model(num_layers=6, hash_layers=2)
    assert set(make_plan(scored(spec), spec, keep=8).layers) == {3, 4, 5}


def test_flatten_chooses_over_all_groups() -> None:
    spec = model(8, 2, num_layers=2, n_group=2, topk_group=1)
    stats = scored(spec, {1: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]})
    assert make_plan(stats, spec, keep=4).layers == {1: (2, 3, 6, 7)}
    assert make_plan(stats, spec, keep=4, groups="flatten").layers == {1: (4, 5, 6, 7)}


# ---- MTP


def test_mtp_layers_are_dropped_or_pruned_by_their_own_scores() -> None:
    spec = model(8, 2, num_layers=3, mtp="model.layers.{layer}.")
    own = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    stats = scored(spec, {3: own}, layers=(1, 2, 3))
    assert set(make_plan(stats, spec, keep=4).layers) == {1, 2}
    pruned = make_plan(stats, spec, keep=4, mtp="prune")
    assert pruned.layers[3] == (0, 1, 2, 3)
    assert set(pruned.layers) == {1, 2, 3}


def test_mtp_prune_without_its_scores_is_refused() -> None:
    spec = model(8, 2, num_layers=3, mtp="model.layers.{layer}.")
    with pytest.raises(InputError, match=r"nothing of MTP layer 3; .*--mtp drop"):
        make_plan(scored(spec), spec, keep=4, mtp="prune")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (model(mtp="mtp."), "outside the layer numbering.*--mtp drop"),
        (model(), "has no MTP layer; use --mtp drop"),
        (model(mtp="model.layers.{layer}.", num_mtp=0), "has no MTP layer"),
    ],
)
def test_mtp_prune_where_nothing_can_be_pruned_is_refused(spec: ModelSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(scored(spec), spec, keep=4, mtp="prune")


# ---- refusals


def test_scores_of_another_model_are_refused() -> None:
    spec = model(16, num_layers=4)
    with pytest.raises(InputError, match="scores are of 8 experts a layer, the model has 16"):
        make_plan(scored(model(8)), spec, keep=4)
    with pytest.raises(InputError, match="nothing of layer 3"):
        make_plan(scored(spec, layers=(1, 2)), spec, keep=4)
    with pytest.raises(InputError, match="layer 7, which is no scored layer"):
        make_plan(scored(spec, layers=(1, 2, 3, 7)), spec, keep=4)


def test_unknown_words_are_refused() -> None:
    spec = model()
    stats = scored(spec)
    with pytest.raises(InputError, match="no criterion"):
        make_plan(stats, spec, keep=4, criterion="best")
    with pytest.raises(InputError, match="--groups maybe"):
        make_plan(stats, spec, keep=4, groups="maybe")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--mtp maybe"):
        make_plan(stats, spec, keep=4, mtp="maybe")  # type: ignore[arg-type]


def test_nan_saliency_is_refused() -> None:
    spec = model()
    stats = scored(spec)
    stats.layers[2].sums.weighted_norm_sum[0, 5] = math.nan
    with pytest.raises(InputError, match="layer 2: reap of expert 5 is nan"):
        make_plan(stats, spec, keep=4)


def good_plan() -> tuple[ModelSpec, PrunePlan]:
    spec = model(8, 2, num_layers=3, n_group=2, topk_group=1)
    return spec, make_plan(scored(spec), spec, keep=4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({1: (0, 1, 4, 5)}, "layer 2 is in one of them only"),
        ({1: (0, 1, 4, 5), 2: (0, 1, 4)}, "layer 2: 2, 1 experts are kept"),
        ({1: (0, 1, 2, 4), 2: (0, 1, 4, 5)}, "layer 1: 3, 1 experts .* 2 of each"),
        ({1: (1, 0, 4, 5), 2: (0, 1, 4, 5)}, "layer 1: .*ascending"),
        ({1: (0, 0, 4, 5), 2: (0, 1, 4, 5)}, "layer 1: .*distinct"),
        ({1: (0, 1, 4, 8), 2: (0, 1, 4, 5)}, r"layer 1: .*within 0\.\.7"),
        ({1: (-1, 1, 4, 5), 2: (0, 1, 4, 5)}, r"layer 1: .*within 0\.\.7"),
    ],
)
def test_validate_refuses_plans_that_cannot_be_carried_out(
    layers: dict[int, tuple[int, ...]], message: str
) -> None:
    spec, plan = good_plan()
    with pytest.raises(InputError, match=message) as error:
        dataclasses.replace(plan, layers=layers).validate(spec)
    assert "\n" not in str(error.value)


def test_validate_refuses_a_plan_of_another_size() -> None:
    spec, plan = good_plan()
    with pytest.raises(InputError, match="for 16 experts a layer, the model has 8"):
        dataclasses.replace(plan, num_experts=16).validate(spec)
    with pytest.raises(InputError, match="cannot keep 3 of 8"):
        dataclasses.replace(plan, keep=3).validate(spec)


# ---- the file


def test_the_file_is_the_contracts(tmp_path: Path) -> None:
    spec = model(8, 2, num_layers=3, n_group=2, topk_group=1)
    stats = scored(spec, {1: [3.0, 2.0, -1.0, 1.0, 9.0, 8.0, 7.0, 6.0]})
    make_plan(stats, spec, keep=4).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == "thresher.plan/1"
    assert (content["criterion"], content["num_experts"], content["keep"]) == ("reap", 8, 4)
    assert content["layers"]["1"] == [0, 1, 4, 5]
    assert list(content["layers"]) == ["1", "2"]
    assert content["dead_experts"] == {"1": [2]}
    assert content["saliency_sha256"] == stats.digest()
    assert content["model_digest"] == "d1"
    assert (content["groups"], content["mtp"], content["seed"]) == ("keep", "drop", 0)
    first = (tmp_path / "plan.json").read_bytes()
    make_plan(stats, spec, keep=4).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_with_the_contracts_keys_alone_is_read(tmp_path: Path) -> None:
    spec, _ = good_plan()
    minimal = {
        "format": "thresher.plan/1",
        "criterion": "by hand",
        "num_experts": 8,
        "keep": 4,
        "layers": {"1": [0, 1, 4, 5], "2": [2, 3, 6, 7]},
    }
    (tmp_path / "plan.json").write_text(json.dumps(minimal))
    plan = PrunePlan.load(tmp_path / "plan.json")
    plan.validate(spec)
    assert plan.layers == {1: (0, 1, 4, 5), 2: (2, 3, 6, 7)}
    assert plan.ratio == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "thresher.plan/2"}, "not of format"),
        ({"keep": "4"}, "keep is missing or wrong"),
        ({"layers": [1]}, "layers is missing or wrong"),
        ({"layers": {"one": [1]}}, "layers must map"),
        ({"layers": {"1": [0.5]}}, "layers must map"),
        ({"layers": {"1": 3}}, "layers must map"),
        ({"groups": "some"}, "groups is 'some', known are keep, flatten"),
        ({"mtp": True}, "mtp is True"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    _, plan = good_plan()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json() | change))
    with pytest.raises(InputError, match=message) as error:
        PrunePlan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_torn_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give a plan\.json"):
        PrunePlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"format": "thresher.pl')
    with pytest.raises(InputError, match="not JSON"):
        PrunePlan.load(tmp_path / "plan.json")
