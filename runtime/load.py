"""A checkpoint into transformers' own model, its weights left packed.

The model is built without weights (models/skeleton.py); Linears and experts that are quantized on
disk are replaced by modules that hold the file's tensors (runtime/packing.py); then layer after
layer is read straight into place. The peak is what the model holds plus one layer's passing
copies. What cannot be held packed (runtime/storage.py) is decoded and named in `Loaded.decoded`.

With several devices accelerate decides which layer goes where, from the packed sizes, and moves
activations between them; layers that stay in host memory send their packed bytes, not decoded
ones, to the GPU for each forward.

Refused: from_pretrained. It decodes experts to bfloat16 on loading (DecompressExperts), gets
NVFP4 experts wrong without an error and fails on FP8_BLOCK (transformers 5.17; docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from models.errors import InputError
from models.expert_weights import ExpertReader
from models.memory import release_freed_memory
from models.model_spec import ModelSpec
from models.opening import OpenModel, compute_device, compute_dtype, open_model
from models.progress import Progress, Step, silent
from models.skeleton import Skeleton
from runtime.choice import Backend, Choice
from runtime.kernel_check import KernelCheck
from runtime.packed import PackedWeights
from runtime.packing import PackedModules, up_roles
from runtime.placement import EMBED, HEAD, device_of, module_paths, place, spread
from runtime.router import Routers
from runtime.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """`device` auto takes all GPUs; `memory` bounds devices by name or number, in bytes."""

    device: str = "auto"
    dtype: str = "auto"
    backend: Backend = "auto"
    attention: str | None = None
    memory: Mapping[int | str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that is ready to run."""

    model: Any  # transformers' causal LM
    opened: OpenModel
    generation: GenerationConfig
    device: torch.device  # where token ids go
    dtype: torch.dtype
    choice: Choice
    routers: Routers
    placement: Mapping[str, Any]
    decoded: tuple[str, ...]  # tensors that could not be held packed
    nbytes: int

    @property
    def spec(self) -> ModelSpec:
        """The family joined with config.json."""
        return self.opened.spec

    def describe(self) -> list[str]:
        """What is where, for the log."""
        devices = sorted({str(device) for device in self.placement.values()})
        lines = [f"{self.nbytes / 1e9:,.2f} GB on {', '.join(devices)}", *self.choice.describe()]
        lines += self.routers.describe()
        if self.decoded:
            more = f" and {len(self.decoded) - 1} more" if len(self.decoded) > 1 else ""
            lines.append(f"decoded on loading: {self.decoded[0]}{more}")
        return lines


def load_model(
    path: str | Path, settings: LoadSettings | None = None, progress: Progress = silent
) -> Loaded:
    """Load a checkpoint (folder or hub id) to run it.

    InputError when it is no checkpoint known here, incomplete, or larger than the devices, or
    when the kernels chosen for it do not multiply rightly there.
    """
    settings = settings or LoadSettings()
    opened = open_model(path)
    dtype = compute_dtype(opened.spec, settings.dtype)
    device = compute_device(settings.device)
    loader = Loader(opened, dtype, device, settings)
    return loader.load(progress)


