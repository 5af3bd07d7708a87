"""Verdicts on calls; where the `bfcl-eval` package is installed, its checker must agree."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from evals.function_calls import as_tools, calls_in_text, judge, named_back
from evals.task_data import from_answers, json_lines

WEATHER = {
    "name": "weather.get",
    "description": "Weather",
    "parameters": {
        "type": "dict",
        "required": ["city"],
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "scale": {"type": "float"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"type": "dict", "properties": {}},
            "hours": {"type": "array", "items": {"type": "dict"}},
        },
    },
}
ACCEPTED = [
    {
        "weather.get": {
            "city": ["New York, NY", "NYC"],
            "days": [3, ""],
            "scale": [1.5, 2.0, ""],
            "tags": [["sun", "Rain."], ""],
            "where": [{"lat": [1, 2], "name": ["a b", ""]}, ""],
            "hours": [[{"h": [1]}, {"h": [2]}], ""],
        }
    }
]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"city": "nyc"}, True),
        ({"city": "new york ny"}, True),
        ({"city": "Boston"}, False),
        ({"days": 3}, False),  # city is required
        ({"city": "NYC", "days": 3}, True),
        ({"city": "NYC", "days": 3.0}, False),
        ({"city": "NYC", "days": "3"}, False),
        ({"city": "NYC", "days": True}, False),
        ({"city": "NYC", "scale": 2}, True),  # an integer may stand for a float
        ({"city": "NYC", "scale": 2.5}, False),
        ({"city": "NYC", "tags": ["SUN", "rain"]}, True),
        ({"city": "NYC", "tags": ["rain", "sun"]}, False),
        ({"city": "NYC", "tags": "sun"}, False),
        ({"city": "NYC", "where": {"lat": 2}}, True),
        ({"city": "NYC", "where": {"lat": 2, "name": "AB"}}, True),
        ({"city": "NYC", "where": {"name": "a b"}}, False),  # lat may not be left out
        ({"city": "NYC", "where": {"lat": 1, "other": 1}}, False),
        ({"city": "NYC", "hours": [{"h": 1}, {"h": 2}]}, True),
        ({"city": "NYC", "hours": [{"h": 2}, {"h": 1}]}, False),
        ({"city": "NYC", "unknown": 1}, False),
    ],
)
def test_one_call(given: dict[str, Any], right: bool) -> None:
    found = judge("simple", [WEATHER], [("weather.get", given)], ACCEPTED)
    assert (found is None) == right, found


def test_names_counts_and_order() -> None:
    other = {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}
    both = [WEATHER, other]
    accepted = [{"f": {"x": [1]}}, {"f": {"x": [2]}}, {"weather.get": {"city": ["NYC"]}}]
    calls = [("f", {"x": 1}), ("f", {"x": 2}), ("weather.get", {"city": "NYC"})]
    for seed in range(6):
        random.Random(seed).shuffle(calls)
        assert judge("parallel_multiple", both, calls, accepted) is None
    assert judge("parallel_multiple", both, calls[:2], accepted) is not None
    assert judge("parallel_multiple", both, [*calls, calls[0]], accepted) is not None
    assert judge("parallel_multiple", both, [calls[0]] * 3, accepted) is not None
    assert judge("multiple", both, [("g", {"x": 1})], accepted[:1]) is not None
    assert judge("irrelevance", both, [], []) is None
    assert judge("live_irrelevance", both, [("f", {"x": 1})], []) is not None


def test_names_go_out_without_dots_and_come_back() -> None:
    tools = as_tools([WEATHER])
    assert tools[0]["function"]["name"] == "weather_get"
    parameters = tools[0]["function"]["parameters"]
    assert parameters["type"] == "object"
    assert parameters["properties"]["scale"]["type"] == "number"
    assert named_back([("weather_get", {})], [WEATHER]) == [("weather.get", {})]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("f", {"a": 1})]),
        ('[{"name": "f", "arguments": "{\\"a\\": 1}"}]', [("f", {"a": 1})]),
        (
            "[f(a=1), m.g(b='x', c=[1, -2.5])]",
            [("f", {"a": 1}), ("m.g", {"b": "x", "c": [1, -2.5]})],
        ),
        ("```python\nf(a=True)\n```", [("f", {"a": True})]),
        ("I cannot do that.", []),
        ("[f(1)]", []),
        ("2 + 2", []),
    ],
)
def test_calls_written_in_text(text: str, calls: list) -> None:
    assert calls_in_text(text) == calls


def test_single_answers_are_accepted_as_they_are() -> None:
    row = {
        "id": "1", "query": "?", "tools": [WEATHER],
        "answers": '[{"name": "weather.get", "arguments": {"city": "NYC", "where": {"lat": 1}}}]',
    }  # fmt: skip
    item = from_answers(row)
    given = {"city": "NYC", "where": {"lat": 1}}
    assert (
        judge(item["category"], item["functions"], [("weather.get", given)], item["accepted"])
        is None
    )


@pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="needs bfcl-eval")
def test_the_packages_checker_agrees() -> None:
    """40 cases of its own data; benchmarks/bfcl_agreement.py runs 500 and all of them."""
    from benchmarks import bfcl_agreement as theirs

    root, chance = theirs.package(), random.Random(3)
    checker = theirs.their_checker(root)
    for case in chance.sample(theirs.cases(root), 40):
        kind = chance.choice(theirs.KINDS)
        calls = theirs.spoil(theirs.plain_answer(case["accepted"], chance, True), kind, chance)
        verdict = checker.ast_checker(
            case["function"],
            calls,
            case["accepted"],
            checker.Language.PYTHON,
            case["category"],
            "m",
        )["valid"]
        pairs = [next(iter(call.items())) for call in calls]
        ours = judge(case["category"], case["function"], pairs, case["accepted"]) is None
        assert ours == verdict, (case["id"], kind, calls)


def test_rows_may_hold_other_line_ends(tmp_path: Path) -> None:
    rows = [{"id": n, "question": "a\u2028b\u0085c"} for n in range(2)]
    file = tmp_path / "BFCL_v4_multiple.json"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
    assert json_lines(file) == rows
