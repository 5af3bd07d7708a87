"""Two stored runs compared: figures from their files, refusals of what does not match."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
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
    shares = shares_of_loss(first, second)
    for group in ("all", "code", "tools"):
        one, two = (r if group == "all" else r["by_domain"][group] for r in results.values())
        assert shares[group]["kl"] == pytest.approx(two["kl"])
        assert shares[group]["first"] == pytest.approx(one["kl"] / two["kl"])
        assert shares[group]["first"] + shares[group]["second"] == pytest.approx(1)
        low, high = shares[group]["interval"]
        assert low <= shares[group]["second"] <= high
    elsewhere = read_run(runs / "elsewhere")
    with pytest.raises(InputError, match="--reference"):
        shares_of_loss(elsewhere, elsewhere)


def stored(folder: Path, rows: list[dict[str, Any]], **job: Any) -> Path:
    """A run's folder written by hand."""
    folder.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = "items.jsonl" if "item" in rows[0] else "samples.jsonl"
    (folder / name).write_text(lines, encoding="utf-8")
    (folder / "thresher.json").write_text(json.dumps({"job": job}))
    return folder


def samples(factor: float, domains: tuple[str, ...] = ("code",)) -> list[dict[str, Any]]:
    """30 samples whose KL is `factor` times uneven ones."""
    return [
        {
            "sample": i, "domain": domains[i % len(domains)], "tokens": 10, "nll": 20.0 + i,
            "kl": factor * (1 + i * i), "agree": 7,
        }
        for i in range(30)
    ]  # fmt: skip


def test_a_share_that_is_the_same_in_every_sample_is_certain(tmp_path: Path) -> None:
    runs = [read_run(stored(tmp_path / f"{k}", samples(k), tokens="t")) for k in (1, 2)]
    share = shares_of_loss(*runs)["all"]
    assert share["second"] == pytest.approx(0.5)
    assert share["interval"] == pytest.approx([0.5, 0.5])


def test_distances_to_different_references_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, k in (("a", 1), ("b", 2)):
        job = {"tokens": "t", "models": {"model": "m", "reference": name}}
        runs.append(stored(tmp_path / name, samples(k), **job))
    first, second = map(read_run, runs)
    found = compare_runs(first, second)
    assert set(found["groups"]["all"]) == {"perplexity", "nll"}
    assert found["left_out"] == ["kl", "top1_agreement"]
    with pytest.raises(InputError, match="different models"):
        shares_of_loss(first, second)
    assert run(["compare", *map(str, runs)]) == 0
    assert "different references" in capsys.readouterr().out


def test_four_samples_make_nothing_certain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each alone in its domain: no interval, no star."""
    runs = []
    for k in (1, 2):
        rows = [{**row, "domain": f"d{row['sample']}"} for row in samples(k)[:4]]
        runs.append(stored(tmp_path / f"{k}", rows))
    assert run(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines if line.startswith("all ")] == [
        ["too", "few", "samples"]
    ] * 4
    assert not any(line.endswith("*") for line in lines)


def test_a_domain_may_not_be_named_as_the_total(tmp_path: Path) -> None:
    one = read_run(stored(tmp_path / "a", samples(1, ("all", "code"))))
    with pytest.raises(InputError, match="named `all`"):
        compare_runs(one, one)
    alone = read_run(stored(tmp_path / "b", samples(1, ("all",))))
    assert set(compare_runs(alone, alone)["groups"]) == {"all"}
    tokens = replace(random_token_set(32), domains=["code", "all"])
    model = tiny_model("olmoe", tmp_path / "m")
    with pytest.raises(InputError, match="named `all`"):
        evaluate(model, tokens, EvalSettings())


def test_answers_may_hold_other_line_ends(tmp_path: Path) -> None:
    rows = [{"item": f"i{n}", "score": n % 2, "answer": "a\u2028b\u0085c\u2029"} for n in range(6)]
    one = read_run(stored(tmp_path / "a", rows))
    assert list(one.rows) == [f"i{n}" for n in range(6)]
    assert one.rows["i0"]["answer"] == "a\u2028b\u0085c\u2029"


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
