"""Repair of a pruned model: kept experts corrected layer by layer toward the original's output.

    for each layer:  run it whole on what the whole layers before it gave      -> h
                     run it pruned on what the repaired layers before it gave  -> h', w x
                     correct its down projections toward h - h' (reap/repair_fit.py), round them to
                     the source's own format, run it again                -> what the next gets

So a layer also makes up for what the ones before it still lack. One layer is in memory at a time.
The corrected tensors of a layer lie in a file of the job's folder until all are known and the
shards, whose sizes never depended on them, are written. A killed job goes on behind the last layer
for which hidden states of *both* models were saved.

Refused: models where the output of the routed experts is not simply added to the hidden states
(hyper-connections) or weighs their inputs (Llama-4), experts with biases, zero-computation experts,
and sources in integers or four bits, where rounding to nearest again would cost more than it mends.

Not built: a re-centred router bias and a distilled router (docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from calibration.batches import BATCH_TOKENS, PADDING, Batch
from calibration.hidden_states import Carry, HiddenStates
from calibration.stream import LayerWalk, SnapshotClock
from calibration.tokens import TokenSet
from models.architecture import ExpertTensor, ModelSpec
from models.byte_copy import ByteRange
from models.checkpoint import TORCH_DTYPES, TensorInfo
from models.dequantize import float_scales, scaled_blocks, unpack_eight_bits
from models.errors import InputError
from models.experts import RoutedBatch
from models.fp8_blocks import encode_fp8_blocks
from models.journal import Journal, write_atomically
from models.opening import OpenModel, compute_device, compute_dtype
from models.progress import Progress, Step, silent
from models.shards import read_header
from models.skeleton import Skeleton
from models.writer import OutputTensor
from reap.plan import PrunePlan
from reap.pruned_source import PrunedSource, pruned_view
from reap.repair_fit import HELD_OUT, LayerTokens, RepairKind, RoutedInputs, correct
from reap.score import check_tokens


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
        refuse_other_models(opened, plan)
        check_tokens(opened, settings.tokens)
        samples = len(settings.tokens.lengths())
        if "down" in settings.kinds and samples < HELD_OUT:
            raise InputError(
                f"--repair down holds out one sample of {HELD_OUT} to choose its ridge, the token "
                f"set has {samples}; make a larger one with thresher tokens"
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
        whole = self._walk(self.opened, journal.folder / "whole")
        cut = self._walk(self.pruned, journal.folder / "pruned")
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
                found[str(layer)] = LayerRepair(self, whole, cut, layer).run(journal)
            else:
                cut.run(layer)
            for walk in (whole, cut):
                walk.hidden_states.forget_from_ram(layer)
            if clock.due() or layer == layers[-1]:
                began = time.monotonic()
                saved = {"whole": whole.snapshot(layer + 1), "pruned": cut.snapshot(layer + 1)}
                journal.record(f"repaired {layer}", layers=found, **saved)
                for walk in (whole, cut):
                    walk.forget_before(layer + 1)
                clock.took(time.monotonic() - began)
            tokens = (layer + 1 - begin) * whole.num_tokens
            note = f"layer {layer}"
            progress(
                Step(job="repair", done=layer + 1, total=len(layers), tokens=tokens, note=note)
            )
        return {"repairs": list(self.settings.kinds), "layers": found}

    def _walk(self, opened: OpenModel, folder: Path) -> LayerWalk:
        memory = self.settings.memory
        states = HiddenStates(folder, None if memory is None else memory // 2)
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


def repaired_file(folder: Path, layer: int) -> Path:
    """The corrected tensors of one layer, under the output's names, while the job runs."""
    return folder / f"repaired_{layer:05d}.safetensors"


def refuse_other_models(opened: OpenModel, plan: PrunePlan) -> None:
    """InputError for a model that no repair is known for."""
    spec, moe = opened.spec, opened.spec.architecture.moe
    why = ""
    if moe.weights_input or spec.zero_experts:
        why = "its experts are weighted or counted otherwise"
    elif any(tensor.role == "down_bias" for tensor in moe.experts):
        why = "its experts have biases"
    by_own = {spec.canonical(name): name for name in opened.source.names()}
    for layer in plan.layers:
        if layer < spec.num_layers and not why:
            tensor = down_tensor(spec, by_own, layer)
            name = by_own[spec.expert_name(layer, None if tensor.stacked else 0, tensor)]
            stored = opened.source.format(name)
            if stored != "plain" and (stored != "fp8_block" or tensor.stacked):
                why = f"its experts are stored as {stored}"
    if why:
        raise InputError(
            f"{opened.checkpoint.root} cannot be repaired: {why}; prune without --repair"
        )


