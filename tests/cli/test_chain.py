"""tokens, score, prune and eval as programs: files, streams, resuming."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from cli.main import run
from tests.cli.command import start, thresher
from tests.cli.models import model, token_file
from tests.tiny import read_all


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3.2 `m` and a token set `t.safetensors`."""
    root = tmp_path_factory.mktemp("chain")
    model(root / "m")
    token_file(root / "t.safetensors")
    return root


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """Run a command that succeeds: its JSON and what it said on stderr."""
    capsys.readouterr()
    code = run([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.count("\n") == 1
    return json.loads(captured.out), captured.err


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def scored(root: Path) -> Path:
    arguments = ["score", root / "m", "--tokens", root / "t.safetensors", "-o", root / "scores"]
    assert run([*map(str, arguments), "--quiet"]) == 0
    return root / "scores"


def test_tokens_are_the_contracts_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "def add(a, b):\n    return a + b"}, {"text": "x = 1"}]
    mix = tmp_path / "rows.jsonl"
    mix.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "t.safetensors"
    facts, err = called(
        capsys, "tokens", root / "m", "--mix", f"{mix}:2", "--max-length", 20, "-o", out
    )
    assert "samples" in err
    with safe_open(out, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert sorted(tensors) == ["domain", "input_ids", "offsets"]
    assert metadata["mix"] == f"{mix}:2"
    assert metadata["seed"] == "0"
    assert len(metadata["tokenizer_sha256"]) == 64
    assert facts["samples"] == 2
    assert facts["tokens"] == len(tensors["input_ids"]) == 20 + 5  # one token a character, cut
    assert facts["report"][0]["truncated"] == 1


def test_score_says_what_it_scored(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ("--tokens", root / "t.safetensors")
    facts, err = called(capsys, "score", root / "m", *tokens, "-o", tmp_path / "s")
    assert "layers" in err
    assert facts["tokens"] == 24 + 7 + 16 + 11
    assert facts["tokens_by_domain"] == {"code": 40, "tools": 18}
    assert facts["sha256"] == sha256(tmp_path / "s" / "saliency.safetensors")
    # again: nothing to do, nothing changes
    again, _ = called(capsys, "score", root / "m", *tokens, "-o", tmp_path / "s")
    assert again == facts


def test_mix_is_kept_beside_the_scores(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = ("--mix", "offline", "--samples", 3, "--max-length", 32)
    facts, _ = called(capsys, "score", root / "m", *mix, "-o", tmp_path / "s")
    kept = tmp_path / "s" / "tokens.safetensors"
    other, _ = called(capsys, "score", root / "m", "--tokens", kept, "-o", tmp_path / "other")
    assert other["sha256"] == facts["sha256"]
    again, _ = called(capsys, "score", root / "m", *mix, "-o", tmp_path / "s")
    assert again == facts


def test_quiet_is_quiet(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ("--tokens", root / "t.safetensors")
    _, err = called(capsys, "score", root / "m", *tokens, "-o", tmp_path / "s", "--quiet")
    assert err == ""


def test_prune_then_eval(
    root: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((root / "m" / "config.json").read_text())
    half = config["n_routed_experts"] // 2
    pruned = tmp_path / "p"
    facts, _ = called(capsys, "prune", root / "m", "--scores", scored, "--ratio", 0.5, "-o", pruned)
    assert facts["keep"] == half
    stored = read_all(pruned).values()
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in stored)
    assert json.loads((pruned / "config.json").read_text())["n_routed_experts"] == half
    assert json.loads((pruned / "plan.json").read_text())["keep"] == half
    tokens = ("--tokens", root / "t.safetensors")
    lost, err = called(capsys, "eval", pruned, "--reference", root / "m", *tokens)
    assert set(lost) >= {
        "tokens", "nll", "perplexity", "by_domain", "reference", "kl", "kl_p99", "top1_agreement",
    }  # fmt: skip
    assert lost["tokens"] == 58 - 4  # all but the first of each sample
    assert lost["kl"] > 0
    assert "heads" in err
    same, _ = called(capsys, "eval", root / "m", "--reference", root / "m", *tokens)
    assert same["kl"] == 0
    assert same["top1_agreement"] == 1
    assert same["nll"] == same["reference"]["nll"] == lost["reference"]["nll"]


def test_eval_of_text(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "import os"}) + "\n" + json.dumps({"text": "x"}) + "\n")
    assert run(["eval", str(root / "m"), "--text", str(rows), "--quiet"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["tokens", "nll", "perplexity"]
    assert table[1].split()[:2] == ["all", "8"]  # "x" has nothing to predict and is left out


def test_eval_keeps_its_result(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", root / "m", "--tokens", root / "t.safetensors", "-o", tmp_path / "e"]
    first, _ = called(capsys, *arguments)
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text()) == first
    again, err = called(capsys, *arguments)
    assert again == first
    assert err == ""  # nothing is computed again


def test_plan_only(
    root: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", root / "m", "--scores", scored, "--keep", 8, "--plan-only"]
    called(capsys, *arguments, "-o", tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["plan.json"]
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["format"] == "thresher.plan/1"
    assert all(len(kept) == 8 for kept in plan["layers"].values())
    called(capsys, *arguments, "-o", tmp_path / "p")  # the same again is fine
    other = [*map(str, arguments), "--criterion", "frequency", "-o", str(tmp_path / "p")]
    assert run(other) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*other, "--force"]) == 0
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["criterion"] == "frequency"


def test_a_forced_score_keeps_its_own_tokens(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for number in range(2):
        mix = tmp_path / f"rows{number}.jsonl"
        mix.write_text(json.dumps({"text": f"x = {number} + {number}\n" * 9}) + "\n")
        out = tmp_path / "scores"
        called(capsys, "score", root / "m", "--mix", f"{mix}:1", "-o", out, "--force")
        digests.append(sha256(out / "tokens.safetensors"))
    assert digests[0] != digests[1]
    assert run(["score", str(root / "m"), "--tokens", str(root / "t.safetensors"), "--force",
                "-o", str(root / "m")]) == 2  # fmt: skip
    assert "the model's own folder" in capsys.readouterr().err


def test_interrupted_score_resumes_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "t.safetensors", lengths=(32,) * 80)
    arguments = ["score", root / "m", "--tokens", tokens, "--batch-tokens", 32]
    process = start(*arguments, "-o", tmp_path / "stopped")
    assert process.stderr is not None
    assert "layer 0" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted; to continue, run the same command again")
    assert not (tmp_path / "stopped" / "saliency.safetensors").exists()
    for name in ("stopped", "whole"):
        assert run([*map(str, arguments), "-o", str(tmp_path / name), "--quiet"]) == 0
    stopped, whole = (tmp_path / name / "saliency.safetensors" for name in ("stopped", "whole"))
    assert sha256(stopped) == sha256(whole)


def test_libraries_do_not_leak_to_stdout(root: Path, tmp_path: Path) -> None:
    done = thresher(
        "score",
        root / "m",
        "--mix",
        "offline:3",
        "--max-length",
        16,
        "-o",
        tmp_path / "s",
        "--json",
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["out"] == str(tmp_path / "s")
    assert "Warning" not in done.stderr


def test_prune_repairs_and_the_result_can_be_rounded(
    root: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, out = root / "t.safetensors", tmp_path / "mended"
    asked = ("prune", root / "m", "--scores", scored, "--ratio", 0.5, "-o", out)
    facts, _ = called(capsys, *asked, "--repair", "down,scales", "--repair-tokens", tokens)
    assert facts["repair"]["repairs"] == ["scales", "down"]
    assert sum(layer["experts"] for layer in facts["repair"]["layers"].values()) > 0
    repeated, _ = called(capsys, *asked, "--repair", "scales,down", "--repair-tokens", tokens)
    assert repeated == facts
    assert run([*map(str, asked), "--repair", "down"]) == 2
    assert "--repair-tokens FILE together" in capsys.readouterr().err
    rounded = tmp_path / "rounded"
    facts, _ = called(
        capsys, "quantize", out, "--scheme", "W3A16", "--group-size", 8, "--tokens", tokens,
        "-o", rounded,
    )  # fmt: skip
    assert facts["verified"]
    judged = []
    for name, folder in (("pruned", out), ("rounded", rounded)):
        judged.append(tmp_path / f"judged-{name}")
        called(
            capsys, "eval", folder, "--reference", root / "m", "--tokens", tokens,
            "-o", judged[-1],
        )  # fmt: skip
    found, _ = called(capsys, "compare", *judged, "--shares")
    assert found["shares"]["all"]["first"] + found["shares"]["all"]["second"] == pytest.approx(1)
