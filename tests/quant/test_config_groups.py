"""The format at the top of a quantization_config, and what is said once of the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig

from quant.config_groups import ConfigGroups, check_format
from quant.recipes import Recipe, Rule, uniform
from quant.schemes import SCHEMES, Scheme
from quant.verify import verify_checkpoint
from tests.quant.checkpoints import quantized_checkpoint
from tests.tiny import tiny_model

WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
W4, FP8, NVFP4 = SCHEMES["W4A16"], SCHEMES["FP8_DYNAMIC"], SCHEMES["NVFP4"]
PACKED, FLOAT, MIXED = "pack-quantized", "float-quantized", "mixed-precision"


def findings(
    top: Any, *groups: tuple[Scheme, str | None], ours: bool = False, leave_out: bool = False
) -> list[str]:
    """Of a config whose groups are (scheme, own format)."""
    settings: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": {
                "targets": [f"re:.*{number}"],
                "weights": scheme.weights.model_dump(mode="json"),
                "input_activations": scheme.input_activations
                and scheme.input_activations.model_dump(mode="json"),
                "format": own,
            }
            for number, (scheme, own) in enumerate(groups)
        }
    }
    if not leave_out:
        settings["format"] = top
    return list(check_format(settings, ConfigGroups(settings), ours=ours))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_one_format_is_that_of_its_groups(scheme: Scheme) -> None:
    for ours in (True, False):
        assert findings(scheme.format, (scheme, scheme.format), ours=ours) == []
        assert findings(scheme.format, (scheme, None), ours=ours) == []
        for wrong in {PACKED, FLOAT, "int-quantized", "x", ""} - {scheme.format}:
            (finding,) = findings(wrong, (scheme, scheme.format), ours=ours)
            assert finding == (
                f"config.json: the format is {wrong!r}, that of its groups is {scheme.format}"
            )
    for odd in (3, ["pack-quantized"], {}):
        assert findings(odd, (scheme, None)) != []
    assert findings(MIXED, (scheme, None)) != []
    assert findings(None, (scheme, None)) != []


def test_several_formats_are_mixed() -> None:
    groups = ((W4, PACKED), (FP8, FLOAT))
    assert findings(MIXED, *groups, ours=True) == []
    for wrong in (PACKED, FLOAT):
        (finding,) = findings(wrong, *groups)
        assert finding.endswith("that of its groups is mixed-precision")
    (finding,) = findings(MIXED, (W4, PACKED), (FP8, None))
    assert finding.startswith("config.json: group_1 has no format")
    assert findings(PACKED, (W4, PACKED), (SCHEMES["W3A16"], None), ours=True) == []


def test_what_others_write_and_engines_read() -> None:
    assert findings(MIXED, (W4, PACKED), (SCHEMES["W8A16"], PACKED)) == []
    assert findings(None, (FP8, FLOAT)) == []
    assert findings(None, (FP8, FLOAT), leave_out=True) == []
    assert findings("naive-quantized", (FP8, None)) == []
    assert findings("naive-quantized", (FP8, "naive-quantized")) == []
    for top in (MIXED, None):
        assert findings(top, (W4, PACKED), ours=True) != []


def test_compressed_tensors_says_the_same() -> None:
    """Its own merging of two configs, whose format it computes."""

    def config(scheme: Scheme, target: str) -> QuantizationConfig:
        group = {
            "targets": [target],
            "weights": scheme.weights.model_dump(mode="json"),
            "input_activations": None,
            "format": scheme.format,
        }
        return QuantizationConfig.model_validate(
            {"config_groups": {"group": group}, "format": scheme.format, "ignore": []}
        )

    for other in (SCHEMES["W3A16"], SCHEMES["NVFP4A16"]):
        merged = config(W4, "re:a")
        with pytest.warns(UserWarning, match="merge quantization configs"):
            merged.merge(config(other, "re:b"))
        settings = merged.model_dump(mode="json")
        assert list(check_format(settings, ConfigGroups(settings), ours=True)) == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("config") / "source", **WIDE)


RECIPES = {
    "one": uniform(NVFP4),
    "mixed": Recipe(
        (
            Rule(scheme=W4, targets=("re:.*experts.*",)),
            Rule(scheme=FP8, ignore=("re:.*experts.*",)),
        )
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_verify_holds_the_format_to_the_groups(kind: str, source: Path, tmp_path: Path) -> None:
    out = quantized_checkpoint(source, tmp_path / "out", RECIPES[kind])
    assert verify_checkpoint(out).findings == []
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format"] = PACKED
    path.write_text(json.dumps(config))
    (finding,) = verify_checkpoint(out).findings
    assert finding.startswith("config.json: the format is 'pack-quantized'")


@pytest.mark.parametrize("tied", [False, True])
def test_of_an_unquantized_head_is_told_once(tied: bool, tmp_path: Path) -> None:
    """Also of one that is tied and not stored: engines build it."""
    choices: dict[str, Any] = {"tie_word_embeddings": True} if tied else {}
    model = tiny_model("qwen3_moe", tmp_path / "model", **WIDE, **choices)
    out = quantized_checkpoint(model, tmp_path / "out", uniform(FP8))
    assert verify_checkpoint(out).findings == []
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].remove("lm_head")
    path.write_text(json.dumps(config))
    (finding,) = verify_checkpoint(out).findings
    assert finding.startswith("lm_head is not quantized")
