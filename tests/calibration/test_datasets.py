# ruff: noqa: E501 - rows and the samples they mean stand side by side

"""Four row shapes in three file formats, and rows that are no good."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from calibration.chat import Sample
from calibration.datasets import file_samples, raw_rows
from calibration.rows import Rejected
from models.errors import InputError

SEARCH = {
    "name": "search",
    "parameters": {"type": "object", "properties": {"query": {"type": "string", "default": None}}},
}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def call(name: str, arguments: dict[str, Any], call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# rows of each shape, and the samples they mean
SHAPES: dict[str, tuple[list[dict[str, Any]], list[Sample]]] = {
    "messages": (
        [
            {
                "id": 1,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Find it"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "x", "type": "function",
                             "function": {"name": "search", "arguments": '{"query": "ü\\n"}'}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "x", "content": "found\u2028it"},
                ],
                "tools": [wrapped(ADD)],
            }
        ],
        [
            Sample(
                messages=(
                    {"role": "user", "content": "Find it"},
                    {"role": "assistant", "content": "", "tool_calls": [call("search", {"query": "ü\n"}, "x")]},
                    {"role": "tool", "content": "found\u2028it", "tool_call_id": "x"},
                ),
                tools=(wrapped(ADD),),
            )
        ],
    ),
    "query": (
        [
            {
                "query": "Add and find",
                "tools": json.dumps([SEARCH, ADD]),
                "answers": json.dumps(
                    [{"name": "add", "arguments": {"a": 1}}, {"name": "search", "arguments": {"query": None}}]
                ),
            },
            {
                "query": "Only add",
                "tools": json.dumps([ADD]),
                "answers": json.dumps([{"name": "add", "arguments": {"a": 2}}]),
            },
        ],
        [
            Sample(
                messages=(
                    {"role": "user", "content": "Add and find"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [call("add", {"a": 1}, "call_1"), call("search", {"query": None}, "call_2")],
                    },
                ),
                tools=(wrapped(SEARCH), wrapped(ADD)),
            ),
            Sample(
                messages=(
                    {"role": "user", "content": "Only add"},
                    {"role": "assistant", "content": "", "tool_calls": [call("add", {"a": 2}, "call_1")]},
                ),
                tools=(wrapped(ADD),),
            ),
        ],
    ),
    "instruction": (
        [
            {"instruction": "Say hi", "output": "hi", "source": "here"},
            {"instruction": "Double", "input": "4", "output": "8"},
        ],
        [
            Sample(messages=({"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"})),
            Sample(messages=({"role": "user", "content": "Double\n\n4"}, {"role": "assistant", "content": "8"})),
        ],
    ),
    "text": (
        [{"text": "A line.\r\nAnother."}, {"text": "日本"}],
        [Sample(text="A line.\r\nAnother."), Sample(text="日本")],
    ),
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format that the path's suffix names."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines.encode())
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        full = [{key: row.get(key) for key in columns} for row in rows]
        for row in full:
            if isinstance(row.get("messages"), list):  # as the hub's trajectories have it
                row["messages"] = json.dumps(row["messages"])
        datasets.Dataset.from_list(full).to_parquet(str(path))
    return str(path)


def in_order(samples: list[Any]) -> list[str]:
    return sorted(repr(sample) for sample in samples)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_and_formats(tmp_path: Path, shape: str, suffix: str) -> None:
    rows, samples = SHAPES[shape]
    found = list(file_samples(write(tmp_path / f"rows{suffix}", rows), seed=3))
    assert in_order(found) == in_order(samples)


def test_json_strings_and_nested_lists_mean_the_same(tmp_path: Path) -> None:
    """Parquet's nested tools carry nulls for other rows' keys; they must not reach a sample."""
    rows = [
        {"query": "a", "tools": [ADD], "answers": [{"name": "add", "arguments": {"a": 1}}]},
        {"query": "b", "tools": [{**ADD, "parameters": {"type": "object", "properties": {"b": {"type": "string"}}}}],
         "answers": [{"name": "add", "arguments": {"b": "x"}}]},
    ]  # fmt: skip
    texts = [{k: v if k == "query" else json.dumps(v) for k, v in row.items()} for row in rows]
    nested = list(file_samples(write(tmp_path / "nested.parquet", rows), seed=0))
    plain = list(file_samples(write(tmp_path / "text.jsonl", texts), seed=0))
    assert nested == plain


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(50)])
    first, again, other = (
        [s.text for s in file_samples(path, seed) if isinstance(s, Sample)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == sorted(f"row {n}" for n in range(50))


def test_no_row_is_dropped_in_silence(tmp_path: Path) -> None:
    good = {"query": "q", "tools": "[]", "answers": '[{"name": "f", "arguments": {}}]'}
    lines = [
        json.dumps(good),
        json.dumps({**good, "query": " "}),
        json.dumps({**good, "answers": "[]"}),
        json.dumps({**good, "answers": "[{"}),
        json.dumps({**good, "answers": '{"name": "f"}'}),
        json.dumps({**good, "tools": '[{"description": "nameless"}]'}),
        json.dumps({"query": "q", "tools": "[]"}),
        json.dumps({**good, "tools": "[" * 5000 + "]" * 5000}),
        json.dumps({**good, "answers": [{"name": "f", "arguments": '{"n": ' + "1" * 5000 + "}"}]}),
        json.dumps(good)[:-1] + ', "unused": ' + "1" * 5000 + "}",
        json.dumps(good)[:-1] + ', "unused": ' + "[" * 5000 + "]" * 5000 + "}",
        "{torn",
        "[1, 2]",
        "",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = list(file_samples(str(path), seed=0))
    assert sum(isinstance(item, Sample) for item in found) == 1
    assert sorted(item.reason for item in found if isinstance(item, Rejected)) == [
        "answers is not JSON",
        "answers is not a list",
        "empty query",
        "line is JSON with too long a number or too deep a nesting",
        "line is JSON with too long a number or too deep a nesting",
        "line is not JSON",
        "line is not a JSON object",
        "no answers",
        "row without the column 'answers'",
        "tool call whose arguments are JSON with too long a number or too deep a nesting",
        "tool definition without a name",
        "tools is JSON with too long a number or too deep a nesting",
    ]


@pytest.mark.parametrize(
    ("names", "outcome"),
    [
        (["bash", "think"], ["bash", "think"]),
        ('["think"]', ["bash", "think"]),
        (5, "tool_names is not a list"),
        ("bash", "tool_names is not JSON"),
        (["bash", 5], "tool_names with an entry that is not text"),
    ],
)
def test_names_of_tools_are_a_list_of_text(tmp_path: Path, names: Any, outcome: Any) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"name": "bash", "arguments": {"c": 1}}]}]
    row = {"messages": messages, "tool_names": names}
    (found,) = file_samples(write(tmp_path / "rows.jsonl", [row]), seed=0)
    if isinstance(found, Rejected):
        assert found.reason == outcome
    else:
        assert [tool["function"]["name"] for tool in found.tools] == outcome


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = '\ufeff{"text": "one"}\r\n{"text": "two"}\r\n'.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    found = list(file_samples(str(path), seed=0))
    assert in_order(found) == in_order([Sample(text="one"), Sample(text="two")])
    assert raw_rows(str(path), None, "train") == [{"text": "one"}, {"text": "two"}]


def test_a_file_without_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "none.parquet"))
    for name, content in (("none", ""), ("blank", "\n \n"), ("mark", "\ufeff\n")):
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    paths = sorted(map(str, tmp_path.iterdir()))
    assert len(paths) == 7
    for path in paths:
        with pytest.raises(InputError) as caught:
            list(file_samples(path, seed=0))
        assert str(caught.value) == f"{path} holds no rows; give a file that does"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_unknown_columns_are_named(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", [{"prompt": "x", "completion": "y"}])
    says = "has the columns prompt, completion; a row needs messages | query+tools+answers"
    with pytest.raises(InputError, match=re.escape(says)):
        list(file_samples(path, seed=0))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet", "empty.jsonl", "latin.jsonl"])
def test_broken_files_are_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(
        {"empty.jsonl": b"", "latin.jsonl": '{"text": "é"}\n'.encode("latin-1")}.get(
            name, b"nonsense"
        )
    )
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        list(file_samples(str(path), seed=0))
    assert "\n" not in str(caught.value)


PROBE = """
import sys
from calibration.datasets import file_samples
from calibration.hub import at_commit, hub_source
from models.errors import InputError
print(len(list(file_samples(sys.argv[1], 0))))
try:
    at_commit(hub_source("evol-codealpaca-v1", None, None), 0)
except InputError as problem:
    print(problem)
"""


def test_offline_run_writes_nothing_and_tells_of_the_hub_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [{"text": "a"}, {"text": "b"}])
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HOME": str(home), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, path],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows, hub = done.stdout.splitlines()
    assert rows == "2"
    assert hub.startswith("data set theblackcat102/evol-codealpaca-v1 (default, train) cannot be")
    assert hub.endswith("check the network, or give a local file")
    assert not [p for p in home.rglob("*") if p.is_file()]
    assert not list(temporary.iterdir())
