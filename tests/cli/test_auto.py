"""--criterion auto takes the plan whose written checkpoint is nearest to the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.tokens import TokenSet
from cli.auto import best_plan
from cli.prune import prune
from evals.fidelity import EvalSettings, evaluate
from models.errors import InputError
from models.opening import open_model
from reap.criteria import CRITERIA
from reap.damage_file import DamageStats
from reap.plan import PrunePlan, make_plan
from reap.prune import prune_checkpoint
from reap.score import ScoreSettings, score
from reap.stats import SaliencyStats
from tests.reap.brute_force import write_model
from tests.token_sets import random_token_set

SETTINGS = EvalSettings(batch_tokens=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model scored with damage statistics, and held-out tokens."""
    folder = tmp_path_factory.mktemp("auto")
    write_model("qwen3_moe", folder / "model")
    tokens = random_token_set(128, (40,) * 6, (0, 1) * 3)
    settings = ScoreSettings(batch_tokens=128, damage_tokens=200)
    score(folder / "model", tokens, folder / "scores", settings)
    held = random_token_set(128, (40,) * 4, (0, 1) * 2, seed=5)
    held.save(folder / "held.safetensors")
    return folder


def asked(keep: int) -> dict[str, object]:
    return {"keep": keep, "ratio": None, "mtp": "drop", "groups": "keep", "seed": 0}


def test_the_least_measured_kl_is_chosen_and_is_that_of_the_written_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    opened = open_model(folder / "model")
    held = TokenSet.load(folder / "held.safetensors")
    stats, damage = SaliencyStats.load(folder / "scores"), DamageStats.load(folder / "scores")
    plan = best_plan(stats, damage, opened, held, folder / "scores", asked(8), settings=SETTINGS)
    measured = plan.evidence["measured"]
    assert set(measured) == {*CRITERIA, "output-error"} - {"random"}
    for name in ("reap", "frequency", "output-error"):
        own = make_plan(stats, opened.spec, keep=8, criterion=name, damage=damage)
        prune_checkpoint(opened.source, own, tmp_path / name)
        found = evaluate(tmp_path / name, held, SETTINGS, reference=folder / "model")
        assert measured[name]["kl"] == pytest.approx(found["kl"], rel=1e-6)
        assert measured[name]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    chosen = plan.evidence["chosen"]
    assert measured[chosen]["kl"] == min(entry["kl"] for entry in measured.values())
    best = make_plan(stats, opened.spec, keep=8, criterion=chosen, damage=damage)
    assert plan.layers == best.layers
    assert plan.criterion == "auto"


def test_without_damage_statistics_the_table_is_judged(folder: Path) -> None:
    opened = open_model(folder / "model")
    held = TokenSet.load(folder / "held.safetensors")
    stats = SaliencyStats.load(folder / "scores")
    everything = asked(opened.spec.num_experts)  # all plans are one: judged once, and no loss
    plan = best_plan(stats, None, opened, held, folder / "scores", everything, settings=SETTINGS)
    assert set(plan.evidence["measured"]) == set(CRITERIA) - {"random"}
    assert {entry["kl"] for entry in plan.evidence["measured"].values()} == {0.0}
    again = best_plan(stats, None, opened, held, folder / "scores", everything, settings=SETTINGS)
    assert again == plan


def test_the_command_records_what_it_measured(folder: Path, tmp_path: Path) -> None:
    command = [
        str(folder / "model"), "--scores", str(folder / "scores"), "--keep", "12",
        "--plan-only", "-o", str(tmp_path / "out"), "--quiet", "--criterion",
    ]  # fmt: skip
    with pytest.raises(InputError, match="--tokens"):
        prune.main([*command, "auto"], standalone_mode=False)
    held = ["--tokens", str(folder / "held.safetensors")]
    with pytest.raises(InputError, match="only with it"):
        prune.main([*command, "reap", *held], standalone_mode=False)
    with pytest.raises(InputError, match="output-error, auto"):
        prune.main([*command, "best", *held], standalone_mode=False)
    prune.main([*command, "auto", *held], standalone_mode=False)
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert content["criterion"] == "auto"
    assert content["evidence"]["chosen"] in content["evidence"]["measured"]
    loaded = PrunePlan.load(tmp_path / "out" / "plan.json")
    assert loaded.to_json() == content
    how = [*command, "auto", *held, "--dtype", "float32", "--batch-tokens", "64", "--force"]
    prune.main(how, standalone_mode=False)
    jobs = [
        json.loads(file.read_bytes())["job"]
        for file in (folder / "scores" / "auto").glob("*/thresher.json")
    ]
    assert any(
        set(job["dtype"].values()) == {"torch.float32"} and job["batch_tokens"] == 64
        for job in jobs
    )