def down_tensor(spec: ModelSpec, names: Container[str | None], layer: int) -> ExpertTensor:
    """The kind of tensor that holds the layer's down projections; `names` are canonical."""
    for tensor in spec.architecture.moe.experts:
        probe = spec.expert_name(layer, None if tensor.stacked else 0, tensor)
        if tensor.role == "down" and probe in names:
            return tensor
    raise InputError(f"layer {layer} has no down projections; the checkpoint is incomplete")


class LayerRepair:
    """One layer: what its kept experts did, corrected, rounded as stored, and run again."""

    def __init__(self, repair: Repair, whole: LayerWalk, cut: LayerWalk, layer: int) -> None:
        self.repair, self.whole, self.cut, self.layer = repair, whole, cut, layer
        self.experts = cut.skeleton.experts[layer]
        self.routed: list[list[RoutedInputs]] = [[] for _ in range(self.experts.num_experts)]
        self.lacking: list[torch.Tensor] = []
        self.weight: list[torch.Tensor] = []
        self.held_out: list[torch.Tensor] = []
        self.number = self.seen = 0

    @torch.inference_mode()
    def run(self, journal: Journal) -> dict[str, Any]:
        """Correct the layer, write its file, leave what enters the next one; the facts."""
        cut, layer, skeleton = self.cut, self.layer, self.cut.skeleton
        current: list[Batch] = []
        skeleton.load_layer(layer, lambda record: self._routed(record, current[0]))
        cut.pass_through(layer, current, keep_output=False, left=self._left)
        tokens = LayerTokens(
            [join(own) for own in self.routed],
            torch.cat(self.lacking),
            torch.cat(self.weight),
            torch.cat(self.held_out),
        )
        self.routed, self.lacking = [], []
        down = DownProjections(self.repair.pruned, skeleton, layer)
        old_EDF = down.read()
        correction = correct(tokens, old_EDF, self.repair.settings.kinds)
        changed = (correction.down_EDF != old_EDF).flatten(1).any(1).tolist()
        files, rounded = down.stored(correction.down_EDF, changed)
        write_atomically(repaired_file(journal.folder, layer), save_tensors(files))
        weights = self.experts.weights
        assert weights is not None
        for expert, value_DF in rounded.items():
            own = value_DF.T if weights.transposed else value_DF
            weights.down[expert].copy_(own)
        self.experts.observe = None
        cut.pass_through(layer, current, keep_output=True, last_pass=True)
        skeleton.unload_layer(layer)
        return {
            "experts": sum(changed),
            "without_tokens": sum(not len(own.token_N) for own in tokens.experts),
            "ridge": correction.ridge,
            "error_left": correction.lacking,
        }

    def _routed(self, record: RoutedBatch, batch: Batch) -> None:
        """Each expert's tokens and what its down projection was fed, times the router's weight."""
        real_T = (batch.domain_T != PADDING).to(record.token_P.device)
        place_T = real_T.cumsum(0) - 1 + self.seen
        activated_PF = self.experts.activated(
            record.inputs_TD[record.token_P], record.expert_P, record.offsets_E
        )
        activated_PF = activated_PF * record.router_weights_P.to(activated_PF.dtype)[:, None]
        real_P = real_T[record.token_P]
        start = 0
        for expert, end in enumerate(record.offsets_E.tolist()):
            real_N, tokens_N = real_P[start:end], record.token_P[start:end]
            self.routed[expert].append(
                RoutedInputs(place_T[tokens_N[real_N]], activated_PF[start:end][real_N])
            )
            start = end
        self.seen += int(real_T.sum())

    def _left(self, batch: Batch, carry: Carry) -> None:
        """What the layer's output lacks."""
        hidden = carry["hidden_states"]
        if hidden.ndim != 3:
            raise InputError(
                f"layer {self.layer} hands on several streams of hidden states, to which no repair "
                "is known; prune without --repair"
            )
        wanted = self.whole.hidden_states.take(self.layer + 1, self.number, keep=True)
        self.number += 1
        real_T = (batch.domain_T != PADDING).to(hidden.device)
        wanted_TD = wanted["hidden_states"].to(hidden.device).flatten(0, 1)[real_T].float()
        self.lacking.append(wanted_TD - hidden.flatten(0, 1)[real_T].float())
        self.weight.append(wanted_TD.square().sum(1).clamp_min(1e-30).reciprocal())
        width = hidden.shape[1]
        held = [sample % HELD_OUT == HELD_OUT - 1 for sample in batch.samples]
        held_T = torch.tensor(held, device=hidden.device).repeat_interleave(width)
        self.held_out.append(held_T[real_T])


