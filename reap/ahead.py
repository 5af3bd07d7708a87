"""Scoring and planning one layer at a time, ahead of whoever reads the pruned layers.

The intact model is walked beside the compressed one: layer L of the intact stream is scored, its
keep-set chosen exactly as `score` and `prune` would, and only then can layer L of the pruned
source be read. So a model is scored, pruned and quantized in one pass over its layers (the second
reading of a layer finds it in the page cache), and the plan equals that of the separate commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from calibration.hidden_states import HiddenStates
from calibration.resume import HIDDEN, begin_at, keep_place
from calibration.stream import LayerWalk, SnapshotClock
from calibration.tokens import TokenSet
from models.journal import Journal
from models.needs import SNAPSHOT_SHARE
from models.opening import OpenModel
from models.processes import ALONE, Processes
from models.skeleton import Skeleton
from models.writer import write_file
from reap.criteria import OUTPUT_ERROR, score_experts
from reap.damage import SAMPLED_TOKENS
from reap.damage_file import read_layer_damage
from reap.damage_watch import DamageWatch, damage_path
from reap.elimination import least_damaging
from reap.plan import PrunePlan, best_experts
from reap.pruned_source import PrunedSource
from reap.quotas import GroupMode, quota_groups
from reap.score import read_layer, summing_batches, write_layer
from reap.shared_sums import SharedSums
from reap.stats import LayerStats, SaliencyStats

NAME = "intact"


@dataclass(slots=True)
class PruneAhead:
    """Fills `source.kept` layer by layer from scores of the intact model `opened`."""

    opened: OpenModel
    source: PrunedSource
    tokens: TokenSet
    criterion: str
    groups: GroupMode
    seed: int
    device: torch.device
    dtype: torch.dtype
    memory: int | None
    batch_tokens: int
    processes: Processes = ALONE
    walk: LayerWalk | None = None
    journal: Journal | None = None
    missing: Callable[[], int] = lambda: 0
    next_layer: int = 0
    clock: SnapshotClock = field(default_factory=lambda: SnapshotClock(SNAPSHOT_SHARE / 2))
    damage: DamageWatch | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def job(self) -> Mapping[str, Any]:
        """What is asked, for the job's identity."""
        return {
            "command": "compress",
            "keep": self.source.plan.keep,
            "criterion": self.criterion,
            "groups": self.groups,
            "seed": self.seed,
            "score_tokens": self.tokens.digest(),
        }

    def begin(self, journal: Journal, missing: Callable[[], int]) -> None:
        """Open the intact stream, behind its last snapshot."""
        self.journal, self.missing = journal, missing
        skeleton = Skeleton(self.opened.source, dtype=self.dtype, device=self.device)
        states = HiddenStates(journal.folder / "hidden-intact", self.memory, journal.discard)
        self.walk = LayerWalk(
            skeleton, self.tokens, states, self.batch_tokens, processes=self.processes
        )
        size = SAMPLED_TOKENS if self.criterion == OUTPUT_ERROR else 0
        self.damage = DamageWatch(self.walk, journal, size)
        self.next_layer = begin_at(self.walk, journal, NAME)

    def prepare(self, layer: int) -> None:
        """Score `layer` in the intact model, where that is not done yet, and cut it."""
        assert self.walk is not None
        while self.next_layer <= min(layer, self.walk.num_layers - 1):
            self._score(self.next_layer)
            self.next_layer += 1
        if layer in self.source.plan.layers:
            kept, error = self.processes.from_first(lambda: self._choose(layer))
            self.source.keep(layer, kept)
            if error is not None:
                self.errors[str(layer)] = round(error, 6)

    def _choose(self, layer: int) -> tuple[tuple[int, ...], float | None]:
        """The experts `layer` keeps and, by output error, what it costs."""
        sums = self._stats(layer).pooled()
        num_groups = quota_groups(self.opened.spec, self.groups)
        keep = self.source.plan.keep
        if self.criterion == OUTPUT_ERROR:
            assert self.journal is not None
            damage = read_layer_damage(damage_path(self.journal, layer), layer)
            return least_damaging(damage, keep, num_groups, sums)
        scores = score_experts(self.criterion, sums, layer=layer, seed=self.seed)
        return best_experts(scores, keep, num_groups), None

    def _score(self, layer: int) -> None:
        walk, journal = self.walk, self.journal
        assert walk is not None
        assert journal is not None
        if layer in self.source.plan.layers:
            num_experts, domains = self.opened.spec.num_experts, tuple(self.tokens.domains)
            sums = SharedSums(self.processes, num_experts, domains, self.device)
            assert self.damage is not None
            observe = self.damage.beside(layer, summing_batches(sums))
            walk.run(layer, observe, *self.damage.finisher(layer))
            write_layer(journal, layer, sums)
        else:
            walk.run(layer)
        walk.hidden_states.forget_from_ram(layer)
        place = f"{NAME} {layer}"
        walks = {HIDDEN: walk}
        keep_place(walks, journal, place, layer, self.clock, leaves=False, reserve=self.missing)

    def _stats(self, layer: int) -> LayerStats:
        assert self.journal is not None
        domains = tuple(self.tokens.domains)
        return read_layer(self.journal, layer, self.opened.spec.num_experts, domains)

    def finish(self, journal: Journal) -> None:
        """plan.json, as `prune` writes it."""
        stats = SaliencyStats(
            layers={layer: self._stats(layer) for layer in self.source.plan.layers},
            tokens={name: counts["tokens"] for name, counts in self.tokens.counts().items()},
            model=self.opened.checkpoint.root.name,
        )
        plan = PrunePlan(
            criterion=self.criterion,
            num_experts=self.opened.spec.num_experts,
            keep=self.source.plan.keep,
            layers=dict(self.source.kept),
            groups=self.groups,
            seed=self.seed,
            dead_experts=stats.dead_experts(),
            saliency_sha256=stats.digest(),
            model_digest=self.opened.checkpoint.digest(),
            evidence={"layer_error": self.errors} if self.errors else {},
        )
        plan.validate(self.opened.spec)
        plan.save(journal.folder / "plan.json")
        write_file(journal, "plan.json", (journal.folder / "plan.json").read_bytes())
