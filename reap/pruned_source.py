"""A source seen as it will be once pruned, before it is: nothing is written in between.

Names and shapes of the pruned checkpoint are known from the number kept; which experts they are
is filled in layer by layer (`keep`), as scoring gets there. Until then a layer cannot be read.
"""

from __future__ import annotations

import torch

from models.architecture import Place, expert_axis
from models.checkpoint import TensorInfo
from models.families import spec_of
from models.opening import OpenModel
from models.source_formats import Source
from models.stored_parts import Format
from models.writer import OutputTensor
from reap.cut import Cut, rows_of
from reap.plan import PrunePlan


class PrunedSource(Source):
    """`source` cut to `plan.keep` experts a layer. `plan.layers` says which layers are cut; its
    ids are ignored."""

    def __init__(self, source: Source, plan: PrunePlan) -> None:
        super().__init__(source.checkpoint, source.spec)
        self.whole, self.plan, self.original = source, plan, source.spec
        self.cut = Cut(source.spec, plan)
        self.spec = spec_of(self.cut.config())
        self.kept: dict[int, tuple[int, ...]] = {}
        self._places = {name: self.original.place(name) for name in source.names()}
        self._names = tuple(name for name, place in self._places.items() if self._stays(place))

    def _stays(self, place: Place) -> bool:
        if self.cut.is_dropped_mtp(place):
            return False
        numbered = place.kind == "expert" and place.expert is not None
        return not (numbered and self._is_cut(place) and int(place.expert or 0) >= self.plan.keep)

    def _is_cut(self, place: Place) -> bool:
        return place.layer in self.plan.layers

    def keep(self, layer: int, kept: tuple[int, ...]) -> None:
        """From now on `layer` can be read: these are its experts, ascending."""
        assert len(kept) == self.plan.keep
        self.kept[layer] = kept

    def _rows(self, place: Place) -> list[int]:
        """Rows of a router that stay."""
        assert place.layer is not None
        first, zeros = self.plan.num_experts, self.original.zero_experts
        return [*self.kept[place.layer], *range(first, first + zeros)]

    def _origin(self, logical: str) -> str:
        """The whole source's tensor behind a numbered expert's name."""
        place = self._places[logical]
        if place.kind != "expert" or place.expert is None or not self._is_cut(place):
            return logical
        assert place.layer is not None
        if place.layer not in self.kept:
            return logical  # all experts of a layer have one shape and format
        old = self.kept[place.layer][place.expert]
        return numbered(logical, place, old)

    def names(self) -> tuple[str, ...]:
        """Logical names of the pruned checkpoint."""
        return self._names

    def parts(self, logical: str) -> tuple[TensorInfo, ...]:
        """Physical tensors of the whole source behind a name."""
        return self.whole.parts(self._origin(logical))

    def format(self, logical: str) -> Format:
        """How it is stored."""
        return self.whole.format(self._origin(logical))

    def shape(self, logical: str) -> tuple[int, ...]:
        """The decoded shape after the cut."""
        shape, place = self.whole.shape(self._origin(logical)), self._places[logical]
        if not self._is_cut(place) or not shape:
            return shape
        if place.kind == "expert" and place.expert is None:
            return (self.plan.keep, *shape[1:])
        if place.kind == "router":
            rows = self.plan.keep + self.original.zero_experts
            whole = self.plan.num_experts + self.original.zero_experts
            return tuple(rows if size == whole else size for size in shape)
        return shape

    def read(
        self,
        logical: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """A whole tensor of the pruned checkpoint, decoded."""
        value, place = self.whole.read(self._origin(logical), dtype, device), self._places[logical]
        if not self._is_cut(place):
            return value
        assert place.layer is not None
        if place.kind == "expert" and place.expert is None:
            return value[list(self.kept[place.layer])]
        if place.kind == "router":
            axis = expert_axis(value.shape)
            return value.index_select(axis, torch.tensor(self._rows(place), device=value.device))
        return value

    def read_expert(
        self,
        logical: str,
        expert: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """One expert of a stacked tensor, by its new number."""
        place = self._places[logical]
        if self._is_cut(place):
            assert place.layer is not None
            expert = self.kept[place.layer][expert]
        return self.whole.read_expert(logical, expert, dtype, device)

    def copied(self, logical: str) -> OutputTensor:
        """A plain tensor as byte ranges of the whole source."""
        place = self._places[logical]
        if not self._is_cut(place) or place.kind not in ("router", "expert"):
            return self.whole.copied(logical)
        (info,) = self.whole.parts(self._origin(logical))
        if place.kind == "router":
            count = self.plan.num_experts + self.original.zero_experts
            return rows_of(info, count, self._rows(place))
        if place.expert is None:
            assert place.layer is not None
            return rows_of(info, self.plan.num_experts, self.kept[place.layer])
        copy = self.whole.copied(info.name)
        return OutputTensor(logical, copy.dtype, copy.shape, copy.ranges)


def pruned_view(opened: OpenModel, plan: PrunePlan) -> OpenModel:
    """The pruned model, readable without having been written."""
    source = PrunedSource(opened.source, plan)
    for layer, kept in plan.layers.items():
        source.keep(layer, kept)
    return OpenModel(opened.checkpoint, source.spec, source)


def numbered(logical: str, place: Place, expert: int) -> str:
    """A numbered expert's logical name with another number (the last one in a name is its own)."""
    head, _, tail = logical.rpartition(f".{place.expert}.")
    assert head, logical
    return f"{head}.{expert}.{tail}"
