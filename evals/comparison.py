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

from calibration.mixes import ALL
from evals.intervals import interval_of, paired_interval
from evals.tally import perplexities
from models.errors import InputError
from models.journal import MANIFEST, read_object

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
TO_REFERENCE = ("kl", "top1_agreement")
NO_LOSS = "there is no loss to share out: evaluate both models with --reference, the original"


@dataclass(frozen=True, slots=True)
class Run:
    """The lines of one run by their key, and the digests of what it was run on and of the model
    that it was compared with ("": not known)."""

    path: Path
    rows: dict[str, dict[str, Any]]
    is_task: bool
    data: str
    reference: str


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
    is_task = any("item" in row for row in rows.values())
    return Run(found[0], rows, is_task, *digests(found[0].parent))


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a run by item or sample. InputError naming the line that is neither."""
    rows: dict[str, dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").split("\n")  # answers may hold other line ends
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
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


def digests(folder: Path) -> tuple[str, str]:
    """The digests of tokens or items, and of the reference, by the run's manifest."""
    job = (read_object(folder / MANIFEST) or {}).get("job") or {}
    reference = (job.get("models") or {}).get("reference")
    return str(job.get("tokens") or job.get("data") or ""), str(reference or "")


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """{"samples": n, "groups": {"all" | domain: {figure: {first, second, difference, interval}}},
    "left_out": figures}: distances to a reference, where the runs have different ones.

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
    left_out = [] if same_reference(first, second) else list(TO_REFERENCE)
    return {
        "samples": len(first.rows),
        "groups": {
            name: {
                figure: difference(first, second, own, *used)
                for figure, used in figures.items()
                if figure not in left_out
                and all(used[0] in run.rows[key] for run in (first, second) for key in own)
            }
            for name, own in groups_of(first).items()
        },
        "left_out": left_out,
    }


def same_reference(first: Run, second: Run) -> bool:
    """Whether both were compared with one model, as far as that is on record."""
    return first.reference == second.reference or not (first.reference and second.reference)


def groups_of(run: Run) -> dict[str, list[str]]:
    """Keys of all samples and, where there are several, of each domain."""
    domains: dict[str, list[str]] = {}
    for key, row in run.rows.items():
        domains.setdefault(str(row.get("domain", "")), []).append(key)
    if len(domains) == 1:
        domains = {}
    if ALL in domains:
        raise InputError(
            f"{run.path} has a domain named `{ALL}`, as the total is; name it otherwise in the "
            "mix and evaluate again"
        )
    return {ALL: list(run.rows), **domains}


def shares_of_loss(first: Run, second: Run) -> dict[str, dict[str, Any]]:
    """Of SECOND's KL to the original, what the step to FIRST lost and what the one after it added.

    FIRST is pruned and SECOND the same model rounded, runs that `compare_runs` takes:
    {"all" | domain: {"kl", "first", "second", "interval"}}, the interval that of the second share.
    InputError when a run has no KL, or not to the same model.
    """
    if not same_reference(first, second):
        raise InputError(
            f"{first.path} and {second.path} were compared with different models; evaluate both "
            "with --reference, the original"
        )
    shares: dict[str, dict[str, Any]] = {}
    for group, keys in groups_of(first).items():
        if not all("kl" in run.rows[key] for run in (first, second) for key in keys):
            raise InputError(NO_LOSS)
        shares[group] = share(*columns(first, second, keys, "kl", "tokens"))
    return shares


def share(kls: list[np.ndarray], tokens: list[np.ndarray], strata: np.ndarray) -> dict[str, Any]:
    """One group's shares; the interval is of the ratio itself, both sums drawn together."""

    def means(counts: np.ndarray) -> list[np.ndarray]:
        return [counts @ kl / (counts @ own) for kl, own in zip(kls, tokens, strict=True)]

    def second(counts: np.ndarray) -> np.ndarray:
        pruned, whole = means(counts)
        return 1 - pruned / whole

    once = np.ones((1, len(strata)))
    kl = float(means(once)[1][0])
    if kl <= 0:
        raise InputError(NO_LOSS)
    added, interval = float(second(once)[0]), interval_of(second, strata)
    return {
        "kl": kl,
        "first": 1 - added,
        "second": added,
        "interval": None if interval is None else list(interval),
    }


def columns(
    first: Run, second: Run, keys: list[str], column: str, weight: str
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Values and weights of both runs, and the number of each key's domain."""
    rows = [[run.rows[key] for key in keys] for run in (first, second)]
    values = [np.array([float(row[column]) for row in own]) for own in rows]
    weights = [np.array([float(row.get(weight, 1)) for row in own]) for own in rows]
    domains = [str(row.get("domain", "")) for row in rows[0]]
    return values, weights, np.unique(domains, return_inverse=True)[1]


def difference(
    first: Run,
    second: Run,
    keys: list[str],
    column: str,
    weight: str,
    shape: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """One figure of both runs over `keys`, the difference and its interval."""
    values, weights, strata = columns(first, second, keys, column, weight)
    found, interval = paired_interval(values[0], values[1], weights[0], weights[1], strata, shape)
    both = [float(shape(v.sum() / w.sum())) for v, w in zip(values, weights, strict=True)]
    return {
        "first": both[0],
        "second": both[1],
        "difference": found,
        "interval": None if interval is None else list(interval),
    }
