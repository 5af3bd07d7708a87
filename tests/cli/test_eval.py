"""`thresher eval` on tokens: what is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run
from tests.cli.models import model


def test_a_path_of_text_is_no_spec_of_a_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "m")
    rows = "".join(json.dumps({"text": f"sample {n}"}) + "\n" for n in range(3))
    found = []
    for name in ("plain.jsonl", "held (1)[2], part:2.jsonl"):
        (tmp_path / name).write_text(rows)
        asked = ["eval", str(tmp_path / "m"), "--text", str(tmp_path / name), "--quiet", "--json"]
        assert run(asked) == 0, capsys.readouterr().err
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tokens"] == 3 * (len("sample 0") - 1)
    assert list(found[1]["by_domain"]) == ["held (1)[2], part:2"]
    assert found[1]["nll"] == found[0]["nll"]
    (tmp_path / "rows.txt").write_text(rows)
    assert run(["eval", str(tmp_path / "m"), "--text", str(tmp_path / "rows.txt")]) == 2
    assert "no row file" in capsys.readouterr().err
