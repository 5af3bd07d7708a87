"""Bits by damage: the choice is the best there is, its bytes are those of the files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

import quant.budget
from models.errors import InputError
from models.opening import open_model
from quant.budget import Menu, Part, check_budget, least_damage, menu_of, recipe_text, share_out
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings, plan_quantization
from quant.recipe_files import load_recipe
from quant.schemes import SCHEMES, Scheme, scheme_with
from tests.tiny import tiny_model

SETTINGS = QuantizeSettings(method="rtn")


def small(*names: str) -> list[Scheme]:
    return [scheme_with(name, group_size=8) for name in names]


def menu(family: str, folder: Path) -> tuple[Path, Menu]:
    model = tiny_model(family, folder, dtype="bfloat16")
    return model, menu_of(open_model(model), small("W8A16", "W3A16", "W4A16"), SETTINGS)


def some_damage(menu: Menu, seed: int = 0) -> dict[Part, tuple[float, ...]]:
    chance = random.Random(seed)
    return {
        part: tuple(sorted((chance.random() ** 4 for _ in menu.schemes), reverse=True))
        for part in menu.measured
    }


@pytest.mark.parametrize("seed", range(30))
def test_no_other_choice_is_better(seed: int) -> None:
    """Against every choice there is, with noise that makes more bytes worse, and ties."""
    chance = random.Random(seed)
    options = [
        [(chance.randint(1, 40), chance.choice((0.0, chance.random()))) for _ in range(3)]
        for _ in range(chance.randint(1, 7))
    ]
    least = sum(min(size for size, _ in own) for own in options)
    room = least + chance.randint(0, 100)
    fitting = [
        (sum(harm for _, harm in chosen), sum(size for size, _ in chosen))
        for chosen in itertools.product(*options)
        if sum(size for size, _ in chosen) <= room
    ]
    found = [own[index] for own, index in zip(options, least_damage(options, room), strict=True)]
    damage, size = (sum(one[at] for one in found) for at in (1, 0))
    assert size <= room
    assert damage == pytest.approx(min(fitting)[0])


def test_thinned_it_is_nearly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """183 parts of uneven sizes: within a thousandth of what exact search over more states finds,
    and of the bound that a fractional knapsack gives."""
    chance = random.Random(1)
    options = []
    for _ in range(183):
        size, harm = chance.randint(10**6, 10**9), chance.random() ** 3
        options.append([(3 * size, harm), (4 * size, harm / 4), (8 * size, harm / 900)])
    least = sum(own[0][0] for own in options)
    room = least * 6 // 5
    monkeypatch.setattr(quant.budget, "STATES", 1 << 12)
    found = least_damage(options, room)
    assert sum(own[i][0] for own, i in zip(options, found, strict=True)) <= room
    damage = sum(own[i][1] for own, i in zip(options, found, strict=True))
    # the bound: steps along each convex hull by gain a byte, the last one cut where room ends
    steps = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0])
        for own in options
        for a, b in itertools.pairwise(own)
    )
    left, bound = room - least, sum(own[0][1] for own in options)
    while left > 0:
        gain, size = steps.pop()
        bound -= gain * min(size, left)
        left -= size
    assert bound <= damage <= bound * 1.01


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v32", "glm4_moe", "qwen3_5_moe"])
def test_planned_bytes_are_those_of_the_files(family: str, tmp_path: Path) -> None:
    model, found = menu(family, tmp_path / "model")
    assert [scheme.name for scheme in found.schemes] == ["W3A16", "W4A16", "W8A16"]
    opened = open_model(model)
    for share in (0.0, 0.3, 0.8):
        budget = found.smallest + int(share * (found.largest - found.smallest))
        chosen = share_out(found, some_damage(found), budget)
        recipe = tmp_path / f"{share}.yaml"
        recipe.write_text(recipe_text(found, chosen, "rtn"))
        plan = plan_quantization(opened, load_recipe(recipe), SETTINGS)
        for part, index in chosen.items():
            assert {plan.schemes[one.module] for one in found.parts[part]} == {found.schemes[index]}
        assert plan.shards.total_size == found.size(chosen) <= budget
        assert all(chosen[part] == 0 for part in found.parts if part not in found.measured)
    quantize(opened, load_recipe(recipe), tmp_path / "out", SETTINGS)
    stored = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert stored == found.size(chosen)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == stored


def test_presets_of_other_kinds_are_named_in_the_recipe(tmp_path: Path) -> None:
    wide = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 128)
    model = tiny_model("qwen3_moe", tmp_path / "m", dtype="bfloat16", head_dim=32, **wide)
    schemes = [SCHEMES["NVFP4A16"], SCHEMES["FP8_DYNAMIC"]]
    found = menu_of(open_model(model), schemes, SETTINGS)
    chosen = share_out(found, some_damage(found), (found.smallest + found.largest) // 2)
    assert len(set(chosen.values())) == 2
    (tmp_path / "r.yaml").write_text(recipe_text(found, chosen, "gptq"))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert {rule.method for rule in recipe.rules} == {"gptq"}
    plan = plan_quantization(open_model(model), recipe, SETTINGS)
    assert {scheme for scheme in plan.schemes.values() if scheme} == set(schemes)


def test_what_is_refused(tmp_path: Path) -> None:
    model, found = menu("qwen3_moe", tmp_path / "model")
    check_budget(found, found.smallest)
    with pytest.raises(InputError, match=f"takes {found.smallest:,} bytes"):
        check_budget(found, found.smallest - 1)
    opened = open_model(model)
    with pytest.raises(InputError, match="two or more"):
        menu_of(opened, small("W3A16", "W3A16"), SETTINGS)
    with pytest.raises(InputError, match="--format gptq"):
        menu_of(opened, small("W3A16", "W4A16"), QuantizeSettings(layout="gptq"))
    with pytest.raises(InputError, match="K = 48"):  # no groups of 128
        menu_of(opened, [SCHEMES["W3A16"], SCHEMES["W4A16"]], SETTINGS)
