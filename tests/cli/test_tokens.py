"""thresher tokens: balance, truncation, held-out sets and the report; prune by domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.tokens import TokenSet
from cli.main import run
from tests.cli.models import model, token_file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows of two kinds, and a mix file of them."""
    root = tmp_path_factory.mktemp("tokens")
    model(root / "m")
    for name, text in (("short", "a few words {}"), ("long", "{} and many more words than that")):
        rows = [{"text": text.format(n)} for n in range(60)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mix.yaml").write_text(
        "balance: domains\ntruncate: middle\nmax_length: 64\ncomponents:\n"
        "- {source: short.jsonl, rows: 20}\n- {source: long.jsonl, rows: 20}\n"
    )
    return root


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*map(str, arguments), "--json", "--quiet"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run([*map(str, arguments), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_both_shares_are_told(root: Path, tmp_path: Path, capsys: Any) -> None:
    spec = f"{root / 'short.jsonl'}:20,{root / 'long.jsonl'}:20"
    facts = called(capsys, "tokens", root / "m", "--mix", spec, "-o", tmp_path / "t.safetensors")
    assert [d["share_of_samples"] for d in facts["by_domain"].values()] == [0.5, 0.5]
    assert facts["by_domain"]["long"]["share_of_tokens"] > 0.6
    assert "heldout" not in facts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.safetensors"]


def test_yaml_says_how_and_options_win(root: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.safetensors"
    arguments = ("tokens", root / "m", "--mix", root / "mix.yaml", "-o", out)
    facts = called(capsys, *arguments)
    assert facts["by_domain"]["long"]["share_of_tokens"] == pytest.approx(0.5, abs=0.05)
    assert TokenSet.load(out).notes["truncate"] == "middle"
    facts = called(capsys, *arguments, "--force", "--balance", "rows", "--truncate", "cut")
    assert facts["by_domain"]["long"]["samples"] == 20
    assert TokenSet.load(out).notes["truncate"] == "cut"


def test_heldout_and_report_beside_it(root: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.safetensors"
    arguments = ["tokens", root / "m", "--mix", root / "mix.yaml", "-o", out]
    arguments += ["--holdout", 6, "--report"]
    facts = called(capsys, *arguments)
    apart = TokenSet.load(tmp_path / "t.heldout.safetensors")
    assert len(apart) == facts["heldout"]["samples"] == 6
    assert not {tuple(row.tolist()) for row in apart} & {
        tuple(row.tolist()) for row in TokenSet.load(out)
    }
    assert [Path(page).name for page in facts["pages"]] == ["t.html", "t.png"]
    assert (tmp_path / "t.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    out.unlink()
    assert "t.heldout.safetensors exists; choose another name" in refused(capsys, *arguments)
    assert run([*map(str, arguments), "--force", "--quiet"]) == 0
    told = capsys.readouterr().out
    for words in ("median", "ids occur", "--- short, as the model sees it", "a few words"):
        assert words in told


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_page_never_replaces_the_tokens(
    root: Path, tmp_path: Path, capsys: Any, suffix: str
) -> None:
    out = tmp_path / f"t{suffix}"
    arguments = ("tokens", root / "m", "--mix", root / "mix.yaml", "-o", out)
    told = refused(capsys, *arguments, "--report", "--force")
    assert f"{out} is the name of a page of --report; end -o in .safetensors" in told
    assert not list(tmp_path.iterdir())
    called(capsys, *arguments)
    assert len(TokenSet.load(out)) == 40


def test_the_same_command_writes_the_same_bytes(root: Path, tmp_path: Path, capsys: Any) -> None:
    written = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        mix = ("--mix", root / "mix.yaml", "--holdout", 4, "--seed", 5)
        called(capsys, "tokens", root / "m", *mix, "-o", out)
        written.append((out.read_bytes(), (tmp_path / f"{name}.heldout.safetensors").read_bytes()))
    assert written[0] == written[1]


def test_wrong_mix_files_are_one_line(root: Path, tmp_path: Path, capsys: Any) -> None:
    for text, says in (
        ("balance: evenly", "balance is 'evenly'; known are rows, tokens, domains"),
        ("truncate: head", "truncate is 'head'; known are tail, middle, cut"),
        ("balanced: rows", "unknown keys ['balanced']"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(f"{text}\ncomponents: [{{source: offline}}]\n")
        told = refused(capsys, "tokens", root / "m", "--mix", path, "-o", tmp_path / "t")
        assert says in told


def test_prune_by_domain(root: Path, tmp_path: Path, capsys: Any) -> None:
    scores = tmp_path / "s"
    token_file(tmp_path / "t.safetensors")
    tokens = ("--tokens", tmp_path / "t.safetensors")
    called(capsys, "score", root / "m", *tokens, "-o", scores)
    arguments = ["prune", root / "m", "--scores", scores, "--ratio", 0.5, "--plan-only", "-o"]
    called(capsys, *arguments, tmp_path / "plain")
    facts = called(
        capsys, *arguments, tmp_path / "weighted", "--weights", "code=2,tools=0.5",
        "--protect", "code:0.25",
    )  # fmt: skip
    assert facts["weights"] == {"code": 2.0, "tools": 0.5}
    plan = json.loads((tmp_path / "weighted" / "plan.json").read_text())
    assert plan["weights"] == {"code": 2.0, "tools": 0.5}
    assert set(plan["protect"]) == {"code"}
    assert "weights" not in json.loads((tmp_path / "plain" / "plan.json").read_text())
    for option, value, says in (
        ("--weights", "code", "'code' is not a domain and its number, such as code=2"),
        ("--weights", "code=1,code=2", "name each domain once"),
        ("--weights", "math=1", "no domain 'math' was scored; the domains are code, tools"),
        ("--protect", "code=1", "such as code:2"),
    ):
        assert says in refused(capsys, *arguments, tmp_path / "x", option, value)