def join(parts: Sequence[RoutedInputs]) -> RoutedInputs:
    """An expert's tokens of all batches, in float32."""
    return RoutedInputs(
        torch.cat([part.token_N for part in parts]),
        torch.cat([part.inputs_NF for part in parts]).float(),
    )


class DownProjections:
    """The kept experts' down projections of one layer, as they are stored."""

    def __init__(self, pruned: OpenModel, skeleton: Skeleton, layer: int) -> None:
        self.source, self.skeleton = pruned.source, skeleton
        assert isinstance(pruned.source, PrunedSource)
        self.cut = pruned.source.cut
        self.tensor = down_tensor(pruned.spec, skeleton.names, layer)
        count = range(pruned.spec.num_experts_of(layer))
        stacked = self.tensor.stacked
        own = [pruned.spec.expert_name(layer, None if stacked else e, self.tensor) for e in count]
        self.names = [skeleton.names[name] for name in own]

    def _turned(self, value: torch.Tensor) -> torch.Tensor:
        return value.T if self.tensor.transposed else value

    def read(self) -> torch.Tensor:
        """float32 [E, D, F], as the source holds them."""
        device, stacked = self.skeleton.device, self.tensor.stacked
        return torch.stack(
            [
                self._turned(
                    self.source.read_expert(name, expert, torch.float32, device)
                    if stacked
                    else self.source.read(name, torch.float32, device)
                )
                for expert, name in enumerate(self.names)
            ]
        )

    def stored(
        self, down_EDF: torch.Tensor, changed: Sequence[bool]
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """(stored tensors by the output's names, what they decode to by expert) of the changed."""
        files: dict[str, torch.Tensor] = {}
        decoded: dict[int, torch.Tensor] = {}
        if self.tensor.stacked and any(changed):
            whole = self.source.read(self.names[0])
        for expert, name in enumerate(self.names):
            if not changed[expert]:
                continue
            value = self._turned(down_EDF[expert])
            if self.tensor.stacked:
                whole[expert] = value.to(whole.dtype)
                files[self._output_name(name)] = whole
                value = whole[expert].float()
            elif self.source.format(name) == "plain":
                (info,) = self.source.parts(name)
                kept = value.to(TORCH_DTYPES[info.dtype]).contiguous().cpu()
                files[self._output_name(info.name)] = kept
                value = kept.float()
            else:
                codes_info, scale_info = split_fp8(self.source.parts(name))
                old = self.source.checkpoint.read(scale_info.name).to(value.device)
                block = self.source.scale_block(name)
                codes, scale = encode_fp8_blocks(value, block, old)
                files[self._output_name(codes_info.name)] = codes.cpu()
                files[self._output_name(scale_info.name)] = scale.cpu()
                value = scaled_blocks(
                    codes, unpack_eight_bits, float_scales(scale), value.shape, block, torch.float32
                )
            decoded[expert] = self._turned(value)
        return files, decoded

    def _output_name(self, physical: str) -> str:
        name = self.cut.rename(physical)
        assert name is not None
        return name


def split_fp8(parts: Sequence[TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """The codes and the scales of a matrix in FP8 blocks."""
    (codes,) = (info for info in parts if info.dtype == "F8_E4M3")
    (scale,) = (info for info in parts if info.dtype != "F8_E4M3")
    return codes, scale
