"""`--budget` as typed: the checkpoint fits, the recipe can be used again, refusals say why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cli.budget import budget_lines, budget_of, checked_menu, ranges
from cli.main import run
from models.errors import InputError
from models.opening import open_model
from models.processes import ALONE
from quant.quantize_plan import QuantizeSettings
from tests.cli.models import model, token_file

SMALL = ["--group-size", "8", "--quiet"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("budget")
    model(root / "m", "qwen3_moe")
    token_file(root / "t.safetensors")
    return root


def stored(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint's files."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON object of a command that must succeed."""
    capsys.readouterr()
    code = run([*map(str, arguments), *SMALL, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert run([*map(str, arguments), *SMALL]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def sizes(capsys: pytest.CaptureFixture[str], work: Path) -> tuple[int, int]:
    """(smallest, largest), from a budget that holds everything."""
    out = work / "sizes"
    found = answer(capsys, "quantize", work / "m", "--budget", "1TB", "-o", out, "--dry-run")
    assert found["budget"]["damage"] is None
    assert not out.exists()
    assert not out.with_name("sizes.damage").exists()
    assert all(set(own) == {"W8A16"} for own in found["budget"]["schemes"].values())
    return found["budget"]["smallest"], found["budget"]["largest"]


def test_quantize_within_a_budget(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smallest, largest = sizes(capsys, work)
    budget = (2 * smallest + largest) // 3
    tokens = ["--tokens", work / "t.safetensors"]
    asked = ["quantize", work / "m", "--budget", budget, *tokens]
    shown = answer(capsys, *asked, "-o", work / "out", "--dry-run")
    assert set(shown) == {"out", "budget"}
    assert not (work / "out").exists()
    made = answer(capsys, *asked, "-o", work / "out")
    assert made["budget"] == shown["budget"]
    assert made["verified"]
    assert smallest < stored(work / "out") == made["bytes"] == made["budget"]["bytes"] <= budget
    manifest = json.loads((work / "out" / "thresher.json").read_text())
    assert manifest["inputs"]["budget"] == made["budget"]
    # the recipe alone gives the same checkpoint
    again = ["quantize", work / "m", "--recipe", work / "out.yaml", *map(str, tokens)]
    assert run([*map(str, again), "-o", str(work / "again"), "--quiet"]) == 0
    for file in (work / "out").glob("model*"):
        assert file.read_bytes() == (work / "again" / file.name).read_bytes()
    # another budget measures nothing again, and more bytes damage less
    manifest_time = (work / "out.damage" / "thresher.json").stat().st_mtime_ns
    wider = answer(
        capsys, "quantize", work / "m", "--budget", largest - 1, *tokens, "-o", work / "wider",
        "--damage", work / "out.damage", "--dry-run",
    )  # fmt: skip
    assert (work / "out.damage" / "thresher.json").stat().st_mtime_ns == manifest_time
    assert not (work / "wider.damage").exists()
    assert wider["budget"]["damage"] < made["budget"]["damage"]
    # into the finished folder it is refused, and the recipe that was used stays
    recipe = (work / "out.yaml").read_bytes()
    other = ["quantize", work / "m", "--budget", largest - 1, *tokens, "-o", work / "out"]
    assert "was begun with the recipe" in refusal(capsys, *other, "--quiet")
    assert (work / "out.yaml").read_bytes() == recipe


def test_compress_within_a_budget(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are those of the pruned model, damage is the intact one's."""
    smallest, _ = sizes(capsys, work)
    asked = ["compress", work / "m", "--keep", 6, "--budget", smallest, "-o", work / "half"]
    made = answer(capsys, *asked, "--tokens", work / "t.safetensors")
    assert made["verified"]
    assert made["budget"]["smallest"] < stored(work / "half") == made["bytes"] <= smallest
    config = json.loads((work / "half" / "config.json").read_text())
    assert config["num_experts"] == 6
    used = {name for own in made["budget"]["schemes"].values() for name in own}
    assert len(used) > 1


def test_lines_for_people(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", work / "m", "--budget", "1TB", "-o", work / "sizes", "--dry-run"]
    assert run([*map(str, command), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "nothing was measured" in out
    assert "W8A16 in layers 0-2" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "1KB"], "too small"),
        (["--budget", "1TB", "--scheme", "W4A16"], "say once"),
        (["--budget", "1TB", "--schemes", "W4A16"], "two or more"),
        (["--budget", "1TB", "--schemes", "W4A16,W5"], "'W5' is not known"),
        (["--budget", "1TB", "--format", "gptq"], "--format gptq holds one scheme"),
        (["--budget", "1TB", "--method", "awq"], "--budget"),
        (["--scheme", "W4A16", "--dry-run"], "--dry-run"),
    ],
)
def test_refusals(
    work: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    line = refusal(capsys, "quantize", work / "m", *options, "-o", work / "refused")
    assert line.startswith("error: ")
    assert says in line
    assert not list(work.glob("refused*"))


def test_without_tokens(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smallest, _ = sizes(capsys, work)
    asked = ["quantize", work / "m", "--budget", smallest, "--method", "rtn"]
    assert "--tokens" in refusal(capsys, *asked, "-o", work / "refused")


def test_experts_that_differ_are_announced() -> None:
    facts = {
        "budget": 100, "bytes": 90, "damage": 0.5, "recipe": "r.yaml",
        "schemes": {"expert": {"W4A16": [0, 1], "W3A16": [2]}, "attention": {"W8A16": [0, 1, 2]}},
    }  # fmt: skip
    lines = budget_lines(facts)
    assert any("W4A16 in layers 0-1; W3A16 in layers 2" in line for line in lines)
    assert any("transformers" in line for line in lines)
    facts["schemes"] = {"expert": {"W4A16": [0, 1, 2]}}
    assert not any("transformers" in line for line in budget_lines(facts))


def test_several_processes(work: Path) -> None:
    budget = budget_of(10**12, "W3A16,W4A16", None, 100, 8, False)
    two = dataclasses.replace(ALONE, size=2)
    with pytest.raises(InputError, match="in one process"):
        checked_menu(open_model(work / "m"), budget, QuantizeSettings(), two)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
