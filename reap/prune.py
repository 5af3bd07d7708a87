"""Carrying out a prune plan: the kept experts' bytes, copied as they are.

Nothing is decoded. A kept expert keeps its bits, scales and packing included; only names change
(experts are renumbered 0..K−1 in their old order), and tensors with one row an expert (router
weights, correction biases, stacked experts) are cut by byte ranges. A source in FP8 gives an
output in FP8 that needs no new quantization. config.json is edited as a dict: keys that we do not
know survive, and the count keeps the spelling it has. (A transformers Config object, serialised
again, loses keys that serving engines need.)

MTP layers are built by engines from the same single expert count, so they are dropped (and the
config says 0 of them) or cut by their own plan. Layers routed by token id keep all experts; their
number goes into a key of our own (models/architecture.py, HASH_COUNT_KEY).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from models.errors import InputError
from models.journal import Journal, json_bytes, refuse_overlap
from models.manifest import read_manifest, versions, write_manifest
from models.progress import Progress, silent
from models.source_formats import Source
from models.writer import (
    MAX_SHARD_BYTES,
    OutputTensor,
    carry_files,
    check_output,
    plan_shards,
    write_file,
    write_shards,
)
from reap.cut import Cut
from reap.plan import PrunePlan


class Repairing(Protocol):
    """What corrects kept experts before they are written (reap/repair.py)."""

    @property
    def job(self) -> Mapping[str, Any]:
        """What is asked, for the job's identity."""

    def run(self, journal: Journal, progress: Progress) -> dict[str, Any]:
        """Correct, into the job's folder; what was done."""

    def replaced(self, tensors: Sequence[OutputTensor], folder: Path) -> list[OutputTensor]:
        """The output's tensors with the corrected ones in place."""


def prune_checkpoint(
    source: Source,
    plan: PrunePlan,
    out: Path,
    *,
    inputs: Mapping[str, Any] | None = None,
    repair: Repairing | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the pruned checkpoint to `out` and return its manifest.

    `inputs` (JSON: scores, tokens, mix and their digests) go into the manifest; `repair` corrects
    kept experts before they are written (reap/repair.py). Killed at any
    moment and called again, it goes on and ends with the same bytes. Raises InputError when plan
    and model do not fit, experts are missing, `out` is not ours, or the disk is full.
    """
    started = time.monotonic()
    plan.validate(source.spec)
    refuse_overlap(source.checkpoint.root, out)
    cut = Cut(source.spec, plan)
    check_experts(source, cut)
    shards = plan_shards(cut.tensors(source), max_shard_bytes)
    plan_json = json.dumps(plan.to_json()).encode()
    job = {
        "command": "prune",
        "source": source.checkpoint.digest(),
        "criterion": plan.criterion,
        "keep": plan.keep,
        "groups": plan.groups,
        "mtp": plan.mtp,
        "plan_sha256": hashlib.sha256(plan_json).hexdigest(),
        "max_shard_bytes": max_shard_bytes,
        "thresher": versions()["thresher"],
        **({"repair": dict(repair.job)} if repair is not None else {}),
    }
    adopt_plan(plan, out)
    with Journal.open(out, job, force) as journal:
        if journal.complete:
            return read_manifest(out)
        check_output(shards, journal)
        plan.save(journal.folder / "plan.json")
        write_file(journal, "plan.json", (journal.folder / "plan.json").read_bytes())
        write_file(journal, "config.json", json_bytes(cut.config()))
        root = source.checkpoint.root
        carry_files(root, source.checkpoint.other_files(), journal)
        repaired: dict[str, Any] = {}
        if repair is not None:
            repaired = {"repair": repair.run(journal, progress)}
            replaced = repair.replaced(list(cut.tensors(source)), journal.folder)
            shards = plan_shards(replaced, max_shard_bytes)
        write_shards(shards, journal, progress)
        facts = {
            "source": {"path": str(root.resolve()), "digest": job["source"]},
            "family": source.spec.family,
            "inputs": dict(inputs or {}),
            "num_experts": plan.num_experts,
            "keep": plan.keep,
            "total_size": shards.total_size,
            **repaired,
        }
        return write_manifest(journal, started, facts)


def adopt_plan(plan: PrunePlan, out: Path) -> None:
    """Let the folder of a plan made before (--plan-only) become the output of that very plan."""
    lone = out.is_dir() and [path.name for path in out.iterdir()] == ["plan.json"]
    if lone and PrunePlan.load(out / "plan.json").to_json() == plan.to_json():
        (out / "plan.json").unlink()


def check_experts(source: Source, cut: Cut) -> None:
    """InputError unless every planned layer has its router and all experts of each kind."""
    found: dict[tuple[int, str], set[int]] = {}
    routed: set[int] = set()
    every = set(range(cut.plan.num_experts))
    for name in source.names():
        place = source.spec.place(name)
        if place.layer is None or place.layer not in cut.plan.layers:
            continue
        if place.kind == "router":
            routed.add(place.layer)
        if place.kind == "expert":
            mine = found.setdefault((place.layer, str(place.role)), set())
            mine.update(every if place.expert is None else (place.expert,))
    for (layer, role), ids in sorted(found.items()):
        if ids != every:
            missing = sorted(every ^ ids)
            raise InputError(
                f"layer {layer} of {source.checkpoint.root} has {role} weights of {len(ids)} "
                f"experts, config.json says {cut.plan.num_experts} (see expert {missing[0]}); "
                "the checkpoint is incomplete"
            )
    for layer in cut.plan.layers:
        if layer not in routed or (layer, "down") not in found:
            what = "experts" if layer in routed else "router"
            raise InputError(
                f"layer {layer} of {source.checkpoint.root} has no {what} where a "
                f"{source.spec.architecture.title} model keeps them; the checkpoint is incomplete"
            )
