"""Two stored runs compared: figures from their files, refusals of what does not match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.comparison import compare_runs, read_run, shares_of_loss
from evals.fidelity import EvalSettings, evaluate, evaluate_all
from models.errors import InputError
from tests.tiny import tiny_model
from tests.token_sets import random_token_set


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    models = {name: tiny_model("olmoe", root / name, seed=i) for i, name in enumerate("abc")}
    tokens = random_token_set(32, lengths=(9, 8, 7, 6) * 4, domains=(0, 1) * 8)
    settings = EvalSettings(batch_tokens=64)
    evaluate_all(
        {"b": models["b"], "c": models["c"]}, tokens, settings,
        reference=models["a"], out=root / "both",
    )  # fmt: skip
    evaluate(models["b"], tokens, settings, reference=models["a"], out=root / "one")
    evaluate(models["b"], random_token_set(32), settings, out=root / "elsewhere")
    return root


def test_figures_are_those_of_the_evaluations(runs: Path) -> None:
    results = json.loads((runs / "both" / "evaluation.json").read_text())
    first, second = (read_run(runs / "both" / f"samples-{name}.jsonl") for name in "bc")
    found = compare_runs(first, second)
    assert found["samples"] == 16
    for group in ("all", "code", "tools"):
        wanted = {n: r if group == "all" else r["by_domain"][group] for n, r in results.items()}
        for figure in ("perplexity", "nll", "kl", "top1_agreement"):
            got = found["groups"][group][figure]
            assert got["first"] == pytest.approx(wanted["b"][figure], rel=1e-9)
            assert got["second"] == pytest.approx(wanted["c"][figure], rel=1e-9)
            assert got["difference"] == pytest.approx(got["second"] - got["first"], rel=1e-9)
            assert got["interval"][0] <= got["difference"] <= got["interval"][1]


def test_the_shares_of_two_steps_are_those_of_their_kl(runs: Path) -> None:
    results = json.loads((runs / "both" / "evaluation.json").read_text())
    first, second = (read_run(runs / "both" / f"samples-{name}.jsonl") for name in "bc")
    shares = shares_of_loss(compare_runs(first, second))
    for group in ("all", "code", "tools"):
        one, two = (r if group == "all" else r["by_domain"][group] for r in results.values())
        assert shares[group]["kl"] == pytest.approx(two["kl"])
        assert shares[group]["first"] == pytest.approx(one["kl"] / two["kl"])
        assert shares[group]["first"] + shares[group]["second"] == pytest.approx(1)
        low, high = shares[group]["interval"]
        assert low <= shares[group]["second"] <= high
    elsewhere = read_run(runs / "elsewhere")
    with pytest.raises(InputError, match="--reference"):
        shares_of_loss(compare_runs(elsewhere, elsewhere))


def test_a_run_against_itself(runs: Path) -> None:
    one = read_run(runs / "one")
    same = read_run(runs / "both" / "samples-b.jsonl")
    for figure in compare_runs(one, same)["groups"]["all"].values():
        assert figure["difference"] == pytest.approx(0, abs=1e-9)
        assert figure["interval"] == pytest.approx([0, 0], abs=1e-9)


def test_refusals(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different data"):
        compare_runs(read_run(runs / "one"), read_run(runs / "elsewhere"))
    with pytest.raises(InputError, match=r"samples-b\.jsonl"):
        read_run(runs / "both")
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1"):
        read_run(tmp_path)
    part = tmp_path / "part.jsonl"
    part.write_text("".join((runs / "one" / "samples.jsonl").read_text().splitlines(True)[:5]))
    with pytest.raises(InputError, match="cover"):
        compare_runs(read_run(part), read_run(runs / "one"))
