"""From a model's name to what the jobs work on: checkpoint, family and decoded source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint import Checkpoint
from models.errors import InputError
from models.families import spec_of
from models.model_spec import ModelSpec
from models.source_formats import Source, quantization_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint whose headers were read and whose family is known. No weight is in memory."""

    checkpoint: Checkpoint
    spec: ModelSpec
    source: Source


def open_model(model: str | Path) -> OpenModel:
    """Open a directory or hub id. InputError when it is no MoE checkpoint that can be read."""
    checkpoint = Checkpoint.open(model)
    spec = spec_of(checkpoint.config)
    return OpenModel(checkpoint, spec, Source(checkpoint, spec))


def compute_dtype(spec: ModelSpec, wanted: str) -> torch.dtype:
    """`auto`: the checkpoint's own type, bfloat16 for quantized sources.

    Raises InputError for a type the family's code does not run in.
    """
    only_float32 = spec.architecture.float32_only
    if wanted == "auto":
        return torch.float32 if only_float32 else DTYPES[stored_dtype(spec)]
    if wanted not in DTYPES:
        raise InputError(f"--dtype {wanted} is unknown; use auto, bfloat16 or float32")
    if only_float32 and wanted != "float32":
        raise InputError(
            f"--dtype {wanted}: transformers runs {spec.architecture.title} in float32 only; "
            "use --dtype float32"
        )
    return DTYPES[wanted]


def stored_dtype(spec: ModelSpec) -> str:
    """The floating type config.json announces; bfloat16 where it says none or is quantized."""
    if not quantization_config(spec):
        for config in (spec.text, spec.config):
            for key in ("dtype", "torch_dtype"):
                name = str(config.get(key) or "").removeprefix("torch.")
                if name in DTYPES:
                    return name
    return "bfloat16"


def compute_device(wanted: str) -> torch.device:
    """`auto`: the first GPU where there is one, else the CPU. InputError for a missing GPU.

    A numbered GPU becomes the current one: Triton launches there, wherever the tensors are.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"--device {wanted} is unknown; use auto, cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu, or one that exists"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
