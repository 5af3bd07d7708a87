"""Two runs over the same samples or items, and how sure the differences between them are.

A run is a JSON Lines file: `samples.jsonl` of a streaming evaluation (sums by sample) or
`items.jsonl` of a task (a score by item). Differences are second minus first, with paired bootstrap
intervals (evals/intervals.py) over what both have in common, which must be everything: a comparison
over a part would answer another question than was asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.intervals import paired_interval
from evals.tally import perplexities
from models.errors import InputError
from models.journal import MANIFEST

FILES = ("samples.jsonl", "items.jsonl")

# reported figure -> (column, the column that divides it, what becomes of the ratio)
Figure = tuple[str, str, Callable[[np.ndarray], np.ndarray]]
SAMPLE_FIGURES: dict[str, Figure] = {
    "perplexity": ("nll", "tokens", perplexities),
    "nll": ("nll", "tokens", np.asarray),
    "kl": ("kl", "tokens", np.asarray),
    "top1_agreement": ("agree", "tokens", np.asarray),
}
ITEM_FIGURES: dict[str, Figure] = {"score": ("score", "weight", np.asarray)}


@dataclass(frozen=True, slots=True)
class Run:
    """The lines of one run by their key, and the digest of what it was run on ("": not known)."""

    path: Path
    rows: dict[str, dict[str, Any]]
    is_task: bool
    data: str


def read_run(path: str | Path) -> Run:
    """A run from its folder or its JSON Lines file. InputError when it is none."""
    given = Path(path)
    found = [given / name for name in FILES if (given / name).is_file()] if given.is_dir() else []
    if given.is_file():
        found = [given]
    if len(found) != 1:
        inner = sorted(p.name for p in given.glob("samples-*.jsonl")) if given.is_dir() else []
        more = f" (it holds {', '.join(inner)}: name one of them)" if inner else ""
        raise InputError(
            f"{given} holds no {' or '.join(FILES)}{more}; give a folder that `thresher eval -o` "
            "finished, or the file itself"
        )
    rows = read_rows(found[0])
    return Run(
        found[0], rows, any("item" in r for r in rows.values()), data_digest(found[0].parent)
    )


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a run by item or sample. InputError naming the line that is neither."""
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[str(row["item"] if "item" in row else row["sample"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}, line {number} is neither a sample nor an item; run `thresher eval` again"
            ) from error
    if not rows:
        raise InputError(f"{file} is empty; run `thresher eval` to its end")
    return rows


def data_digest(folder: Path) -> str:
    """The digest of tokens or items by the run's manifest."""
    try:
        job = json.loads((folder / MANIFEST).read_bytes())["job"]
    except (OSError, ValueError, KeyError):
        return ""
    return str(job.get("tokens") or job.get("data") or "")


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """{"samples": n, "groups": {"all" | domain: {figure: {first, second, difference, interval}}}}.

    InputError when the runs are not over the same samples.
    """
    if first.is_task != second.is_task:
        raise InputError(f"{first.path} and {second.path} are not of one kind; compare like runs")
    if first.data != second.data and first.data and second.data:
        raise InputError(
            f"{first.path} and {second.path} were run on different data; evaluate both on the same"
        )
    odd = sorted(set(first.rows) ^ set(second.rows))
    if odd:
        raise InputError(
            f"{first.path} and {second.path} differ in what they cover ({odd[0]} is in one of them "
            "only); run both to the end on the same data"
        )
    figures = ITEM_FIGURES if first.is_task else SAMPLE_FIGURES
    keys = list(first.rows)
    strata = [str(first.rows[key].get("domain", "")) for key in keys]
    groups = {"all": keys}
    if len(set(strata)) > 1:
        for name in dict.fromkeys(strata):
            groups[name] = [k for k, stratum in zip(keys, strata, strict=True) if stratum == name]
    return {
        "samples": len(keys),
        "groups": {
            name: {
                figure: difference(first, second, own, *columns)
                for figure, columns in figures.items()
                if all(columns[0] in run.rows[key] for run in (first, second) for key in own)
            }
            for name, own in groups.items()
        },
    }


def shares_of_loss(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of SECOND's KL to the original, what the step to FIRST lost and what the one after it added.

    `found` is what `compare_runs` gave for FIRST = pruned and SECOND = the same model rounded:
    {"all" | domain: {"kl", "first", "second", "interval"}}, the interval that of the second share.
    InputError when a run has no KL.
    """
    shares: dict[str, dict[str, Any]] = {}
    for group, figures in found["groups"].items():
        kl = figures.get("kl")
        if kl is None or kl["second"] <= 0:
            raise InputError(
                "there is no loss to share out: evaluate both models with --reference, the original"
            )
        low_high = kl["interval"]
        shares[group] = {
            "kl": kl["second"],
            "first": kl["first"] / kl["second"],
            "second": kl["difference"] / kl["second"],
            "interval": None if low_high is None else [x / kl["second"] for x in low_high],
        }
    return shares


def difference(
    first: Run,
    second: Run,
    keys: list[str],
    column: str,
    weight: str,
    shape: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """One figure of both runs over `keys`, the difference and its interval."""
    runs = (first, second)
    values = [np.array([float(run.rows[key][column]) for key in keys]) for run in runs]
    weights = [np.array([float(run.rows[key].get(weight, 1)) for key in keys]) for run in runs]
    strata = [str(first.rows[key].get("domain", "")) for key in keys]
    numbers = np.unique(strata, return_inverse=True)[1]
    found, interval = paired_interval(values[0], values[1], weights[0], weights[1], numbers, shape)
    both = [float(shape(v.sum() / w.sum())) for v, w in zip(values, weights, strict=True)]
    return {
        "first": both[0],
        "second": both[1],
        "difference": found,
        "interval": None if interval is None else list(interval),
    }
