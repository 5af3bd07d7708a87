"""Rows of tasks: local files, data sets of the hub, BFCL's own folder.

humaneval   openai/openai_humaneval (test), or a file with its columns
mbpp        google-research-datasets/mbpp (full, all splits), or a file
wikitext    Salesforce/wikitext wikitext-2-raw-v1 (test), or a file with `text`
bfcl        a folder with BFCL_v4_*.json and possible_answer/ (that of the installed bfcl-eval
            package where none is given), or a file with query, tools and answers, whose single
            answers are stricter than BFCL's lists of accepted values
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.datasets import is_local_file, raw_rows
from evals.code_tasks import check_rows
from models.errors import InputError

Row = dict[str, Any]

HUB: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "humaneval": (("openai/openai_humaneval", None, "test"),),
    "mbpp": (
        ("google-research-datasets/mbpp", "full", "test"),
        ("google-research-datasets/mbpp", "full", "prompt"),
    ),
    "wikitext": (("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),),
}
BFCL_CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
)  # fmt: skip


def rows_for(task: str, given: str | None) -> list[Row]:
    """The rows of `task` from `given` (a file, a hub set), else from the hub."""
    sources = ((given, None, "test"),) if given is not None else HUB[task]
    rows = [row for source in sources for row in raw_rows(*source)]
    if task in ("humaneval", "mbpp"):
        check_rows(task, rows, given or HUB[task][0][0])
    return rows


def wikitext_documents(given: str | None) -> list[str]:
    """The test split's articles. Lines of the hub's set are joined to articles at their titles."""
    rows = rows_for("wikitext", given)
    if not rows or not isinstance(rows[0].get("text"), str):
        raise InputError(f"{given or 'wikitext'} has no column `text`; give a file that has")
    if "official_split" in rows[0]:
        return [row["text"] for row in rows if row["official_split"] == "test"]
    if given is not None and is_local_file(given):
        return [row["text"] for row in rows if row["text"].strip()]
    articles: list[list[str]] = []
    for row in rows:
        line = row["text"]
        if not articles or (line.startswith(" = ") and not line.startswith(" = = ")):
            articles.append([])
        articles[-1].append(line)
    return ["".join(lines) for lines in articles if "".join(lines).strip()]


def bfcl_rows(given: str | None) -> list[Row]:
    """Items of function calling: item, domain, category, messages, functions, accepted."""
    if given is not None and is_local_file(given):
        return [from_answers(row) for row in raw_rows(given, None, "train")]
    folder = Path(given) if given is not None else installed_data()
    found = [row for category in BFCL_CATEGORIES for row in category_rows(folder, category)]
    if not found:
        raise InputError(f"{folder} holds no BFCL_v4_*.json; give BFCL's data folder")
    return found


def installed_data() -> Path:
    """The data folder of the bfcl-eval package."""
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or found.origin is None:
        raise InputError(
            "bfcl needs its data: install bfcl-eval, or give --task-data bfcl=FOLDER_OR_FILE"
        )
    return Path(found.origin).parent / "data"


def category_rows(folder: Path, category: str) -> list[Row]:
    """Items of one category file; none where it is not there."""
    file = folder / f"BFCL_v4_{category}.json"
    if not file.is_file():
        return []
    accepted: dict[str, Any] = {}
    answers = folder / "possible_answer" / file.name
    if answers.is_file():
        accepted = {row["id"]: row["ground_truth"] for row in json_lines(answers)}
    elif "irrelevance" not in category:
        raise InputError(f"{answers} is missing; give BFCL's whole data folder")
    return [
        {
            "item": row["id"], "domain": category, "category": category,
            "messages": row["question"][0], "functions": row["function"],
            "accepted": accepted.get(row["id"], []),
        }
        for row in json_lines(file)
    ]  # fmt: skip


def json_lines(file: Path) -> list[Row]:
    """Rows of a JSON Lines file. InputError naming the file when it is none."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # strings may hold other line ends
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise InputError(f"{file} is not JSON Lines ({error}); download it again") from error


def from_answers(row: Row) -> Row:
    """An item from query, tools and single answers. Optional parameters must be as answered."""
    try:
        functions = loaded(row["tools"])
        answers = loaded(row["answers"])
        category = str(row.get("category") or ("parallel" if len(answers) > 1 else "simple"))
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        accepted = [
            {a["name"]: {name: [value_lists(v)] for name, v in a["arguments"].items()}}
            for a in answers
        ]
        return {
            "item": str(row["id"]), "domain": category, "category": category,
            "messages": [*system, {"role": "user", "content": row["query"]}],
            "functions": [bare(one) for one in functions], "accepted": accepted,
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"a row of the function calling file lacks or misspells {error}; it needs id, query, "
            "tools and answers"
        ) from error


def loaded(value: Any) -> list[Any]:
    """A list, or the JSON text of one."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise TypeError("a list")
    return found


def bare(tool: Row) -> Row:
    """A tool without OpenAI's wrapper."""
    inner = tool.get("function") if tool.get("type") == "function" else tool
    if not isinstance(inner, dict):
        raise TypeError("a function")
    return inner


def value_lists(value: Any) -> Any:
    """A value as BFCL writes accepted ones: those inside dictionaries are lists."""
    if isinstance(value, dict):
        return {key: [value_lists(own)] for key, own in value.items()}
    if isinstance(value, list):
        return [value_lists(own) if isinstance(own, dict) else own for own in value]
    return value


def sampled(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """`limit` of the rows in their order, drawn by the seed; all where no limit is given."""
    import random

    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(f"thresher items {seed}").sample(range(len(rows)), limit))
    return [rows[place] for place in chosen]
