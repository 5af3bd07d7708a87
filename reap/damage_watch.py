"""Damage statistics of a walk: collected layer by layer, kept in files until the job ends."""

from __future__ import annotations

from pathlib import Path

from calibration.batches import Batch
from calibration.resume import Finish
from calibration.stream import BatchObserver, LayerWalk
from models.experts import RoutedBatch
from models.journal import Journal
from reap.damage import DamageCollector, sampled_rows
from reap.damage_file import write_layer_damage


class DamageWatch:
    """Collects a walk's damage statistics, one layer at a time, where any are asked for."""

    def __init__(self, walk: LayerWalk, journal: Journal, size: int) -> None:
        self.walk, self.journal, self.size = walk, journal, size
        self.rows = sampled_rows(walk.tokens, walk.cuts, size, packed=walk.pack) if size else {}
        self.collector: DamageCollector | None = None

    def beside(self, layer: int, observe: BatchObserver) -> BatchObserver:
        """`observe`, and with it what collects the layer's damage statistics."""
        if not self.size:
            return observe
        spec = self.walk.skeleton.spec
        collector = DamageCollector(
            layer, spec.num_experts, spec.top_k, self.rows, self.walk.processes
        )
        self.collector = collector

        def both(record: RoutedBatch, batch: Batch) -> None:
            observe(record, batch)
            collector.routed(record, batch)

        return both

    def finisher(self, layer: int) -> Finish:
        """What sees the layer's output, and its end: there the statistics are written."""
        collector = self.collector
        if collector is None or collector.layer != layer:
            return None, None

        def write() -> None:
            collector.gather()
            if self.walk.processes.is_first:
                found = collector.finish(self.walk.skeleton)
                write_layer_damage(damage_path(self.journal, layer), layer, found)
            self.collector = None

        return collector.left, write


def damage_path(journal: Journal, layer: int) -> Path:
    """One layer's damage statistics while the job runs."""
    return journal.folder / f"damage_{layer:05d}.safetensors"
