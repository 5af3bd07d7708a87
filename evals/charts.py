"""What the pictures show, as numbers: the same charts are drawn as SVG (report) and PNG (card).

    saliency    layer x expert, the plan's criterion relative to the layer's largest; dropped marked
    load        layer x expert for each domain, tokens relative to an even share
    rounding    layer x kind of matrix, mean relative error of the outputs
    damage      KL when one layer alone is replaced
    context     KL by the number of tokens seen
    tradeoff    size against KL, one point a variant

A chart whose figures no file holds is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.evidence import Evidence
from models.checkpoint import Checkpoint
from models.journal import MANIFEST, read_object
from reap.criteria import CRITERIA, score_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """`values` [rows, columns], NaN where there is none; `marked` cells are grey.

    Colours run from `low` to `high`. Cells are labelled with their value when `labelled`.
    """

    name: str
    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    column_title: str
    values: np.ndarray
    low: float
    high: float
    marked: np.ndarray | None = None
    marked_word: str = ""
    labelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One bar a label."""

    name: str
    title: str
    note: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Point:
    """One variant: x size in bytes, y KL and its interval."""

    label: str
    x: float
    y: float
    interval: tuple[float, float] | None
    own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Points with vertical intervals."""

    name: str
    title: str
    note: str
    points: tuple[Point, ...]


Chart = HeatMap | Bars | Scatter


def unit_of(chart: Scatter) -> tuple[float, str]:
    """Bytes in the unit of the x axis, and its name."""
    return (1e9, "GB") if max(point.x for point in chart.points) >= 1e9 else (1e6, "MB")


def label_heights(places: Sequence[tuple[float, float]], line: float, reach: float) -> list[float]:
    """Heights at which labels right of the points (x, y) do not run into each other: each goes up
    from its own point until nothing is within `line` in height and `reach` in width."""
    found = [0.0] * len(places)
    taken: list[tuple[float, float]] = []
    for index in sorted(range(len(places)), key=lambda i: (places[i][1], places[i][0])):
        x, height = places[index]
        others = [p for i, p in enumerate(places) if i != index and p[0] > x] + taken
        while any(abs(height - h) < line and abs(x - there) < reach for there, h in others):
            height += line / 2
        found[index] = height
        taken.append((x, height))
    return found


def charts(evidence: Evidence) -> Iterator[Chart]:
    """Every chart there are figures for."""
    yield from tradeoff(evidence)
    yield from saliency(evidence)
    yield from load(evidence)
    yield from rounding(evidence)
    yield from damage(evidence)
    yield from context(evidence)


def saliency(evidence: Evidence) -> Iterator[HeatMap]:
    """The scores that decided, and what was dropped."""
    stats, plan = evidence.saliency, evidence.plan
    if stats is None:
        return
    criterion = plan.criterion if plan is not None and plan.criterion in CRITERIA else "reap"
    layers = sorted(stats.layers if plan is None else plan.layers)  # without dropped MTP layers
    values = np.stack(
        [
            score_experts(
                criterion, stats.pooled(n), layer=n, seed=plan.seed if plan else 0
            ).numpy()
            for n in layers
        ]
    )
    values = np.where(np.isfinite(values), values, np.nan)
    values = values / np.nanmax(values, axis=1, keepdims=True)
    marked = None
    if plan is not None:
        marked = np.zeros(values.shape, dtype=bool)
        for row, layer in enumerate(layers):
            marked[row, list(plan.dropped(layer))] = True
    yield HeatMap(
        name="saliency",
        title=f"Saliency of every expert ({criterion})",
        note="Relative to the largest of its layer. "
        + ("Grey: dropped." if marked is not None else ""),
        rows=tuple(f"layer {layer}" for layer in layers),
        columns=tuple(map(str, range(stats.num_experts))),
        column_title="expert",
        values=values,
        low=0.0,
        high=1.0,
        marked=marked,
        marked_word="dropped",
    )


def load(evidence: Evidence) -> Iterator[HeatMap]:
    """How often experts were called, by domain."""
    stats = evidence.saliency
    if stats is None:
        return
    layers = sorted(stats.layers)
    for place, domain in enumerate(stats.domains):
        counts = np.stack([stats.layers[n].sums.count[place].numpy() for n in layers])
        if not counts.sum():
            continue
        shares = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-12)
        yield HeatMap(
            name=f"load-{domain}",
            title=f"Expert load, {domain}",
            note="Tokens routed to an expert relative to an even share (1); colours end at 3.",
            rows=tuple(f"layer {layer}" for layer in layers),
            columns=tuple(map(str, range(stats.num_experts))),
            column_title="expert",
            values=shares,
            low=0.0,
            high=3.0,
        )


def rounding(evidence: Evidence) -> Iterator[HeatMap]:
    """Errors that quantization recorded, for this checkpoint and the variants still there."""
    found = {"": evidence.rounding}
    for one in evidence.judged:
        manifest = None if one.own else read_object(Path(one.path) / MANIFEST)
        if manifest is not None and "rounding" in manifest:
            found[one.name] = manifest["rounding"]
    for name, units in found.items():
        yield from rounding_map(name, units)


def rounding_map(name: str, units: dict[str, Any]) -> Iterator[HeatMap]:
    """One checkpoint's errors by layer and kind."""
    rows = {unit: own.get("by_kind") or {} for unit, own in units.items()}
    rows = {unit: own for unit, own in rows.items() if own}
    if not rows:
        return
    kinds = sorted({kind for own in rows.values() for kind in own})
    values = np.array(
        [[own[k]["mean"] if k in own else np.nan for k in kinds] for own in rows.values()]
    )
    yield HeatMap(
        name="rounding" + (f"-{name}" if name else ""),
        title="Quantization error by layer and kind of matrix" + (f", {name}" if name else ""),
        note="Mean relative squared error of the outputs on calibration tokens, as GPTQ left it.",
        rows=tuple(rows),
        columns=tuple(kinds),
        column_title="kind of matrix",
        values=values,
        low=0.0,
        high=float(np.nanmax(values)),
        labelled=True,
    )


