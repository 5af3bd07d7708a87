"""Specs, named mixes and YAML files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.mixes import MIXES, Component, Mix, parse_mix, shared_out
from models.errors import InputError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.gz"
    path.touch()
    return path


def test_named_mixes() -> None:
    assert [c.rows for c in parse_mix("code-tools-swe").components] == [700, 330, 330]
    agentic = parse_mix("reap-agentic")
    assert sum(c.rows or 0 for c in agentic.components) == 24_576
    assert agentic.max_length == 16_384
    assert parse_mix("offline").domains == ["code", "tools", "swe"]


def test_split_and_rows_of_a_named_mix() -> None:
    mix = parse_mix("offline(heldout):12")
    assert {c.split for c in mix.components} == {"heldout"}
    assert [c.rows for c in mix.components] == [5, 4, 3]


def test_spec(rows: Path) -> None:
    mix = parse_mix(f"{rows}:20, offline[swe](heldout):3,owner/some-set[sub](dev):7,offline:12")
    assert mix.components[:3] == (
        Component(domain="rows", source=str(rows), rows=20),
        Component(domain="swe", source="offline", subset="swe", split="heldout", rows=3),
        Component(
            domain="some-set-sub", source="owner/some-set", subset="sub", split="dev", rows=7
        ),
    )
    assert mix.domains == ["rows", "swe", "some-set-sub", "code", "tools"]


def test_yaml(rows: Path) -> None:
    path = rows.parent / "mine.yaml"
    path.write_text(
        "max_length: 777\ncomponents:\n- {source: rows.jsonl.gz, domain: letters, rows: 5}\n"
        "- {source: offline, split: heldout, rows: 6}\n"
    )
    mix = parse_mix(str(path))
    assert (mix.name, mix.max_length) == ("mine", 777)
    assert mix.components[0] == Component(domain="letters", source=str(rows), rows=5)
    assert [c.domain for c in mix.components] == ["letters", "code", "tools", "swe"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("components: []", "no list `components`"),
        ("- 1", "no list `components`"),
        ("components: [{rows: 3}]", "has no `source`"),
        ("components: [{source: offline, row: 3}]", "unknown keys ['row']"),
        ("components: [{source: offline, rows: many}]", "rows is 'many'"),
        ("components: [{source: offline}]\nmax_length: 0", "max_length is 0"),
        ("components: [", "is not YAML"),
        ("components: [{source: none.jsonl}]", "there is no file"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        parse_mix(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "the mix is empty; give one of offline, code-tools-swe, reap-agentic"),
        ("  ", "the mix is empty"),
        (
            "offlin",
            "no mix or source 'offlin'; give perhaps offline, or one of offline, code-tools",
        ),
        ("code-tool-swe", "perhaps code-tools-swe"),
        ("offline,", "'' is no part of a mix"),
        ("offline:many", "'offline:many' is no part of a mix"),
        ("offline:0", "asks for no rows"),
        ("offline[math]", "no subset 'math'; known are code, tools, swe"),
        ("offline(test)", "no split 'test'; known are train, heldout"),
        ("no/such.jsonl:3", "there is no file no/such.jsonl"),
        ("rows.csv", "is no row file"),
        ("no.yaml", "there is no mix file"),
    ],
)
def test_bad_specs(spec: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        parse_mix(spec)
    assert "\n" not in str(caught.value)


def test_a_file_has_no_splits(rows: Path) -> None:
    with pytest.raises(InputError, match="single file"):
        parse_mix(f"{rows}(train):3")


def test_no_domain_is_called_all(tmp_path: Path) -> None:
    """Reports, --weights and --protect call all domains together so."""
    (tmp_path / "all.jsonl").touch()
    mix = tmp_path / "mine.yaml"
    mix.write_text("components: [{source: all.jsonl, domain: every}]")
    assert parse_mix(str(mix)).domains == ["every"]
    mix.write_text("components: [{source: offline, domain: all, rows: 3}]")
    for spec in (str(tmp_path / "all.jsonl"), "owner/all:3", str(mix)):
        with pytest.raises(InputError, match="would be the domain 'all', which means all"):
            parse_mix(spec)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(0, 3000))
def test_shares(weights: list[int], more: int) -> None:
    """Whole, at least one each, summing to the total, a heavier component never behind."""
    total = len(weights) + more
    parts = shared_out(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 1
    for a, left in zip(weights, parts, strict=True):
        assert all(left >= right - 1 for b, right in zip(weights, parts, strict=True) if a >= b)


def test_own_rows_are_kept_when_asked_for_exactly() -> None:
    for mix in MIXES.values():
        own = [c.rows for c in mix.components]
        assert mix.rows(sum(c.rows or 0 for c in mix.components)) == own
        assert mix.rows(None) == own


def test_too_few_samples_and_half_given_rows() -> None:
    with pytest.raises(InputError, match="2 samples cannot be shared among the 3 components"):
        MIXES["offline"].rows(2)
    parts = (
        Component(domain="a", source="a.jsonl"),
        Component(domain="b", source="b.jsonl", rows=2),
    )
    with pytest.raises(InputError, match="some components have a number of rows"):
        Mix(name="half", components=parts).rows(10)
