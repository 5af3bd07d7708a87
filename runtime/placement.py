"""Which part of a model lies on which device: one device, or accelerate's map over several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory
from torch import nn

from models.errors import InputError
from models.skeleton import Skeleton
from runtime.experts import PackedExperts
from runtime.linear import PackedLinear

EMBED, HEAD = "embed", "head"
WHOLE = [PackedLinear.__name__, PackedExperts.__name__]


def place(
    skeleton: Skeleton,
    root: object,
    wanted: str,
    device: torch.device,
    memory: Mapping[int | str, int] | None,
) -> Mapping[str, Any]:
    """Module path -> device, by the sizes of what the modules will hold.

    `wanted` auto takes all GPUs, `memory` bounds devices. InputError when the model at `root` does
    not fit.
    """
    several = memory is not None or (wanted == "auto" and torch.cuda.device_count() > 1)
    if not several:
        return {"": device}
    slots = skeleton.base.layers
    skeleton.base.layers = nn.ModuleList(skeleton.layers)
    placement: Mapping[str, Any] = infer_auto_device_map(
        skeleton.model,
        max_memory=get_max_memory(dict(memory) if memory else None),
        no_split_module_classes=list({type(layer).__name__ for layer in skeleton.layers}),
    )
    skeleton.base.layers = slots
    if "disk" in placement.values():
        raise InputError(
            f"{root} is larger than the memory of all devices; use more GPUs, or a smaller "
            "checkpoint"
        )
    return placement


def spread(model: Any, placement: Mapping[str, Any]) -> Any:
    """The loaded model, activations moved between its devices where it lies on several."""
    if len(set(placement.values())) == 1:
        return model
    # packed tensors lie one module deeper than the one that is called: they are to come together
    return dispatch_model(model, device_map=dict(placement), preload_module_classes=WHOLE)


def module_paths(skeleton: Skeleton) -> list[tuple[str, str]]:
    """(module path, what it is) of the embedding, the head and every layer."""
    model = skeleton.model
    base = next(path for path, module in model.named_modules() if module is skeleton.base)
    found = [(f"{base}.layers.{i}", f"layer {i}") for i in range(len(skeleton.layers))]
    ends = {id(model.get_input_embeddings()): EMBED, id(model.get_output_embeddings()): HEAD}
    found += [(path, ends[id(m)]) for path, m in model.named_modules() if id(m) in ends]
    return found


def device_of(placement: Mapping[str, Any], path: str) -> torch.device:
    """The device that a module's path, or the nearest one above it, was given."""
    while path not in placement and path:
        path = path.rpartition(".")[0]
    return torch.device(placement[path])
