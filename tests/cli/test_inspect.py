"""inspect on DeepSeek-V3.2's real config, and refined by real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.inspect import billions, gigabytes
from cli.main import run, thresher
from tests.cli.command import FIXTURE
from tests.tiny import read_all, tiny_model


def inspect(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(
        thresher, ["inspect", *map(str, arguments), "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


@pytest.mark.parametrize(("keep", "total"), [(None, 671.9), (192, 508.4), (128, 344.9)])
def test_parameters_without_mtp(keep: int | None, total: float) -> None:
    facts = inspect(FIXTURE, *([] if keep is None else ["--keep", keep]))
    assert round(facts["after"]["parameters"]["total"] / 1e9, 1) == total
    assert round(facts["parameters"]["total"] / 1e9, 1) == 671.9


def test_half_the_experts_in_three_bits() -> None:
    facts = inspect(FIXTURE, "--keep", 128, "--scheme", "W3A16")
    assert facts["after"]["bytes"] == pytest.approx(138e9, rel=0.02)
    assert facts["serving"]["weights"] == facts["after"]["bytes"]


def test_facts_of_deepseek_v32() -> None:
    facts = inspect(FIXTURE)
    assert facts["source"] == "config"
    assert facts["bytes"] == 689_469_018_240
    shown = ("layers", "moe_layers", "mtp_layers", "experts", "top_k", "groups", "topk_groups")
    assert [facts[key] for key in shown] == [61, 58, 1, 256, 8, 8, 4]


def test_text_has_the_same_figures() -> None:
    text = (
        CliRunner()
        .invoke(thresher, ["inspect", str(FIXTURE), "--keep", "128", "--scheme", "W3A16"])
        .stdout
    )
    for figure in ("671.9B", "344.9B", "689.5 GB", "139.2 GB", "FP8, blocks of 128x128"):
        assert figure in text
    for job in ("score", "prune", "quantize"):
        assert f"  {job} " in text


def test_context_moves_the_cache_only() -> None:
    short, long = (inspect(FIXTURE, "--context", t)["serving"] for t in (1000, 100_000))
    assert long["kv_cache"] == 100 * short["kv_cache"]
    assert long["weights"] == short["weights"]


@pytest.mark.parametrize("family", ["deepseek_v32", "mixtral", "olmoe", "gpt_oss"])
def test_bytes_from_the_config_are_those_on_disk(family: str, tmp_path: Path) -> None:
    """Of tiny checkpoints in their real layout: computed from the config = counted in headers."""
    tiny_model(family, tmp_path / "whole", dtype="bfloat16")
    counted = inspect(tmp_path / "whole")
    assert counted["source"] == "headers"
    stored = read_all(tmp_path / "whole").values()
    assert counted["bytes"] == sum(t.numel() * t.element_size() for t in stored)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "bare")
    computed = inspect(tmp_path / "bare")
    assert computed["source"] == "config"
    assert computed["bytes"] == pytest.approx(counted["bytes"], rel=0.01)


def test_mtp_beside_the_layers_is_counted_in_its_files(tmp_path: Path) -> None:
    """Qwen3-Next's `mtp.` tensors: their bytes from the headers; cutting drops just them."""
    tiny_model("qwen3_next", tmp_path, dtype="bfloat16")
    stored = read_all(tmp_path)
    mtp = sum(t.numel() * t.element_size() for name, t in stored.items() if name.startswith("mtp."))
    whole = inspect(tmp_path)
    assert mtp > 0
    assert whole["parameters"]["mtp"] is None
    assert whole["serving"]["weights"] == whole["bytes"] - mtp
    experts = sum(
        t.numel() * t.element_size()
        for name, t in stored.items()
        if ".experts." in name and not name.startswith("mtp.")
    )
    routers = sum(
        t.numel() * t.element_size()
        for name, t in stored.items()
        if name.endswith("mlp.gate.weight") and not name.startswith("mtp.")
    )
    half = inspect(tmp_path, "--keep", whole["experts"] // 2)
    assert half["after"]["bytes"] == whole["bytes"] - mtp - (experts + routers) // 2


def test_mtp_beside_the_layers_is_carried_when_quantized(tmp_path: Path) -> None:
    """What is said before is what quantize writes: `mtp.` tensors keep their bytes."""
    source, out = tiny_model("qwen3_next", tmp_path / "source", dtype="bfloat16"), tmp_path / "out"
    said = inspect(source, "--scheme", "FP8_DYNAMIC")["after"]["bytes"]
    options = ["--scheme", "FP8_DYNAMIC", "--method", "rtn", "-o", str(out), "--quiet"]
    assert run(["quantize", str(source), *options]) == 0
    stored = read_all(out)
    assert any(name.startswith("mtp.") for name in stored)
    assert said == sum(t.numel() * t.element_size() for t in stored.values())


def test_what_quantize_will_refuse_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", dtype="bfloat16", hidden_size=128)
    out = ["-o", str(tmp_path / "out"), "--quiet"]
    for scheme, refuses in (("W4A16", True), ("FP8_BLOCK", True), ("FP8_DYNAMIC", False)):
        refused = inspect(source, "--scheme", scheme)["after"]["refused"]
        code = run(["quantize", str(source), "--scheme", scheme, "--method", "rtn", *out])
        assert (code == 2) is (refused is not None) is refuses
    capsys.readouterr()
    assert run(["inspect", str(source), "--scheme", "W4A16"]) == 0
    said = capsys.readouterr().out
    assert "no whole number of 128: quantize --scheme W4A16 will refuse it" in said
    assert inspect(FIXTURE, "--scheme", "W3A16")["after"]["refused"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_group", "a"), ("n_group", [4]), ("num_nextn_predict_layers", "x"),
     ("num_nextn_predict_layers", -1), ("hidden_size", 0), ("vocab_size", None),
     ("rope_parameters", "x")],
)  # fmt: skip
def test_counts_that_are_none(
    key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((FIXTURE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    assert run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert key in said or "MTP layers" in said


def test_index_without_shards_refines(tmp_path: Path) -> None:
    shutil.copy(FIXTURE / "config.json", tmp_path)
    index = {"metadata": {"total_size": 674_030_000_000}, "weight_map": {"lm_head.weight": "x"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = inspect(tmp_path)
    assert facts["source"] == "index"
    assert facts["bytes"] == 674_030_000_000
    assert facts["mtp_layers"] == 0  # announced by the config, not in the index


def test_groups_decide_what_can_be_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(FIXTURE), "--keep", "130"]) == 2
    assert "8 groups" in capsys.readouterr().err
    flat = inspect(FIXTURE, "--keep", "130", "--groups", "flatten")
    assert flat["after"]["keep"] == 130


def test_units() -> None:
    assert billions(671_877_944_064) == "671.9B"
    assert billions(24_100_000) == "24.1M"
    assert gigabytes(689_469_018_240) == "689.5 GB"
    assert gigabytes(24_100_000) == "24.1 MB"
    assert gigabytes(1500) == "1.5 kB"
