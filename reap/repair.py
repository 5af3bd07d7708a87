"""Repair of a pruned model: kept experts corrected layer by layer toward the original's output.

    for each layer:  run it whole on what the whole layers before it gave      -> h
                     run it pruned on what the repaired layers before it gave  -> h', w x
                     correct its down projections toward h - h' (reap/repair_fit.py) and what is
                     before them (reap/repair_descent.py), round them to the source's own format,
                     run it again                                         -> what the next gets

So a layer also makes up for what the ones before it still lack. One layer is in memory at a time.
The corrected tensors of a layer lie in a file of the job's folder until all are known and the
shards, whose sizes never depended on them, are written. A killed job goes on behind the last layer
for which hidden states of *both* models were saved.

Refused: models where the output of the routed experts is not simply added to the hidden states
(hyper-connections) or weighs their inputs (Llama-4), experts with biases, zero-computation experts,
and sources in integers or four bits, where rounding to nearest again would cost more than it mends.

Not shipped, because they hardly helped: a re-centred router bias, a distilled router, and choosing
the experts behind the repaired layers (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.batches import BATCH_TOKENS
from calibration.hidden_states import HiddenStates
from calibration.resume import keep_place
from calibration.stream import LayerWalk, SnapshotClock
from calibration.tokens import TokenSet
from models.byte_copy import ByteRange
from models.errors import InputError
from models.journal import Journal
from models.opening import OpenModel, compute_device, compute_dtype
from models.progress import Progress, Step, silent
from models.shards import read_header
from models.skeleton import Skeleton
from models.writer import OutputTensor
from reap.plan import PrunePlan
from reap.pruned_source import pruned_view
from reap.repair_fit import HELD_OUT, RepairKind
from reap.repair_layer import LayerRepair, repaired_file
from reap.score import check_tokens
from reap.stored_experts import expert_tensor, up_roles


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairSettings:
    """What to repair by which tokens. `memory` bounds hidden states in host RAM, in bytes."""

    kinds: tuple[RepairKind, ...]
    tokens: TokenSet
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    batch_tokens: int | None = None


class Repair:
    """The repair of one pruned model, in the job of `prune`."""

    def __init__(self, opened: OpenModel, plan: PrunePlan, settings: RepairSettings) -> None:
        """InputError when the model is one that cannot be repaired."""
        self.opened, self.plan, self.settings = opened, plan, settings
        self.device = compute_device(settings.device)
        self.dtype = compute_dtype(opened.spec, settings.dtype)
        self.batch_tokens = settings.batch_tokens or BATCH_TOKENS[self.device.type]
        self.pruned = pruned_view(opened, plan)
        refuse_other_models(opened, plan, settings.kinds)
        check_tokens(opened, settings.tokens)
        samples = len(settings.tokens.lengths())
        choosing = [kind for kind in settings.kinds if kind != "scales"]
        if choosing and samples < HELD_OUT:
            raise InputError(
                f"--repair {choosing[0]} holds out one sample of {HELD_OUT} to choose how far it "
                f"goes, the token set has {samples}; make a larger one with thresher tokens"
            )

    @property
    def job(self) -> dict[str, Any]:
        """What is asked, for the job's identity."""
        return {
            "kinds": list(self.settings.kinds),
            "tokens": self.settings.tokens.digest(),
            "device": self.device.type,
            "dtype": str(self.dtype),
            "batch_tokens": self.batch_tokens,
            "torch": torch.__version__,
        }

    def run(self, journal: Journal, progress: Progress = silent) -> dict[str, Any]:
        """Repair every layer that is not yet; what was done, by layer."""
        whole = self._walk(self.opened, journal, "whole")
        cut = self._walk(self.pruned, journal, "pruned")
        layers = range(whole.num_layers)
        done = [layer for layer in layers if journal.done(f"repaired {layer}")]
        begin = max(done, default=-1) + 1
        if begin == 0:
            whole.embed()
            cut.embed()
        else:
            facts = journal.facts(f"repaired {begin - 1}")
            whole.hidden_states.expect(begin, facts["whole"])
            cut.hidden_states.expect(begin, facts["pruned"])
        clock = SnapshotClock()
        found: dict[str, Any] = {}
        if begin:
            found |= journal.facts(f"repaired {begin - 1}")["layers"]
        for layer in layers[begin:]:
            whole.run(layer)
            if layer in self.plan.layers:
                found[str(layer)] = self._layer(whole, cut, layer).run(journal)
            else:
                cut.run(layer)
            for walk in (whole, cut):
                walk.hidden_states.forget_from_ram(layer)
            walks, unit = {"whole": whole, "pruned": cut}, f"repaired {layer}"
            # nothing reads what leaves the last layer
            keep_place(walks, journal, unit, layer, clock, leaves=False, layers=found)
            tokens = (layer + 1 - begin) * whole.num_tokens
            note = f"layer {layer}"
            progress(
                Step(job="repair", done=layer + 1, total=len(layers), tokens=tokens, note=note)
            )
        return {"repairs": list(self.settings.kinds), "layers": found}

    def _layer(self, whole: LayerWalk, cut: LayerWalk, layer: int) -> LayerRepair:
        return LayerRepair(self.pruned, self.settings.kinds, whole, cut, layer)

    def _walk(self, opened: OpenModel, journal: Journal, name: str) -> LayerWalk:
        memory = self.settings.memory
        budget = None if memory is None else memory // 2
        states = HiddenStates(journal.folder / name, budget, journal.discard)
        skeleton = Skeleton(opened.source, dtype=self.dtype, device=self.device)
        return LayerWalk(skeleton, self.settings.tokens, states, self.batch_tokens)

    def replaced(self, tensors: Sequence[OutputTensor], folder: Path) -> list[OutputTensor]:
        """The output's tensors, those that were repaired taken from the job's folder."""
        made: dict[str, ByteRange] = {}
        for layer in self.plan.layers:
            file = repaired_file(folder, layer)
            if file.exists():
                for info in read_header(file).tensors:
                    made[info.name] = ByteRange(file, info.offset, info.nbytes)
        return [
            replace(tensor, ranges=(made[tensor.name],)) if tensor.name in made else tensor
            for tensor in tensors
        ]


def refuse_other_models(opened: OpenModel, plan: PrunePlan, kinds: Sequence[RepairKind]) -> None:
    """InputError for a model that no repair is known for."""
    spec, moe = opened.spec, opened.spec.architecture.moe
    why = ""
    if moe.weights_input or spec.zero_experts:
        why = "its experts are weighted or counted otherwise"
    elif any(tensor.role.endswith("_bias") for tensor in moe.experts):
        why = "its experts have biases"
    by_own = {spec.canonical(name): name for name in opened.source.names()}
    for layer in plan.layers:
        if layer < spec.num_layers and not why:
            before = up_roles(spec, by_own, layer) if "up" in kinds else ()
            for role in (*before, "down"):
                tensor = expert_tensor(spec, by_own, layer, role)
                if tensor is None:
                    raise InputError(
                        f"layer {layer} has no {role} projections; the checkpoint is incomplete"
                    )
                name = by_own[spec.expert_name(layer, None if tensor.stacked else 0, tensor)]
                stored = opened.source.format(name)
                if stored != "plain" and (stored != "fp8_block" or tensor.stacked):
                    why = f"its experts are stored as {stored}"
    if why:
        raise InputError(
            f"{opened.checkpoint.root} cannot be repaired: {why}; prune without --repair"
        )
