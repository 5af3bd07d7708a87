"""transformers' own model, on the meta device, with one decoder layer filled at a time.

The walk over the layers is ours, every computation is transformers': the model's own `forward`
builds masks, positions and whatever else a layer takes, and our `LayerSlot`s stand where its
decoder layers were. A slot has three uses, one per stage of a walk:

- embed:  the first slot keeps what the embedding stage hands to layer 0;
- calls:  every slot keeps the arguments its layer would get (masks, rotary tables, token ids),
          while the hidden states passing through are zeros of the right shape;
- logits: the last slot returns the hidden states given to it, so that the model's own final
          norm, head and logit scaling follow.

Running layer L is then `layer(*args, **kwargs)` of the second stage with the hidden states put
in. That makes sliding, linear and sparse attention, attention sinks and padding transformers'
affair, and the result equal to the whole model's, bit for bit.

Refused: hooks that stop a forward by an exception, tracing and rewriting sources, and copies of
modeling code. The layer-loading helper of transformers used here is not a stable interface:
pyproject.toml pins the versions it was tested with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from models.device import has_kernels
from models.errors import InputError
from models.expert_weights import check_finite, load_expert_weights
from models.experts import Observer, RoutedExperts
from models.fp8_upload import Fp8Upload
from models.input_weighted import InputWeightedBlock
from models.layer_slot import Carry, LayerCall, LayerSlot, ZeroEmbedding
from models.memory import release_freed_memory
from models.meta_model import empty, meta_model
from models.model_spec import ModelSpec
from models.source_formats import Source
from models.sparse_attention import Indexer


class Skeleton:
    """A causal language model of which only the parts in use are in memory.

    `attention` is transformers' attn_implementation (None: its own choice for the family).
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> None:
        self.source, self.spec = source, source.spec
        self.dtype, self.device = dtype, torch.device(device)
        self.names = {
            own: name for name in source.names() if (own := self.spec.canonical(name)) is not None
        }
        self.by_part = _names_by_part(self.spec, self.names)
        transformers.utils.logging.disable_progress_bar()
        self.model = meta_model(self.spec, dtype, attention)
        # the one model inside: base_model and get_decoder miss it for Llama-4's text model
        self.base = next(c for c in self.model.children() if isinstance(c, PreTrainedModel))
        self.layers: list[nn.Module] = list(self.base.layers)
        self.experts: dict[int, RoutedExperts] = {}
        self._replace_experts()
        for layer in self.layers:
            self.adopt_indexer(layer)
        self.slots = [LayerSlot(la, self.spec.architecture.carry) for la in self.layers]
        self.upload = Fp8Upload(self.device) if has_kernels(self.device) else None
        self.embedding = self.model.get_input_embeddings()
        self.zero_embedding = ZeroEmbedding(self.spec.hidden_size, dtype, self.device)
        self._fill_buffers(self.model)
        self._mapping = get_model_conversion_mapping(self.model)
        self._load_part("trunk")
        self.base.layers = nn.ModuleList(self.slots)

    # -- building ------------------------------------------------------------------------------

    def _replace_experts(self) -> None:
        """Put our experts where transformers' are; hash layers may keep their own count."""
        moe = self.spec.architecture.moe
        for index in self.spec.moe_layers:
            count = self.spec.num_experts_of(index)
            if count != self.spec.num_experts:
                config = copy.deepcopy(self.model.config)
                for key in moe.num_experts:
                    if hasattr(config, key):
                        setattr(config, key, count)
                with torch.device("meta"):
                    self.layers[index] = type(self.layers[index])(config, index)
                self.layers[index].to(self.dtype).eval()
            self.experts[index] = self.adopt_experts(self.layers[index], index)

    def adopt_experts(self, layer: nn.Module, index: int) -> RoutedExperts:
        """Replace the experts module of a decoder layer by ours."""
        moe = self.spec.architecture.moe
        parent_path, _, name = moe.module.rpartition(".")
        parent = layer.get_submodule(parent_path)
        block = getattr(parent, name)
        experts = RoutedExperts(
            index,
            block.experts,
            self.spec.num_experts_of(index),
            zero_experts=self.spec.zero_experts > 0,
        )
        if moe.weights_input:
            experts.transposed = True
            setattr(parent, name, InputWeightedBlock(block, experts))
        else:
            block.experts = experts
        return experts

    def adopt_indexer(self, layer: nn.Module) -> None:
        """Replace the indexer of a decoder layer by ours, where the family and the layer have
        one (GLM-5: not every layer)."""
        parent_path, _, name = (self.spec.architecture.indexer or "").rpartition(".")
        if name:
            parent = layer.get_submodule(parent_path)
            original = getattr(parent, name, None)
            if original is not None:
                setattr(parent, name, Indexer(original))

    def _fill_buffers(self, module: nn.Module) -> None:
        """Compute non-persistent buffers (rotary frequencies), which no file holds."""
        modules = [self.model, *self.layers] if module is self.model else [module]
        for root in modules:
            for owner in root.modules():
                missing = [
                    name
                    for name, buffer in owner.named_buffers(recurse=False)
                    if buffer.is_meta and name in owner._non_persistent_buffers_set
                ]
                for name in missing:
                    buffer = owner.get_buffer(name)
                    setattr(owner, name, torch.empty_like(buffer, device=self.device))
                if missing:
                    self.model._init_weights(owner)

    # -- loading parts -------------------------------------------------------------------------

    def _load(self, names: Mapping[str, str]) -> None:
        """Read tensors and place them by transformers' own conversions.

        `names`: canonical name in the checkpoint -> canonical name to load it under.
        """
        state = {}
        for name, target in names.items():
            on_disk = self.names[name]
            dtype = None if self.source.format(on_disk) == "plain" else self.dtype
            value = self.source.read(on_disk, dtype, self.device)
            state[target] = check_finite(value, on_disk, self.source)
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            state,
            LoadStateDictConfig(
                dtype=self.dtype,
                device_map={"": self.device},
                weight_mapping=copy.deepcopy(self._mapping),
                dtype_plan=self.model._get_dtype_plan(self.dtype),
            ),
        )
        if info.mismatched_keys:
            key, shape, expected = sorted(info.mismatched_keys)[0]
            raise InputError(
                f"tensor {key} in {self.source.checkpoint.root} has shape {tuple(shape)}, "
                f"config.json implies {tuple(expected)}; they do not belong together"
            )
        if info.conversion_errors:
            raise InputError(
                f"tensors of {self.source.checkpoint.root} do not fit config.json: "
                f"{next(iter(info.conversion_errors.values()))}"
            )

    def _load_part(self, part: str) -> None:
        self._load({name: name for name in self.by_part[part]})

    def load_layer(self, index: int, observe: Observer | None = None) -> nn.Module:
        """Fill decoder layer `index`; `observe` sees every batch its experts run.

        Raises InputError for missing, misshapen, NaN or infinite tensors.
        """
        layer = self.layers[index]
        self._fill_at(index, layer, {name: name for name in self.by_part[index]})
        if index in self.experts:
            self.fill_experts(self.experts[index], index, observe)
        self._check_filled(layer, f"layer {index}")
        return layer

    def fill_as_last_layer(self, layer: nn.Module, index: int, names: list[str]) -> None:
        """Fill a decoder layer beyond the last one (MTP) under the last one's names."""
        last = self.spec.num_layers - 1
        old, new = self.spec.layer_prefix(index), self.spec.layer_prefix(last)
        self._fill_buffers(layer)
        self._fill_at(last, layer, {name: new + name.removeprefix(old) for name in names})
        self._check_filled(layer, f"layer {index}")

    def _fill_at(self, index: int, layer: nn.Module, names: Mapping[str, str]) -> None:
        """Place tensors (canonical name -> name to load it under) in `layer`, which stands at
        `index` meanwhile: the converter finds modules by their full name."""
        self.base.layers[index] = layer
        try:
            self._load(names)
        finally:
            self.base.layers[index] = self.slots[index]

    def fill_experts(self, experts: RoutedExperts, index: int, observe: Observer | None) -> None:
        """Read the routed experts of a layer."""
        experts.observe = observe
        experts.weights = load_expert_weights(
            self.source,
            self.spec,
            index,
            self.names,
            transposed=experts.transposed,
            dtype=self.dtype,
            device=self.device,
            upload=self.upload,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor (canonical name) in compute dtype on the device."""
        if name not in self.names:
            raise InputError(
                f"tensor {name} is missing in {self.source.checkpoint.root}; "
                "the checkpoint is incomplete"
            )
        on_disk = self.names[name]
        value = self.source.read(on_disk, self.dtype, self.device)
        return check_finite(value, on_disk, self.source)

    def _check_filled(self, module: nn.Module, what: str) -> None:
        left = [name for name, p in module.named_parameters() if p.is_meta]
        left += [name for name, b in module.named_buffers() if b.is_meta]
        if left:
            raise InputError(
                f"{what} of {self.source.checkpoint.root} lacks {left[0]}"
                + (f" and {len(left) - 1} more tensors" if len(left) > 1 else "")
                + "; the checkpoint is incomplete"
            )

    def linear_of(self, index: int, on_disk: str) -> nn.Linear | None:
        """The nn.Linear of a loaded layer whose weight is the logical tensor `on_disk`.

        None where transformers joins or splits the tensor, or keeps it in something else.
        """
        own = self.spec.canonical(on_disk)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        name, joined = rename_source_key(own, renamings, converters)
        position = f"layers.{index}."
        if joined is not None or position not in name or not name.endswith(".weight"):
            return None
        path = name.split(position, 1)[1].removesuffix(".weight")
        try:
            module = self.layers[index].get_submodule(path)
        except AttributeError:
            return None
        return module if isinstance(module, nn.Linear) else None

    def unload_layer(self, index: int) -> None:
        """Free decoder layer `index` (computed buffers stay)."""
        empty(self.layers[index])
        if index in self.experts:
            self.experts[index].weights = None
            self.experts[index].observe = None
            self.experts[index].inputs_only = False
        release_freed_memory()

    def prefetch_layer(self, index: int) -> None:
        """Ask the system to read a layer's bytes ahead; returns at once."""
        if index in self.by_part:
            names = [*self.by_part[index], *self.by_part.get(("experts", index), [])]
            self.source.prefetch([self.names[name] for name in names])

    # -- stages of a walk ----------------------------------------------------------------------

    def load_embedding(self) -> None:
        """Fill the embedding."""
        self._load_part("embed")

    def unload_embedding(self) -> None:
        """Free the embedding."""
        empty(self.embedding)

    def load_head(self) -> None:
        """Fill the head; where the checkpoint has none, the embedding is the head."""
        if self.by_part["head"]:
            self._load_part("head")
            return
        own = self.spec.architecture.embed
        self.model.get_output_embeddings().weight = nn.Parameter(
            self.tensor(own), requires_grad=False
        )

    def unload_head(self) -> None:
        """Free the head."""
        empty(self.model.get_output_embeddings())

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> Carry:
        """int [B, S] -> what layer 0 gets. The embedding must be loaded."""
        self._forward_base(input_ids, attention_mask, position_ids, self.embedding)
        hidden = self.slots[0].hidden_seen
        assert hidden is not None
        return {"hidden_states": hidden}

    def call(
        self,
        index: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> LayerCall:
        """The arguments decoder layer `index` gets with this batch. Positions that begin anew
        inside a row (no mask given) make transformers' masks block-diagonal."""
        last = self.slots[-1]
        last.returns_first = not last.carry_names  # what follows it is run on zeros: on few
        try:
            self._forward_base(input_ids, attention_mask, position_ids, self.zero_embedding)
        finally:
            last.returns_first = False
        seen = self.slots[index].seen
        assert seen is not None
        for slot in self.slots:
            slot.seen = slot.hidden_seen = None
        return seen

    def _forward_base(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        embedding: nn.Module,
    ) -> None:
        more = {} if position_ids is None else {"position_ids": position_ids}
        self.model.set_input_embeddings(embedding)
        try:
            with torch.inference_mode():
                self.base(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more
                )
        finally:
            self.model.set_input_embeddings(self.embedding)

    def run_layer(self, index: int, call: LayerCall, carry: Carry) -> Carry:
        """Decoder layer `index` (loaded) on one batch."""
        extras = self.spec.architecture.carry
        kwargs = {**call.kwargs, **{name: carry.get(name) for name in extras}}
        with torch.inference_mode():
            out = self.layers[index](carry["hidden_states"], *call.args, **kwargs)
        if not isinstance(out, tuple):
            return {"hidden_states": out}
        found = dict(zip(("hidden_states", *extras), out, strict=False))
        return {name: value for name, value in found.items() if value is not None}

    def logits(self, carry: Carry) -> torch.Tensor:
        """What left the last layer -> logits [B, S, V]. The head must be loaded.

        Every step after the last layer works on single positions, so any rows will do.
        """
        hidden = carry["hidden_states"]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        self.slots[-1].returns = carry
        self.model.set_input_embeddings(self.zero_embedding)
        try:
            with torch.inference_mode():
                return self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.slots[-1].returns = None
            self.model.set_input_embeddings(self.embedding)


def _names_by_part(spec: ModelSpec, names: Mapping[str, str]) -> dict[Any, list[str]]:
    """Canonical names by what they are loaded with: "embed", "head", "trunk" (final norm and the
    like), a layer's index (experts left out), ("experts", index)."""
    parts: dict[Any, list[str]] = {"embed": [], "head": [], "trunk": []}
    for name in names:
        place = spec.place(name)
        if place.layer is not None:
            key: Any = ("experts", place.layer) if place.kind == "expert" else place.layer
            parts.setdefault(key, []).append(name)
        elif place.kind in ("embed", "head"):
            parts[place.kind].append(name)
        elif place.kind in ("norm", "other"):
            parts["trunk"].append(name)
    return parts