def damage(evidence: Evidence) -> Iterator[Bars]:
    """KL by layer replaced."""
    found = evidence.by_layer
    if found:
        yield Bars(
            name="damage",
            title="KL when one layer alone is the compressed one",
            note=f"All other layers are the reference's. {found['tokens']:,} tokens; nats a token.",
            labels=tuple(f"layer {layer}" for layer in found["kl"]),
            values=tuple(found["kl"].values()),
            unit="nats",
        )


def context(evidence: Evidence) -> Iterator[Bars]:
    """KL by context length."""
    own = evidence.fidelity
    rows = [r for r in (own.result.get("by_position") or ()) if r["kl"] is not None] if own else []
    if rows:
        yield Bars(
            name="context",
            title="KL by tokens seen",
            note="Mean over predictions made from that many tokens; nats a token.",
            labels=tuple(f"{row['context'][0]:,}-{row['context'][1]:,}" for row in rows),
            values=tuple(row["kl"] for row in rows),
            unit="nats",
        )


def tradeoff(evidence: Evidence) -> Iterator[Scatter]:
    """Size against KL of everything judged on the same tokens against the same model."""
    own = evidence.fidelity
    points = []
    for one in evidence.judged:
        alike = own is None or one.like(own)
        if not alike or one.result["kl"] is None or not Path(one.path, "config.json").is_file():
            continue
        num_bytes = sum(t.nbytes for t in Checkpoint.open(one.path).tensors.values())
        interval = (one.result.get("intervals") or {}).get("kl")
        pair = None if interval is None else (interval[0], interval[1])
        name = evidence.folder.resolve().name if one.name == "model" else one.name
        points.append(Point(name, num_bytes, one.result["kl"], pair, one.own))
    if points:
        yield Scatter(
            name="tradeoff",
            title="Size against KL",
            note="KL from the reference, nats a token; bars: 95 % intervals.",
            points=tuple(points),
        )
