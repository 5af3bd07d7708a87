"""card: facts that could be told wrongly. Whose KL, on which tokens, corrected or not, how many
bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import run
from evals.card import CardSettings, card, hub_datasets
from evals.card_tables import variants
from evals.evidence import Evidence, gather
from tests.cli.models import model, token_file

SETTINGS = CardSettings(base_model="owner/base")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `m` and `another`; `p` is `m` pruned by scores of t and repaired by r, its MTP layer
    kept; `s2` are scores of r; evaluations of p by their tokens, `e-another` against `another`."""
    root = tmp_path_factory.mktemp("card")
    model(root / "m")
    model(root / "another", seed=1)
    lengths = {"t": (24, 7, 16, 11, 20, 9), "r": (9, 12, 8, 14, 10, 6, 7, 9), "h": (12,) * 12}
    files = {name: str(token_file(root / name, lengths=own)) for name, own in lengths.items()}

    def done(*arguments: object) -> None:
        assert run([*map(str, arguments), "--quiet"]) == 0

    done("score", root / "m", "--tokens", files["t"], "-o", root / "s")
    done("score", root / "m", "--tokens", files["r"], "-o", root / "s2")
    repair = ["--repair", "scales", "--repair-tokens", files["r"], "--mtp", "prune"]
    done("prune", root / "m", "--scores", root / "s", "--ratio", "0.5", *repair, "-o", root / "p")
    for name, file in files.items():
        judged = ["eval", root / "p", "--tokens", file, "-o", root / f"e-{name}"]
        done(*judged, "--reference", root / "m")
    judged = ["eval", root / "p", "--tokens", files["h"], "-o", root / "e-another"]
    done(*judged, "--reference", root / "another")
    return root


def gathered(root: Path, *names: str) -> Evidence:
    return gather(root / "p", evaluations=[root / name for name in names])


def test_the_reference_is_named_where_it_is_not_the_base_model(root: Path) -> None:
    text = card(gathered(root, "e-h"), SETTINGS)
    assert "KL divergence from the base model" in text
    assert "KL(base ‖ this)" in text
    text = card(gathered(root, "e-another"), SETTINGS)
    assert "KL divergence from another" in text
    assert "The reference is another, not the base model." in text
    assert "base model's" not in text
    assert "| base |" not in text


def test_variants_share_tokens_and_reference(root: Path) -> None:
    assert variants(gathered(root, "e-h", "e-another"), {}) == ""
    assert variants(gathered(root, "e-h", "e-r"), {}) == ""
    evidence = gathered(root, "e-h", "e-h")
    assert "### Variants" in variants(evidence, {})
    # other tokens of the same mix, seed and counts
    first, second = evidence.judged
    other = replace(evidence, judged=(first, replace(second, tokens_digest="0" * 64)))
    assert variants(other, {}) == ""


@pytest.mark.parametrize("seen", ["t", "r"])
def test_tokens_that_shaped_it_are_not_called_held_out(root: Path, seen: str) -> None:
    text = card(gathered(root, "e-h"), SETTINGS)
    assert "Held-out tokens: `by hand`" in text
    assert "Nothing was measured on held-out text" not in text
    text = card(gathered(root, f"e-{seen}"), SETTINGS)
    assert "Tokens that it was calibrated on (not held out): `by hand`" in text
    assert "tokens that it was calibrated on (not held out) its perplexity" in text
    assert "Nothing was measured on held-out text" in text
    assert "eld-out tokens" not in text


def test_a_repair_is_told(root: Path) -> None:
    evidence = gathered(root, "e-h")
    text = card(evidence, SETTINGS)
    assert "the source's own bytes but for corrected experts" in text
    assert "kept experts were corrected toward the original's output (`scales`)" in text
    steps = tuple({k: v for k, v in step.items() if k != "repair"} for step in evidence.steps)
    assert "corrected" not in card(replace(evidence, steps=steps), SETTINGS)


def test_bits_are_of_the_parameters_that_are_counted(root: Path) -> None:
    evidence = gathered(root, "e-h")
    assert evidence.facts.num_bytes > 1.1 * evidence.facts.counted_bytes  # the MTP layer
    assert "| Bits a parameter | 16.00 |" in card(evidence, SETTINGS)


def test_files_are_no_data_sets_of_the_hub(root: Path) -> None:
    report = [
        {"source": name, "used": 1, "read": 1, "truncated": 0}
        for name in ("data/rows.jsonl", "data/rows.parquet", "owner/set", "evol-codealpaca-v1")
    ]
    evidence = gathered(root, "e-h")
    assert evidence.calibration is not None
    evidence = replace(evidence, calibration={**evidence.calibration, "report": report})
    assert hub_datasets(evidence) == ["owner/set", "theblackcat102/evol-codealpaca-v1"]


def test_scores_of_another_run_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["card", str(root / "p"), "--no-pictures", "--json"]
    assert run([*asked, "--scores", str(root / "s2")]) == 2
    assert "other scores than" in capsys.readouterr().err
    assert run([*asked, "--scores", str(root / "s")]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["README.md"]
