"""What a prune plan makes of each tensor, name and config key, before anything is written."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from models.architecture import HASH_COUNT_KEY, Place, expert_axis
from models.byte_copy import ByteRange
from models.checkpoint import TensorInfo
from models.errors import InputError
from models.model_spec import ModelSpec
from models.source_formats import Source
from models.writer import OutputTensor, copied
from reap.plan import PrunePlan

# quantization_config keys that list module names or patterns
MODULE_LISTS = (
    "modules_to_not_convert",
    "modules_to_convert",
    "ignore",
    "ignored_layers",
    "exclude_modules",
)


@dataclass(frozen=True)
class Cut:
    """A plan applied to one model: new names, rows, and config."""

    spec: ModelSpec
    plan: PrunePlan

    @cached_property
    def new_ids(self) -> Mapping[int, Mapping[int, int]]:
        """Layer -> old id of a kept expert -> new id."""
        return {
            layer: {old: new for new, old in enumerate(kept)}
            for layer, kept in self.plan.layers.items()
        }

    @cached_property
    def _numbered(self) -> re.Pattern[str] | None:
        """Matches the canonical name of anything that belongs to one expert, up to its number."""
        arch = self.spec.architecture
        stems = {
            re.escape(tensor.name.split("{expert}")[0])
            for tensor in arch.moe.experts
            if not tensor.stacked
        }
        if not stems:
            return None
        layer = re.escape(arch.layer).replace(r"\{layer\}", r"(\d+)")
        block = re.escape(arch.moe.block + "." if arch.moe.block else "")
        return re.compile(f"{layer}{block}(?:{'|'.join(sorted(stems))})(\\d+)(?=\\.|$)")

    def is_dropped_mtp(self, place: Place) -> bool:
        """True for tensors of MTP layers when the plan drops them."""
        if self.plan.mtp != "drop":
            return False
        beyond = place.layer is not None and place.layer >= self.spec.num_layers
        return place.kind == "mtp" or beyond

    def rename(self, name: str) -> str | None:
        """The new name of a tensor or module; None when its expert is dropped."""
        own = self.spec.canonical(name)
        match = self._numbered.match(own) if self._numbered and own is not None else None
        if match is None or own is None or int(match[1]) not in self.new_ids:
            return name
        new = self.new_ids[int(match[1])].get(int(match[2]))
        if new is None:
            return None
        # on-disk and canonical names differ in their beginnings only
        rest = len(own) - match.end(2)
        head = len(name) - rest - len(match[2])
        return f"{name[:head]}{new}{name[len(name) - rest :]}"

    def tensors(self, source: Source) -> Iterator[OutputTensor]:
        """All tensors of the output in the order of the source's bytes."""
        owner = {info.name: name for name in source.names() for info in source.parts(name)}
        places = {name: self.spec.place(name) for name in source.names()}
        for info in source.checkpoint.tensors.values():
            logical = owner[info.name]
            place = places[logical]
            if self.is_dropped_mtp(place):
                continue
            if place.layer in self.plan.layers and place.kind == "router":
                if source.format(logical) != "plain":
                    raise InputError(
                        f"{info.file}: router {logical} is quantized, its rows cannot be cut out; "
                        "use a checkpoint whose router is not"
                    )
                yield self._router(info, place)
            elif place.layer in self.plan.layers and place.kind == "expert":
                tensor = self._expert(info, place)
                if tensor is not None:
                    yield tensor
            else:
                yield copied(info, info.name)

    def _router(self, info: TensorInfo, place: Place) -> OutputTensor:
        assert place.layer is not None
        experts, zeros = self.plan.num_experts, self.spec.zero_experts
        rows = (*self.plan.layers[place.layer], *range(experts, experts + zeros))
        return rows_of(info, experts + zeros, rows)

    def _expert(self, info: TensorInfo, place: Place) -> OutputTensor | None:
        assert place.layer is not None
        if place.expert is None:
            return rows_of(info, self.plan.num_experts, self.plan.layers[place.layer])
        name = self.rename(info.name)
        return None if name is None else copied(info, name)

    def config(self) -> dict[str, Any]:
        """config.json of the output."""
        config: dict[str, Any] = copy.deepcopy(dict(self.spec.config))
        arch, moe = self.spec.architecture, self.spec.architecture.moe
        key = arch.text_config
        text = config[key] if key and isinstance(config.get(key), dict) else config
        if self.spec.hash_layers and self.plan.keep < self.plan.num_experts:
            text[HASH_COUNT_KEY] = self.spec.num_experts_of(self.spec.hash_layers[0])
        for name in moe.num_experts:
            if text.get(name) is not None:
                count = text[name]
                text[name] = [self.plan.keep] * len(count) if is_list(count) else self.plan.keep
        if self.plan.groups == "flatten" and moe.groups is not None and self.spec.num_groups > 1:
            text.update(dict.fromkeys(moe.groups, 1))
        if self.plan.mtp == "drop" and arch.mtp is not None and arch.mtp.count is not None:
            announced = text.get(arch.mtp.count)
            if announced is not None or arch.mtp.default:
                text[arch.mtp.count] = 0
        for holder in {id(config): config, id(text): text}.values():
            for name in ("quantization_config", "compression_config"):
                if isinstance(holder.get(name), dict):
                    self._edit_module_lists(holder[name])
        return config

    def _edit_module_lists(self, quantization: dict[str, Any]) -> None:
        """Follow renumbered experts in lists of module names, drop those of what is gone."""
        for key in MODULE_LISTS:
            if is_list(quantization.get(key)):
                quantization[key] = self._module_names(quantization[key])
        groups = quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and is_list(group.get("targets")):
                group["targets"] = self._module_names(group["targets"])

    def _module_names(self, names: Sequence[Any]) -> list[Any]:
        kept = []
        for name in names:
            if not isinstance(name, str) or name.startswith("re:"):
                kept.append(name)
                continue
            # a module's place is that of a tensor in it
            place = self.spec.place(name + ".weight" if not name.endswith(".weight") else name)
            new = None if self.is_dropped_mtp(place) else self.rename(name)
            if new is not None:
                kept.append(new)
        return kept


def is_list(value: object) -> bool:
    """True for a JSON list."""
    return isinstance(value, list)


def rows_of(info: TensorInfo, count: int, rows: Sequence[int]) -> OutputTensor:
    """Some of a tensor's `count` rows, ascending; [1, E] counts as rows of one element.

    InputError when the tensor has another number of rows.
    """
    axis = expert_axis(info.shape)
    if not info.shape or info.shape[axis] != count:
        raise InputError(
            f"{info.file}: tensor {info.name} of shape {list(info.shape)} does not have one row "
            f"for each of {count} experts; restore the original config.json and shards"
        )
    row_bytes, rest = divmod(info.nbytes, count)
    assert rest == 0, info
    ranges: list[ByteRange] = []
    for row in rows:
        offset = info.offset + row * row_bytes
        last = ranges[-1] if ranges else None
        if last is not None and last.offset + last.nbytes == offset:
            ranges[-1] = ByteRange(info.file, last.offset, last.nbytes + row_bytes)
        else:
            ranges.append(ByteRange(info.file, offset, row_bytes))
    shape = (*info.shape[:axis], len(rows), *info.shape[axis + 1 :])
    return OutputTensor(info.name, info.dtype, shape, tuple(ranges))
