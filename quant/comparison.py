"""A written checkpoint against its source, tensor by tensor.

Experts are told apart by the plan that lies with the checkpoint (plan.json: kept ids, ascending;
new id i is the i-th of them); without one, or when the source is the pruned model, ids are equal.
A tensor the source stores under the same name, type and shape must have the same bits; a
quantized matrix is compared by ||W − Ŵ|| / ||W|| with both decoded (quant/matrix_errors.py);
anything else (a decoded FP8 matrix kept in 16 bits) by the same ratio, which one rounding to
bfloat16 leaves below 2^−8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from models.architecture import expert_axis
from models.checkpoint import Checkpoint, TensorInfo
from models.errors import InputError
from models.model_spec import ModelSpec
from models.opening import OpenModel
from quant.linears import Linear, find_linears
from quant.matrix_errors import ratio
from quant.spec_decoder import Array

PLAN = "plan.json"
CHUNK_BYTES = 1 << 28
ROUNDED = 2.0**-8  # relative error of one rounding to bfloat16, with room


def kept_experts(root: Path, spec: ModelSpec, source: ModelSpec) -> dict[int, tuple[int, ...]]:
    """Layer -> old ids of the kept experts; {} when source and checkpoint count the same.

    InputError when they differ and no plan of this source lies with the checkpoint.
    """
    if spec.num_experts == source.num_experts:
        return {}
    path = root / PLAN
    try:
        plan = json.loads(path.read_bytes())
        layers = {int(layer): tuple(map(int, kept)) for layer, kept in plan["layers"].items()}
        fits = plan["num_experts"] == source.num_experts and plan["keep"] == spec.num_experts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{root} has {spec.num_experts} experts a layer, the source {source.num_experts}, and "
            f"{path} cannot be read ({error}); give the pruned model as --source, or put its "
            "plan.json there"
        ) from error
    if not fits:
        raise InputError(
            f"{path} does not lead from {source.num_experts} experts to {spec.num_experts}; give "
            "the model it was made for as --source"
        )
    return layers


class Comparison:
    """The source of a checkpoint, asked for what each tensor should be."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, opened: OpenModel) -> None:
        """InputError when the two are not of one family or the plan does not fit."""
        if spec.family != opened.spec.family:
            raise InputError(
                f"{checkpoint.root} is a {spec.architecture.title} model, the source a "
                f"{opened.spec.architecture.title}; give the model it was made from as --source"
            )
        self.checkpoint, self.spec = checkpoint, spec
        self.source, self.source_spec = opened.source, opened.spec
        self.kept = kept_experts(checkpoint.root, spec, opened.spec)
        shapes = {name: self.source.shape(name) for name in self.source.names()}
        self.linears: Mapping[str, Linear] = {
            linear.module: linear for linear in find_linears(opened.spec, shapes)
        }
        self.seen: set[str] = set()

    def old_name(self, name: str) -> str:
        """The source's name of a tensor or module, its expert numbered as there."""
        module = name if name.endswith("_proj") else name.rpartition(".")[0]
        for probe in (module + ".weight", name, name + ".weight"):
            place = self.spec.place(probe)
            if place.layer in self.kept and place.expert is not None:
                old = self.kept[place.layer][place.expert]
                pattern = rf"(layers\.{place.layer}\..*?experts\.){place.expert}\."
                return re.sub(pattern, rf"\g<1>{old}.", name + ".", count=1)[:-1]
        return name

    def weight(self, module: str) -> Array | None:
        """What a quantized matrix should be, float32 [N, K]; None when the source has none."""
        linear = self.linears.get(self.old_name(module))
        if linear is None or linear.refusal is not None:
            return None
        self.seen.add(linear.logical)
        if linear.stacked:
            assert linear.place.expert is not None
            weight = self.source.read_expert(linear.logical, linear.place.expert, torch.float32)
            weight = weight.T if linear.transposed else weight
            if linear.rows is not None:
                weight = weight[linear.rows[0] : linear.rows[1]]
        else:
            weight = self.source.read(linear.logical, torch.float32)
        return weight.numpy()

    def plain_error(self, info: TensorInfo) -> tuple[float, float] | None:
        """(the same ratio of an unquantized tensor, 0.0 where the bits are equal, the most it may
        be: 0 where the type is the source's own); None as above."""
        name = self.old_name(info.name)
        theirs = self.source.checkpoint.tensors.get(name)
        rows = self._rows(info)
        if theirs is not None and theirs.dtype == info.dtype:
            self.seen.update(self._logical(name))
            if rows is None and theirs.shape != info.shape:
                return float("inf"), 0.0
            return max(self._piece_errors(info, theirs, rows), default=0.0), 0.0
        if name not in self.source.stored or rows is not None:
            return None
        self.seen.add(name)
        mine = self.checkpoint.read(info.name)
        if self.source.shape(name) != tuple(mine.shape):
            return float("inf"), ROUNDED
        weight = self.source.read(name, torch.float32)
        return relative_error(weight.numpy(), mine.float().numpy()), ROUNDED

    def _logical(self, physical: str) -> Iterator[str]:
        module = physical.rpartition(".")[0]
        for name in (physical, module + ".weight", re.sub(r"_(blocks|scales)$", "", physical)):
            if name in self.source.stored:
                yield name

    def _rows(self, info: TensorInfo) -> list[int] | None:
        """Rows of the source's tensor that were kept, where it has one an expert."""
        place = self.spec.place(re.sub(r"_(blocks|scales|scale_inv)$", "", info.name))
        if place.layer not in self.kept:
            return None
        kept = list(self.kept[place.layer])
        if place.kind == "router":
            first = self.source_spec.num_experts
            return kept + list(range(first, first + self.source_spec.zero_experts))
        return kept if place.kind == "expert" and place.expert is None else None

    def _piece_errors(
        self, info: TensorInfo, theirs: TensorInfo, rows: list[int] | None
    ) -> Iterator[float]:
        """Errors of pieces that fit in memory; rows are chosen from the source's."""
        if rows is not None:
            mine, weight = self.checkpoint.read(info.name), self.source.checkpoint.read(theirs.name)
            axis = expert_axis(weight.shape)
            if weight.shape[axis] <= max(rows):
                yield float("inf")
                return
            yield bits_error(weight.index_select(axis, torch.tensor(rows)), mine)
            return
        if not info.shape or info.nbytes <= CHUNK_BYTES:
            mine, weight = self.checkpoint.read(info.name), self.source.checkpoint.read(theirs.name)
            yield bits_error(weight, mine)
            return
        step = max(1, CHUNK_BYTES // (info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            yield bits_error(
                self.source.checkpoint.read_rows(theirs.name, start, stop),
                self.checkpoint.read_rows(info.name, start, stop),
            )

    def missing(self) -> Iterator[str]:
        """The source's tensors that nothing in the checkpoint came from, dropped ones aside."""
        for name in self.source.names():
            place = self.source_spec.place(name)
            beyond = place.layer is not None and place.layer >= self.source_spec.num_layers
            if name in self.seen or place.kind == "mtp" or beyond:
                continue
            kept = self.kept.get(place.layer) if place.layer is not None else None
            if kept is not None and place.expert is not None and place.expert not in kept:
                continue
            yield name


def relative_error(weight: Array, decoded: Array) -> float:
    """||W − Ŵ|| / ||W|| in float64 sums; inf for unlike shapes, 0 for equal values."""
    if weight.shape != decoded.shape:
        return float("inf")
    difference = float(np.linalg.norm((weight - decoded).astype(np.float32).ravel()))
    return ratio(difference, float(np.linalg.norm(weight.astype(np.float32).ravel())))


def bits_error(weight: torch.Tensor, mine: torch.Tensor) -> float:
    """0.0 for equal bits; else the relative error of floats, infinity for anything else."""
    if weight.shape != mine.shape:
        return float("inf")
    raw = [t.contiguous().flatten().view(torch.uint8) for t in (weight, mine)]
    if torch.equal(*raw):
        return 0.0
    if not weight.is_floating_point():
        return float("inf")
    error = relative_error(weight.float().numpy(), mine.float().numpy())
    return error if error > 0 else float("inf")  # −0 for 0, or another NaN: not the same bits