class Loader:
    """The one pass over a checkpoint's files."""

    def __init__(
        self, opened: OpenModel, dtype: torch.dtype, device: torch.device, settings: LoadSettings
    ) -> None:
        self.opened, self.dtype, self.device, self.settings = opened, dtype, device, settings
        self.source, self.spec = opened.source, opened.spec
        self.choice = Choice(settings.backend, device, dtype)
        self.check = KernelCheck(dtype)
        self.routers = Routers(self.spec, dtype)
        self.skeleton = Skeleton(
            opened.source, dtype=dtype, device=device, attention=settings.attention
        )
        self.packed = PackedModules(opened, self.skeleton, self.choice, dtype)

    def load(self, progress: Progress) -> Loaded:
        """Place what was built, read it."""
        skeleton = self.skeleton
        settings, root = self.settings, self.opened.checkpoint.root
        placement = place(skeleton, root, settings.device, self.device, settings.memory)
        paths = {what: path for path, what in module_paths(skeleton)}
        self._load_ends(placement, paths)
        for index in range(self.spec.num_layers):
            if index + 1 < self.spec.num_layers:
                skeleton.prefetch_layer(index + 1)
            skeleton.device = device_of(placement, paths[f"layer {index}"])
            self._load_layer(index)
            progress(Step(job="load", done=index + 1, total=self.spec.num_layers))
        skeleton.base.layers = nn.ModuleList(skeleton.layers)
        skeleton.base.config.use_cache = True
        model = spread(skeleton.model, placement)
        tensors = [*model.parameters(), *model.buffers()]
        return Loaded(
            model=model,
            opened=self.opened,
            generation=generation_config(self.opened),
            device=device_of(placement, paths[EMBED]) if placement else self.device,
            dtype=self.dtype,
            choice=self.choice,
            routers=self.routers,
            placement=placement,
            decoded=tuple(self.packed.decoded),
            nbytes=sum(t.numel() * t.element_size() for t in tensors),
        )

    def _load_ends(self, placement: Mapping[str, Any], paths: Mapping[str, str]) -> None:
        """Embedding and head."""
        skeleton = self.skeleton
        skeleton.device = device_of(placement, paths[EMBED])
        skeleton.load_embedding()
        skeleton.device = device_of(placement, paths[HEAD])
        if "head" in self.packed.linears:
            self._fill_linears("head")
        elif skeleton.by_part["head"]:
            skeleton.load_head()
        else:  # tied: the embedding is the head
            weight = skeleton.model.get_input_embeddings().weight
            skeleton.model.get_output_embeddings().weight = weight

    def _load_layer(self, index: int) -> None:
        self._fill_linears(index)
        if index in self.packed.experts:
            self._fill_experts(index)
        self.skeleton.load_layer(index)
        if self.choice.kernels and self.skeleton.device.type == "cuda":
            self.routers.fuse(index, self.skeleton.layers[index])
        release_freed_memory()

    def _fill_linears(self, part: Any) -> None:
        for linear, name in self.packed.linears.get(part, ()):
            linear.packed.allocate(self.skeleton.device)
            linear.packed.fill(self.source, name, 0, 0)
            assert linear.kernel is not None
            self.check.prepare(linear.kernel, linear.packed)

    def _fill_experts(self, index: int) -> None:
        experts, reader = self.packed.experts[index], self.packed.reader(index)
        for weights, roles in ((experts.up, up_roles(reader)), (experts.down, ("down",))):
            weights.allocate(self.skeleton.device)
            for expert in range(experts.num_experts):
                for part, role in enumerate(roles):
                    self._fill_expert(weights, reader, role, expert, part)
        device, dtype = self.skeleton.device, self.dtype
        for role, name in (("gate_up_bias", "up_bias"), ("down_bias", "down_bias")):
            bias = reader.read_biases(role, dtype)
            if bias is not None:
                setattr(experts, name, nn.Parameter(bias.to(device), requires_grad=False))
        assert experts.kernel is not None
        self.check.prepare(experts.kernel, experts.up)
        self.check.prepare(experts.kernel, experts.down)
        experts.view_plain()

    def _fill_expert(
        self, weights: PackedWeights, reader: ExpertReader, role: str, expert: int, part: int
    ) -> None:
        storage, tensor = weights.storage, reader.found[role]
        if storage.kind == "plain":
            rows = slice(part * storage.rows, (part + 1) * storage.rows)
            weights.codes[expert, rows].copy_(reader.read(role, expert, self.dtype, False))
            return
        name = self.spec.expert_name(reader.layer, expert, tensor)
        if name not in reader.names:
            raise InputError(
                f"tensor {name} is missing in {self.opened.checkpoint.root}; "
                "the checkpoint is incomplete"
            )
        weights.fill(self.source, reader.names[name], expert, part)


def default_sampling(loaded: Loaded) -> Sampling:
    """What the checkpoint's generation_config.json asks for; greedy where it asks for nothing."""
    config = loaded.generation
    if not config.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


def generation_config(opened: OpenModel) -> GenerationConfig:
    """generation_config.json; config.json for the special tokens it does not name."""
    root = opened.checkpoint.root
    config = GenerationConfig()
    if (root / "generation_config.json").is_file():
        try:
            config = GenerationConfig.from_pretrained(root)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{root}/generation_config.json is refused: {' '.join(str(error).split())}"
            ) from error
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for said in (opened.spec.text, opened.spec.config):
            if getattr(config, key) is None:
                setattr(config, key, said.get(key))
    return config
