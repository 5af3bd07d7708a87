"""Writing a quantized checkpoint, layer by layer.

    for each layer:  run it on what the rounded layers before it gave   -> Hessians, ranges
                     round its matrices, put the decoded result in their place
                     run it again                                       -> what the next layer gets
                     write its shards

Rounding to nearest in a format without input scales needs no tokens and runs nothing. With
`propagate="original"` every layer sees the intact model's hidden states and is run once.

A layer's shards are written while the next one is computed. What a killed job has written counts:
shards are recorded one by one, hidden states in snapshots, once everything before them is written.
Layers after the last snapshot are computed again to the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from calibration.batches import BATCH_TOKENS
from calibration.hidden_states import HiddenStates
from calibration.resume import HIDDEN, begin_at, keep_place
from calibration.stream import LayerWalk, SnapshotClock
from calibration.tokens import TokenSet
from models.errors import InputError
from models.journal import Journal, json_bytes, refuse_overlap
from models.manifest import read_manifest, versions, write_manifest
from models.memory import release_freed_memory
from models.model_spec import ModelSpec
from models.needs import SNAPSHOT_SHARE
from models.opening import OpenModel, compute_device
from models.processes import ALONE, Processes
from models.progress import Progress, Step, silent
from models.shared_journal import open_journal
from models.skeleton import Skeleton
from models.writer import carry_files, write_file
from quant.config import with_quantization
from quant.export import export_config, extra_files
from quant.layer import LayerRounder
from quant.layer_rounding import LayerRounding
from quant.linears import Linear, head_module
from quant.output import UnitWriter
from quant.quantize_plan import (
    REST,
    QuantizePlan,
    QuantizeSettings,
    linears_of,
    needs_tokens,
    plan_quantization,
)
from quant.recipes import Recipe
from quant.sharing import round_layer
from quant.walked_layer import walk_layer


class Ahead(Protocol):
    """Work that goes before the rounding of each layer, in the same job (`compress`)."""

    @property
    def job(self) -> Mapping[str, Any]:
        """What is asked, for the job's identity."""

    def begin(self, journal: Journal, missing: Callable[[], int]) -> None:
        """The job is open; `missing` are the bytes of output still to be written."""

    def prepare(self, layer: int) -> None:
        """Make `layer` readable. Called for every layer in order, also when resuming."""

    def finish(self, journal: Journal) -> None:
        """All layers are written."""


