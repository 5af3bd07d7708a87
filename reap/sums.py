"""The sums of one layer: what the forward pass did with every expert.

For one MoE layer, one domain and one expert j, with X the tokens of that domain that the router
sent to j, w(x) the coefficient that multiplied j's output and n(x) = ||f_j(x)||_2 the norm of that
output before weighting:

    count                 |X|               norm_sq_sum           sum n(x)^2
    router_weight_sum     sum w(x)          weighted_norm_sq_sum  sum (w(x) n(x))^2
    norm_sum              sum n(x)          norm_max              max n(x)
    weighted_norm_sum     sum w(x) n(x)

Sums were chosen over means: they add up over batches, machines and domains, and every criterion
(reap/criteria.py) is a function of them, so a ratio, a criterion or a mixture of domains can be
changed after the expensive pass. All arithmetic is float64: products of two float32 values are
exact in it, and only the additions round.

On the CPU they are added in the order of the records; on a GPU cell by cell (domain, expert), as
reap/segments.py says: the same pairs give the same bits, equal to the CPU's but for the order of
additions, and nothing waits for the GPU until the layer is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from calibration.batches import PADDING
from models.errors import InputError
from reap.segments import Segments

# E experts, M domains, P routed (token, expert) pairs, N tokens routed to one expert


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSums:
    """The seven sums of a layer, float64: [M, E] while collecting, [E] once domains are pooled.

    The fields are the file's: `FIELDS` is read off this class.
    """

    count: torch.Tensor
    router_weight_sum: torch.Tensor
    norm_sum: torch.Tensor
    weighted_norm_sum: torch.Tensor
    norm_sq_sum: torch.Tensor
    weighted_norm_sq_sum: torch.Tensor
    norm_max: torch.Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str = "cpu") -> ExpertSums:
        """Sums over no token."""
        return cls(
            **{name: torch.zeros(shape, dtype=torch.float64, device=device) for name in FIELDS}
        )

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """(field, tensor) pairs in the fields' order."""
        return [(name, getattr(self, name)) for name in FIELDS]

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token reached, ascending (pooled sums only)."""
        assert self.count.dim() == 1, "pool the domains first"
        return tuple(torch.nonzero(self.count == 0).flatten().tolist())


FIELDS = tuple(f.name for f in fields(ExpertSums))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """The sums of one layer for each domain, filled in place by `add` and `add_routed`."""

    domains: tuple[str, ...]
    sums: ExpertSums  # [M, E], rows in the order of `domains`

    @classmethod
    def empty(
        cls,
        num_experts: int,
        domains: tuple[str, ...],
        device: torch.device | str = "cpu",
    ) -> LayerStats:
        """A layer that has seen no token. InputError when a domain's name cannot be a key."""
        check_domains(domains)
        sums = ExpertSums.zeros(len(domains), num_experts, device=device)
        return cls(domains=tuple(domains), sums=sums)

    def cpu(self) -> LayerStats:
        """The same sums on the CPU (waits for a GPU that still adds)."""
        sums = ExpertSums(**{name: values.cpu() for name, values in self.sums.named()})
        return LayerStats(domains=self.domains, sums=sums)

    @property
    def num_experts(self) -> int:
        """E, real routed experts."""
        return self.sums.count.shape[1]

    def add(
        self,
        expert: int,
        domain_N: torch.Tensor,
        router_weights_N: torch.Tensor,
        norms_N: torch.Tensor,
    ) -> None:
        """Count N tokens routed to one expert; arguments as for `add_routed`."""
        expert_ids_N = torch.full(domain_N.shape, expert, dtype=torch.int64)
        self.add_routed(expert_ids_N, domain_N, router_weights_N, norms_N)

    def add_routed(
        self,
        expert_ids_P: torch.Tensor,
        domain_P: torch.Tensor,
        router_weights_P: torch.Tensor,
        norms_P: torch.Tensor,
    ) -> None:
        """Count P routed (token, expert) pairs, in any order.

        `domain_P` indexes `domains`, or is PADDING: such pairs are left out. `norms_P` is the L2
        norm of the unweighted output and `router_weights_P` the coefficient the forward pass used.
        The caller has left out pairs of zero-computation experts. The same pairs in the same order
        give the same bits; another order or another split into calls may differ in the last bit of
        a sum.
        """
        assert expert_ids_P.shape == domain_P.shape == router_weights_P.shape == norms_P.shape
        shape = (len(self.domains), self.num_experts)
        domain_P = domain_P.to(torch.int64)
        if expert_ids_P.numel() and not expert_ids_P.is_cuda:  # on a GPU asking would wait
            assert 0 <= int(expert_ids_P.min()) <= int(expert_ids_P.max()) < shape[1], "expert id"
            real_P = domain_P[domain_P != PADDING]
            assert bool(((real_P >= 0) & (real_P < shape[0])).all()), "domain id"
        cell_P = torch.where(
            domain_P == PADDING, shape[0] * shape[1], domain_P * shape[1] + expert_ids_P
        )
        values = (router_weights_P.detach().double(), norms_P.detach().double())
        if self.sums.count.is_cuda:
            self._add_segments(cell_P, *values)
        else:
            self._add_in_order(cell_P, *values)

    def _add_in_order(
        self, cell_P: torch.Tensor, weights_P: torch.Tensor, norms_P: torch.Tensor
    ) -> None:
        shape = self.sums.count.shape
        num_cells = shape.numel()
        cell_P, weights_P, norms_P = cell_P.cpu(), weights_P.cpu(), norms_P.cpu()
        real_P = cell_P < num_cells
        cell_P, weights_P, norms_P = cell_P[real_P], weights_P[real_P], norms_P[real_P]
        self.sums.count.add_(torch.bincount(cell_P, minlength=num_cells).view(shape))
        for total, values_P in self._addends(weights_P, norms_P):
            total.add_(torch.bincount(cell_P, values_P, minlength=num_cells).view(shape))
        self.sums.norm_max.view(-1).scatter_reduce_(0, cell_P, norms_P, "amax")

    def _add_segments(
        self, cell_P: torch.Tensor, weights_P: torch.Tensor, norms_P: torch.Tensor
    ) -> None:
        shape = self.sums.count.shape
        segments = Segments.of(cell_P, shape.numel())
        weights_P, norms_P = segments.sorted(weights_P), segments.sorted(norms_P)
        self.sums.count.add_(segments.count().view(shape))
        for total, values_P in self._addends(weights_P, norms_P):
            total.add_(segments.reduced(values_P, "sum").view(shape))
        largest = segments.reduced(norms_P, "max").view(shape)
        torch.maximum(self.sums.norm_max, largest, out=self.sums.norm_max)

    def _addends(
        self, weights_P: torch.Tensor, norms_P: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Every sum but count and maximum, with what a pair adds to it."""
        weighted_P = weights_P * norms_P
        return (
            (self.sums.router_weight_sum, weights_P),
            (self.sums.norm_sum, norms_P),
            (self.sums.weighted_norm_sum, weighted_P),
            (self.sums.norm_sq_sum, norms_P * norms_P),
            (self.sums.weighted_norm_sq_sum, weighted_P * weighted_P),
        )

    def pooled(self, weights: Mapping[str, float] | None = None) -> ExpertSums:
        """The sums [E] over all domains.

        `weights` multiplies each domain's sums (every token counts 1 without it); a domain it
        does not name has weight 0 and does not enter `norm_max`. InputError when it names an
        unknown domain or gives a weight that is negative, not finite, or none above zero.
        """
        weight_M = torch.tensor(
            self._domain_weights(weights) if weights is not None else [1.0] * len(self.domains),
            dtype=torch.float64,
        )
        present_M = weight_M > 0
        pooled = {}
        for name, values_ME in self.sums.named():
            chosen_ME = values_ME[present_M]
            if name == "norm_max":
                pooled[name] = chosen_ME.amax(0)
            else:
                pooled[name] = (chosen_ME * weight_M[present_M, None]).sum(0)
        return ExpertSums(**pooled)

    def _domain_weights(self, weights: Mapping[str, float]) -> list[float]:
        unknown = sorted(set(weights) - set(self.domains))
        if unknown:
            raise InputError(
                f"no domain {unknown[0]!r} was scored; the domains are {', '.join(self.domains)}"
            )
        values = [float(weights.get(domain, 0.0)) for domain in self.domains]
        if not all(0 <= value < float("inf") for value in values) or not any(values):
            raise InputError(
                "weights of domains must be finite, not negative and not all zero; got "
                + ", ".join(f"{name}={value}" for name, value in weights.items())
            )
        return values

    def check_finite(self, layer: int) -> None:
        """InputError naming the layer and its first expert whose outputs were not finite."""
        good_E = torch.ones(self.num_experts, dtype=torch.bool)
        for _, values_ME in self.sums.named():
            good_E &= torch.isfinite(values_ME).all(0)
        if not good_E.all():
            bad = torch.nonzero(~good_E).flatten().tolist()
            raise InputError(
                f"layer {layer}: outputs or router weights of {len(bad)} experts "
                f"(first: expert {bad[0]}) are not finite; the checkpoint holds NaN or Inf there "
                "or overflows in this --dtype; check the download, or use --dtype float32"
            )

    def to_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer's tensors [E] under their names in the file."""
        return {
            tensor_name(layer, domain, name): values_ME[row].clone()
            for name, values_ME in self.sums.named()
            for row, domain in enumerate(self.domains)
        }

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        layer: int,
        num_experts: int,
        domains: tuple[str, ...],
    ) -> LayerStats:
        """The reverse of `to_tensors`. InputError when a tensor is missing or cannot be a sum."""
        stats = cls.empty(num_experts, domains)
        for name, values_ME in stats.sums.named():
            for row, domain in enumerate(domains):
                key = tensor_name(layer, domain, name)
                if key not in tensors:
                    raise InputError(f"saliency: no tensor {key}; score the model again")
                tensor = tensors[key]
                if tensor.dtype != torch.float64 or tensor.shape != (num_experts,):
                    raise InputError(
                        f"saliency: {key} is {tensor.dtype} {list(tensor.shape)}, expected "
                        f"torch.float64 [{num_experts}]; score the model again"
                    )
                values_ME[row] = tensor
        stats.check_finite(layer)
        counts_ME = stats.sums.count
        if not ((counts_ME >= 0) & (counts_ME == counts_ME.round())).all():
            raise InputError(
                f"saliency: counts of layer {layer} are no counts; score the model again"
            )
        return stats

    def __add__(self, other: LayerStats) -> LayerStats:
        """Both layers' tokens; the domains are the union, in order of first appearance."""
        assert self.num_experts == other.num_experts
        merged = LayerStats.empty(self.num_experts, merge_domains(self.domains, other.domains))
        for part in (self, other):
            rows = [merged.domains.index(domain) for domain in part.domains]
            for name, values_ME in part.sums.named():
                total_ME = getattr(merged.sums, name)
                if name == "norm_max":
                    total_ME[rows] = torch.maximum(total_ME[rows], values_ME)
                else:
                    total_ME[rows] += values_ME
        return merged


def tensor_name(layer: int, domain: str, name: str) -> str:
    """The key of one [E] vector in saliency.safetensors."""
    return f"layers.{layer}.{domain}.{name}"


def check_domains(domains: tuple[str, ...]) -> None:
    """InputError unless the names are distinct, not empty and printable.

    A name may hold dots (it is often a file's): in a key it stands between the layer's digits and
    a field without dots, so it can be told apart.
    """
    bad = [name for name in domains if not name or not name.isprintable()]
    if bad or not domains or len(set(domains)) != len(domains):
        raise InputError(
            "domain names must be distinct, not empty and printable; got "
            f"{', '.join(map(repr, domains)) or 'none'}; rename the mix's domains"
        )


def merge_domains(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """The union in order of first appearance."""
    return tuple(dict.fromkeys((*first, *second)))
