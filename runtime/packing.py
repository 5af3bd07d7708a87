"""Packed modules where a model's quantized Linears and experts are: no weight is read here.

What cannot be held packed (runtime/storage.py) stays transformers' own module, or experts held
decoded, and is named in `decoded`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.errors import InputError
from models.expert_weights import ExpertReader
from models.opening import OpenModel
from models.skeleton import Skeleton
from runtime.choice import Choice
from runtime.experts import PackedExperts
from runtime.linear import PackedLinear
from runtime.packed import PackedWeights
from runtime.storage import Storage, storage_of


class PackedModules:
    """What was put where, to be filled: Linears by layer (or "head") with their stored names."""

    def __init__(
        self, opened: OpenModel, skeleton: Skeleton, choice: Choice, dtype: torch.dtype
    ) -> None:
        """Replace modules of every layer and the head. InputError for shapes that do not fit."""
        self.opened, self.skeleton, self.choice, self.dtype = opened, skeleton, choice, dtype
        self.source, self.spec = opened.source, opened.spec
        self.linears: dict[Any, list[tuple[PackedLinear, str]]] = {}
        self.experts: dict[int, PackedExperts] = {}
        self.decoded: list[str] = []
        for index in range(self.spec.num_layers):
            self._pack_linears(index)
            if index in skeleton.experts:
                self._pack_experts(index)
        self._pack_head()

    def _pack_linears(self, index: int) -> None:
        """Put a PackedLinear where a layer's quantized Linears are."""
        layer = self.skeleton.layers[index]
        names = self.skeleton.by_part[index]
        for name in list(names):
            on_disk = self.skeleton.names[name]
            if self.source.format(on_disk) == "plain":
                continue
            linear = self.skeleton.linear_of(index, on_disk)
            storage = storage_of(self.source, on_disk, self.dtype)
            # subclasses compute something else with the weight (DeepSeek-V4: in groups)
            if type(linear) is not nn.Linear or storage is None:
                self.decoded.append(on_disk)
                continue
            path = next(path for path, module in layer.named_modules() if module is linear)
            self.linears.setdefault(index, []).append(
                (self._replace(layer, path, linear, storage, on_disk), on_disk)
            )
            names.remove(name)

    def _pack_head(self) -> None:
        names = self.skeleton.by_part["head"]
        if not names or self.source.format(self.skeleton.names[names[0]]) == "plain":
            return
        on_disk = self.skeleton.names[names[0]]
        storage = storage_of(self.source, on_disk, self.dtype)
        if storage is None:
            self.decoded.append(on_disk)
            return
        head = self.skeleton.model.get_output_embeddings()
        path = next(p for p, m in self.skeleton.model.named_modules() if m is head)
        packed = self._replace(self.skeleton.model, path, head, storage, on_disk)
        self.linears["head"] = [(packed, on_disk)]
        names.clear()

    def _replace(
        self, root: nn.Module, path: str, linear: nn.Linear, storage: Storage, name: str
    ) -> PackedLinear:
        if (storage.height, storage.columns) != tuple(linear.weight.shape):
            raise InputError(
                f"tensor {name} in {self.opened.checkpoint.root} has shape "
                f"{[storage.height, storage.columns]}, config.json implies "
                f"{list(linear.weight.shape)}; they do not belong together"
            )
        packed = PackedLinear(storage, linear.bias, self.dtype)
        packed.kernel = self.choice.kernel_for(storage)
        self.choice.note(storage, packed.kernel, 1)
        parent, _, leaf = path.rpartition(".")
        setattr(root.get_submodule(parent), leaf, packed)
        return packed

    def _pack_experts(self, index: int) -> None:
        """Put PackedExperts where a layer's RoutedExperts are."""
        old = self.skeleton.experts[index]
        reader = self.reader(index)
        up_storage = self._expert_storage(reader, up_roles(reader))
        down_storage = self._expert_storage(reader, ("down",))
        if "plain" in (up_storage.kind, down_storage.kind) and up_storage != down_storage:
            up_storage, down_storage = (
                self._as_plain(s, reader, role)
                for s, role in ((up_storage, up_roles(reader)[0]), (down_storage, "down"))
            )
        experts = PackedExperts(
            index,
            old._original[0],
            old.num_experts,
            PackedWeights(up_storage, old.num_experts),
            PackedWeights(down_storage, old.num_experts),
        )
        experts.transposed = old.transposed
        experts.zero_experts = old.zero_experts
        kernels = {self.choice.kernel_for(s) for s in (up_storage, down_storage)}
        experts.kernel = kernels.pop() if len(kernels) == 1 else self.choice.torch
        for storage, count in ((up_storage, up_storage.parts), (down_storage, 1)):
            self.choice.note(storage, experts.kernel, old.num_experts * count)
        layer = self.skeleton.layers[index]
        path = next(path for path, module in layer.named_modules() if module is old)
        parent, _, leaf = path.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, experts)
        self.experts[index] = experts
        self.skeleton.experts.pop(index)

    def reader(self, index: int) -> ExpertReader:
        """Finds the tensors of a layer's experts."""
        skeleton = self.skeleton
        return ExpertReader(self.source, self.spec, index, skeleton.names, torch.device("cpu"))

    def _expert_storage(self, reader: ExpertReader, roles: tuple[str, ...]) -> Storage:
        """How the experts' matrices of `roles` (joined along N) are held, told by expert 0."""
        tensor = reader.found.get(roles[0])
        if tensor is not None and not tensor.stacked and not tensor.transposed:
            name = reader.names[self.spec.expert_name(reader.layer, 0, tensor)]
            storage = storage_of(self.source, name, self.dtype)
            if storage is not None:
                return storage.joined(len(roles))
        return self._as_plain(None, reader, roles[0]).joined(len(roles))

    def _as_plain(self, known: Storage | None, reader: ExpertReader, role: str) -> Storage:
        """Held decoded; shapes from expert 0."""
        if known is not None and known.kind == "plain":
            return known
        tensor = reader.found.get(role)
        if known is None:
            rows, columns = reader.read(role, 0, self.dtype, False).shape
        else:
            rows, columns = known.rows, known.columns
        assert tensor is not None
        name = reader.names[
            self.spec.expert_name(reader.layer, None if tensor.stacked else 0, tensor)
        ]
        if self.source.format(name) != "plain":
            self.decoded.append(name)
        parts = 1 if known is None else known.parts
        return Storage(kind="plain", rows=rows, columns=columns, parts=parts, code_dtype=self.dtype)


def up_roles(reader: ExpertReader) -> tuple[str, ...]:
    """Roles of the matrices before the activation, in the order of their rows."""
    if "gate_up" in reader.found:
        return ("gate_up",)
    return tuple(role for role in ("gate", "up") if role in reader.found) or ("gate_up",)