def quantize(
    opened: OpenModel,
    recipe: Recipe,
    out: Path,
    settings: QuantizeSettings,
    *,
    tokens: TokenSet | None = None,
    inputs: Mapping[str, Any] | None = None,
    ahead: Ahead | None = None,
    force: bool = False,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Write `opened` quantized by `recipe` to `out` and return the manifest.

    `ahead` makes layers of `opened` readable before they are needed (a source that is pruned on
    the way); what it was asked to do is part of the job. Called in each of several `processes`,
    it deals batches and matrices among them (quant/sharing.py); the first one writes.

    Killed at any moment and called again, it goes on and ends with the same bytes. Raises
    InputError for conflicts between model, recipe and method, and for a folder that is not ours.
    """
    started = time.monotonic()
    refuse_overlap(opened.checkpoint.root, out)
    plan = plan_quantization(opened, recipe, settings)
    runs = needs_tokens(plan)
    if runs and tokens is None:
        raise InputError(
            f"{recipe.where} by {settings.method} needs calibration tokens; "
            "give --mix or --tokens, or use --method rtn with a format without input scales"
        )
    device = compute_device(settings.device)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS[device.type]
    job = {
        "command": "quantize",
        "source": opened.checkpoint.digest(),
        "recipe": recipe.to_json(),
        "method": settings.method,
        "tokens": tokens.digest() if runs and tokens is not None else None,
        "propagate": settings.propagate if runs else None,
        "device": device.type,
        "dtype": str(plan.dtype),
        "batch_tokens": batch_tokens if runs else None,
        "max_shard_bytes": settings.max_shard_bytes,
        "format": settings.layout,
        "versions": versions(),
        **(ahead.job if ahead is not None else {}),
    }
    with open_journal(out, job, force, processes) as journal:
        if journal.complete:
            return read_manifest(out)
        processes.from_first(lambda: begin_output(plan, journal))
        if ahead is not None:
            ahead.begin(journal, partial(plan.shards.missing_bytes, journal))
        walk = None
        if runs and tokens is not None:
            skeleton = Skeleton(opened.source, dtype=plan.dtype, device=device)
            states = HiddenStates(journal.folder / "hidden", settings.memory, journal.discard)
            walk = LayerWalk(skeleton, tokens, states, batch_tokens, processes=processes)
        run_layers(plan, walk, settings, device, journal, progress, ahead, processes)
        return processes.from_first(
            lambda: end_output(plan, journal, started, dict(inputs or {}), ahead)
        )


def begin_output(plan: QuantizePlan, journal: Journal) -> None:
    """What is written and checked before the first layer."""
    plan.shards.check(journal)
    write_config(plan, journal)


def end_output(
    plan: QuantizePlan,
    journal: Journal,
    started: float,
    inputs: Mapping[str, Any],
    ahead: Ahead | None,
) -> dict[str, Any]:
    """What is written behind the last layer; the manifest."""
    if ahead is not None:
        ahead.finish(journal)
    plan.shards.write_index(journal)
    opened = plan.opened
    facts = {
        "source": {
            "path": str(opened.checkpoint.root.resolve()),
            "digest": opened.checkpoint.digest(),
        },
        "family": opened.spec.family,
        "inputs": inputs,
        "recipe": plan.recipe.to_json(),
        "total_size": plan.shards.total_size,
        "rounding": summary(journal),
    }
    return write_manifest(journal, started, facts)


def write_config(plan: QuantizePlan, journal: Journal) -> None:
    """config.json with its quantization_config, and the files carried along."""
    opened = plan.opened
    spec, source = opened.spec, opened.source
    head = head_module(spec, {name: None for name in source.names()})
    quantization = export_config(plan.layout, plan.linears, plan.schemes, head)
    text_key = spec.architecture.text_config
    config = with_quantization(spec.config, quantization, text_key)
    for holder in (config, config.get(text_key or "", {})):
        for key in ("torch_dtype", "dtype"):
            if key in holder:
                holder[key] = str(plan.dtype).removeprefix("torch.")
    write_file(journal, "config.json", json_bytes(config))
    for name, content in extra_files(plan.layout, quantization).items():
        write_file(journal, name, content)
    carry_files(opened.checkpoint.root, opened.checkpoint.other_files(), journal)


def run_layers(
    plan: QuantizePlan,
    walk: LayerWalk | None,
    settings: QuantizeSettings,
    device: torch.device,
    journal: Journal,
    progress: Progress,
    ahead: Ahead | None,
    processes: Processes,
) -> None:
    """Round and write every unit; the loop of the module's docstring."""
    rounder = LayerRounder(
        plan.opened.source,
        plan.schemes,
        damping=plan.damping,
        scale_dtype=plan.dtype,
        device=device,
    )
    num_layers = plan.opened.spec.num_layers
    begin = 0 if walk is None else begin_at(walk, journal, "hidden")
    clock = SnapshotClock(SNAPSHOT_SHARE if ahead is None else SNAPSHOT_SHARE / 2)
    units = list(plan.by_unit)
    missing = partial(plan.shards.missing_bytes, journal)
    # of the last layer's inputs; its weights are let go. A job that goes on behind it reads them
    last_ranges: Mapping[str, float] = {}
    if walk is not None and begin == num_layers:
        last_ranges = journal.facts(f"hidden {num_layers - 1}").get("ranges", {})
    with UnitWriter() as writer:
        for number, unit in enumerate(units):
            layer = None if unit == REST else int(unit.split()[1])
            in_walk = walk is not None and layer is not None and layer < num_layers
            if ahead is not None and layer is not None:
                ahead.prepare(layer)
            if in_walk and walk is not None and layer is not None:
                if layer >= begin:
                    compressed = settings.propagate == "compressed"
                    own = linears_of(plan, layer)
                    result = walk_layer(rounder, walk, layer, own, compressed=compressed)
                    last_ranges = result.largest_input
                    if processes.is_first:
                        _write_unit(plan, unit, result, journal, writer)
                    del result
                    place = f"hidden {layer}"
                    keep_place(
                        {HIDDEN: walk},
                        journal,
                        place,
                        layer,
                        clock,
                        writer.wait,
                        leaves=False,
                        reserve=missing,
                        ranges=last_ranges if layer == num_layers - 1 else {},
                    )
            elif not processes.from_first(partial(is_written, plan, unit, journal)):
                if walk is None:  # nothing is run between two units: read on while one is rounded
                    following = units[min(number + 1, len(units) - 1)]
                    plan.opened.source.prefetch(plan.by_unit[following])
                linears = linears_of(plan, layer)
                result = round_layer(rounder, linears, processes)
                if last_ranges:
                    borrow_largest(result, last_ranges, plan.opened.spec, layer)
                if processes.is_first:
                    _write_unit(plan, unit, result, journal, writer)
                del result
            release_freed_memory()
            progress(
                Step(
                    job="quantize",
                    done=number + 1,
                    total=len(units),
                    tokens=0 if walk is None or layer is None else (layer + 1) * walk.num_tokens,
                    note=unit,
                )
            )


def is_written(plan: QuantizePlan, unit: str, journal: Journal) -> bool:
    """Whether a unit's shards are there and what is said of its rounding is recorded."""
    return plan.shards.written(unit, journal) and journal.done(f"rounded {unit}")


def borrow_largest(
    result: LayerRounding, last: Mapping[str, float], spec: ModelSpec, layer: int | None
) -> None:
    """Input ranges of an MTP layer, which is not run: those of the last decoder layer."""
    if layer is None:
        return
    old, new = f"layers.{spec.num_layers - 1}.", f"layers.{layer}."
    for module in result.quantized:
        same = last.get(module.replace(new, old, 1), 0.0)
        result.largest_input[module] = same


def _write_unit(
    plan: QuantizePlan,
    unit: str,
    result: LayerRounding,
    journal: Journal,
    writer: UnitWriter,
) -> None:
    """Pack what was rounded, and have it fetched, written and recorded."""
    writer.wait()  # one unit in memory besides this one
    made = {
        tensor.name: tensor
        for name in plan.by_unit[unit]
        for tensor in plan.tensors.made(name, result)
    }
    # sorted and summed so that the order of rounding, which processes share, does not show
    worst = sorted(result.errors.items(), key=lambda item: (-item[1], item[0]))[:3]
    facts = {
        "matrices": len(result.quantized),
        "without_tokens": result.without_tokens,
        "few_tokens": result.few_tokens,
        "fell_back": sorted(result.fell_back),
        "mean_error": math.fsum(result.errors.values()) / max(1, len(result.errors)),
        "worst": dict(worst),
        "by_kind": errors_by_kind(plan.linears, result.errors),
    }

    def write() -> None:
        plan.shards.write(unit, writer.download.all(made), journal)
        if not journal.done(f"rounded {unit}"):
            journal.record(f"rounded {unit}", **facts)

    writer.begin(write)


def errors_by_kind(
    linears: Sequence[Linear], errors: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """{"expert down_proj": {"matrices", "mean", "max"}, ...} of the relative output errors."""
    kinds = {linear.module: linear.place.kind for linear in linears}
    found: dict[str, list[float]] = {}
    for module, error in errors.items():
        found.setdefault(f"{kinds[module]} {module.rpartition('.')[2]}", []).append(error)
    return {
        kind: {"matrices": len(own), "mean": math.fsum(own) / len(own), "max": max(own)}
        for kind, own in sorted(found.items())
    }


def summary(journal: Journal) -> dict[str, Any]:
    """What the manifest says of the rounding, by unit."""
    return {
        unit.removeprefix("rounded "): {k: v for k, v in journal.facts(unit).items()}
        for unit in journal.units()
        if unit.startswith("rounded ")
    }
