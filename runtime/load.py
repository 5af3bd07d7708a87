"""A checkpoint into transformers' own model, its weights left packed.

The model is built without weights (models/skeleton.py); Linears and experts that are quantized on
disk are replaced by modules that hold the file's tensors (runtime/packed.py); then layer after
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
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory
from torch import nn
from transformers import GenerationConfig

from models.architecture import ModelSpec
from models.errors import InputError
from models.expert_weights import ExpertReader
from models.memory import release_freed_memory
from models.opening import OpenModel, compute_device, compute_dtype, open_model
from models.progress import Progress, Step, silent
from models.skeleton import Skeleton
from runtime.choice import Backend, Choice
from runtime.experts import PackedExperts
from runtime.linear import PackedLinear
from runtime.packed import PackedWeights
from runtime.sampling import Sampling
from runtime.storage import Storage, storage_of

EMBED, HEAD, NORM = "embed", "head", "norm"


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
        if self.decoded:
            more = f" and {len(self.decoded) - 1} more" if len(self.decoded) > 1 else ""
            lines.append(f"decoded on loading: {self.decoded[0]}{more}")
        return lines


def load_model(
    path: str | Path, settings: LoadSettings | None = None, progress: Progress = silent
) -> Loaded:
    """Load a checkpoint (folder or hub id) to run it.

    InputError when it is no checkpoint known here, incomplete, or larger than the devices.
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
        self.skeleton = Skeleton(
            opened.source, dtype=dtype, device=device, attention=settings.attention
        )
        self.linears: dict[Any, list[tuple[PackedLinear, str]]] = {}
        self.experts: dict[int, PackedExperts] = {}
        self.decoded: list[str] = []

    def load(self, progress: Progress) -> Loaded:
        """Replace modules, place them, read them."""
        skeleton = self.skeleton
        for index in range(self.spec.num_layers):
            self._pack_linears(index)
            if index in skeleton.experts:
                self._pack_experts(index)
        self._pack_head()
        slots = skeleton.base.layers
        skeleton.base.layers = nn.ModuleList(skeleton.layers)
        placement = self._place()
        skeleton.base.layers = slots
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
        model = skeleton.model
        if len(set(placement.values())) > 1:
            model = dispatch_model(model, device_map=dict(placement))
        tensors = [*model.parameters(), *model.buffers()]
        return Loaded(
            model=model,
            opened=self.opened,
            generation=generation_config(self.opened),
            device=device_of(placement, paths[EMBED]) if placement else self.device,
            dtype=self.dtype,
            choice=self.choice,
            placement=placement,
            decoded=tuple(self.decoded),
            nbytes=sum(t.numel() * t.element_size() for t in tensors),
        )

    # -- replacing -----------------------------------------------------------------------------

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
        reader = self._reader(index)
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
        experts.identity_experts = self.spec.zero_experts > 0
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

    def _reader(self, index: int) -> ExpertReader:
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

    # -- placing -------------------------------------------------------------------------------

    def _place(self) -> Mapping[str, Any]:
        """Module path -> device. InputError when the model does not fit."""
        model, settings = self.skeleton.model, self.settings
        several = settings.memory is not None or (
            settings.device == "auto" and torch.cuda.device_count() > 1
        )
        if not several:
            return {"": self.device}
        limits = get_max_memory(dict(settings.memory) if settings.memory else None)
        placement = infer_auto_device_map(
            model,
            max_memory=limits,
            no_split_module_classes=list({type(layer).__name__ for layer in self.skeleton.layers}),
        )
        if "disk" in placement.values():
            raise InputError(
                f"{self.opened.checkpoint.root} is larger than the memory of all devices; "
                "use more GPUs, or a smaller checkpoint"
            )
        return placement

    # -- reading -------------------------------------------------------------------------------

    def _load_ends(self, placement: Mapping[str, Any], paths: Mapping[str, str]) -> None:
        """Embedding and head."""
        skeleton = self.skeleton
        skeleton.device = device_of(placement, paths[EMBED])
        skeleton.load_embedding()
        skeleton.device = device_of(placement, paths[HEAD])
        if "head" in self.linears:
            self._fill_linears("head")
        elif skeleton.by_part["head"]:
            skeleton.load_head()
        else:  # tied: the embedding is the head
            weight = skeleton.model.get_input_embeddings().weight
            skeleton.model.get_output_embeddings().weight = weight

    def _load_layer(self, index: int) -> None:
        self._fill_linears(index)
        if index in self.experts:
            self._fill_experts(index)
        self.skeleton.load_layer(index)
        release_freed_memory()

    def _fill_linears(self, part: Any) -> None:
        for linear, name in self.linears.get(part, ()):
            linear.packed.allocate(self.skeleton.device)
            linear.packed.fill(self.source, name, 0, 0)
            assert linear.kernel is not None
            linear.kernel.prepare(linear.packed)

    def _fill_experts(self, index: int) -> None:
        experts, reader = self.experts[index], self._reader(index)
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
        experts.kernel.prepare(experts.up)
        experts.kernel.prepare(experts.down)
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
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


def up_roles(reader: ExpertReader) -> tuple[str, ...]:
    """Roles of the matrices before the activation, in the order of their rows."""
    if "gate_up" in reader.found:
        return ("gate_up",)
    return tuple(role for role in ("gate", "up") if role in reader.found) or ("gate_up",)


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


def generation_config(opened: OpenModel) -> GenerationConfig:
    """generation_config.json, or what config.json says of special tokens."""
    root = opened.checkpoint.root
    if (root / "generation_config.json").is_file():
        try:
            return GenerationConfig.from_pretrained(root)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{root}/generation_config.json is refused: {' '.join(str(error).split())}"
            ) from error
    text = opened.spec.text
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{key: text.get(key) for key in keys})
