"""What went into the Linears of one layer: Hessians, counts and ranges for rounding.

    H = sum over real tokens of x x^T        float32 [K, K]

is all GPTQ wants of a Linear's inputs. For Linears outside the experts it is accumulated while
the layer runs, over all tokens up to `hessian_rows`; of more, over an even share of the batches
(o_proj's 16,384 columns in DeepSeek-V3.2 cost two thirds of what the experts do together, and a
Hessian is no better for being summed without end). Experts would need one K x K matrix each (52 GB
in a DeepSeek-V3.2 layer). On a GPU those are summed while the layer runs, as many as fit
(quant/expert_sums.py). Elsewhere the MoE block's own input is kept, once for each token, and who
was routed where, and the Hessians of a few experts at a time are made from that. Only tokens that
were really routed to an expert count: sending every token through every expert costs E / top_k
times the work and bends the Hessians toward tokens the expert never sees.

Legend: T tokens of a batch, N tokens of one expert, K inputs of a Linear, E experts, B experts
rounded together, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from calibration.batches import Batch
from models.device import sent
from models.experts import RoutedBatch, RoutedExperts
from models.needs import hessian_rows
from quant.gptq import isotropic, shrink_hessian
from quant.hessians import add_products, made_symmetric, whole_range, zero_sums


class LinearInputs:
    """Sums over the inputs of named Linears, of `num_tokens` in all. Linears fed by one tensor
    share one Hessian."""

    def __init__(self, with_hessian: bool, num_tokens: int) -> None:
        self.with_hessian, self.num_tokens = with_hessian, num_tokens
        self.source: dict[str, str] = {}  # Linear -> the Linear whose sums it shares
        self.hessian: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}
        self.batches: dict[str, int] = {}
        self.count: dict[str, int] = {}  # rows in the Hessian
        self._entered: tuple[torch.Tensor, str] | None = None

    def add(self, name: str, x: torch.Tensor, batch: Batch) -> None:
        """One batch's input [..., K] of a Linear; padding rows are left out."""
        if name not in self.source:
            shared = self._entered is not None and self._entered[0] is x
            self.source[name] = self._entered[1] if shared and self._entered else name
        self._entered = (x, self.source[name])
        if self.source[name] != name:
            return
        rows = x.reshape(len(batch.domain_T), -1)
        real_T = batch.real_T
        if not bool(real_T.all()):  # listed on the CPU: nothing here waits for the GPU
            rows = rows[sent(real_T.nonzero().flatten(), x.device)]
        low, high = torch.aminmax(rows)
        largest = torch.maximum(-low, high).float()
        self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
        number = self.batches.get(name, 0)
        self.batches[name] = number + 1
        share = hessian_rows(rows.shape[1]) / max(1, self.num_tokens)
        if not is_taken(number, share):
            return
        self.count[name] = self.count.get(name, 0) + len(rows)
        if self.with_hessian:
            if name not in self.hessian:
                self.hessian[name] = zero_sums(1, rows.shape[1], x.device)
            add_products(self.hessian[name], rows, *whole_range(rows))

    def sums_of(self, name: str) -> tuple[torch.Tensor | None, int, float]:
        """(Hessian or None, rows in it, largest |x|) of a Linear; zeros for one that never ran."""
        source = self.source.get(name, name)
        if source not in self.count:
            return None, 0, 0.0
        hessian = self.hessian.get(source)
        if hessian is not None and hessian.is_cuda:
            made_symmetric(hessian)
        return (
            None if hessian is None else hessian[0],
            self.count[source],
            float(self.largest[source]),
        )


def is_taken(number: int, share: float) -> bool:
    """Whether batch `number` is among a `share` of all batches: the first one, then every n-th, so
    that all kinds of samples are among them."""
    return share >= 1 or number == 0 or int(number * share) > int((number - 1) * share)


class TakesInputs(Protocol):
    """`LinearInputs`, or what brings inputs to those of other processes (quant/sharing.py)."""

    def add(self, name: str, x: torch.Tensor, batch: Batch) -> None:
        """One batch's input [..., K] of a Linear."""


@contextmanager
def watched(
    linears: Mapping[str, nn.Module], inputs: TakesInputs, batch: list[Batch]
) -> Iterator[None]:
    """While open, inputs of `linears` are added for the batch that `batch` holds."""

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_pre_hook(lambda _, args: inputs.add(name, args[0], batch[0]))

    handles = [watch(name, module) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pair_weights(
    token_P: torch.Tensor, weight_P: torch.Tensor | None, num_tokens: int
) -> torch.Tensor:
    """How much each token counts in its layer's pooled Hessian [T]: once for each pair, or by the
    square of what multiplied its input."""
    return torch.bincount(
        token_P, None if weight_P is None else weight_P.float() ** 2, minlength=num_tokens
    )


class PooledHessian:
    """The Hessian a routed token of a layer has on average (gate and up), float32 [D, D]."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.pairs = 0

    def add(self, x_TD: torch.Tensor, weight_T: torch.Tensor, pairs: int) -> None:
        """One batch, with `pair_weights`."""
        x = x_TD.float()
        part = x.T @ (x * weight_T.to(x)[:, None])
        self.total = part if self.total is None else self.total + part
        self.pairs += pairs

    def mean(self) -> torch.Tensor:
        """For a pair."""
        assert self.total is not None
        return self.total / max(1, self.pairs)


@dataclass(frozen=True, slots=True)
class Fed:
    """What one matrix each of a set of experts was fed.

    `hessian_BKK` is what rounding is to heed: per token, drawn toward what the layer's experts
    have in common where tokens are few; None where it was not asked for. `largest_B` is |x|.
    """

    hessian_BKK: torch.Tensor | None
    largest_B: list[float]


class ExpertInputs(Protocol):
    """The inputs of a layer's experts, however they are kept."""

    @property
    def count_E(self) -> torch.Tensor:
        """Tokens of each expert, int64 [E] on the CPU."""

    def add(self, record: RoutedBatch, batch: Batch) -> None:
        """Take in what one batch's experts got; padding left out."""

    def up(self, experts: Sequence[int], device: torch.device, *, solved: bool) -> Fed:
        """Of gate and up; Hessians where they are `solved` for."""

    def down(
        self, experts: Sequence[int], loaded: RoutedExperts, device: torch.device, *, solved: bool
    ) -> Fed:
        """Of down, by the gate and up that `loaded` holds now."""


class RoutedInputs:
    """Inputs of a layer's experts: every token's once, and the pairs the router made."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.count_E = torch.zeros(num_experts, dtype=torch.int64)
        self.inputs: list[torch.Tensor] = []  # [T, D] of each batch, on the CPU
        # (expert, token, weight that multiplied the input or None) of real pairs, by expert
        self.pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.mean: torch.Tensor | None = None  # the pooled Hessian

    def add(self, record: RoutedBatch, batch: Batch) -> None:
        """Keep what one batch's experts got; padding left out."""
        token_P, expert_P = record.token_P.cpu(), record.expert_P.cpu()
        real_P = batch.real_T[token_P]
        weight_P = None
        if record.weights_applied_to_input:  # Llama-4: the expert's input is w x
            weight_P = record.router_weights_P.cpu()[real_P]
        self.inputs.append(record.inputs_TD.cpu())
        self.pairs.append((expert_P[real_P], token_P[real_P], weight_P))
        self.count_E += torch.bincount(expert_P[real_P], minlength=self.num_experts)

    def of(self, expert: int) -> torch.Tensor:
        """All inputs of one expert, [N, D]."""
        rows = []
        for x_TD, (expert_P, token_P, weight_P) in zip(self.inputs, self.pairs, strict=True):
            start = int(torch.searchsorted(expert_P, expert))
            end = int(torch.searchsorted(expert_P, expert, right=True))
            x_ND = x_TD[token_P[start:end]]
            rows.append(x_ND if weight_P is None else x_ND * weight_P[start:end, None])
        return torch.cat(rows)

    def pooled(self, device: torch.device) -> torch.Tensor:
        """The Hessian a routed token of this layer has on average, made on `device`."""
        if self.mean is None:
            pooled = PooledHessian()
            for x_TD, (_, token_P, weight_P) in zip(self.inputs, self.pairs, strict=True):
                weight_T = pair_weights(token_P, weight_P, len(x_TD))
                pooled.add(x_TD.to(device), weight_T, len(token_P))
            self.mean = pooled.mean()
        return self.mean

    def up(self, experts: Sequence[int], device: torch.device, *, solved: bool) -> Fed:
        """See `ExpertInputs`."""
        inputs = [self.of(expert).to(device) for expert in experts]
        return fed_by(inputs, self.pooled(device) if solved else None, solved=solved)

    def down(
        self, experts: Sequence[int], loaded: RoutedExperts, device: torch.device, *, solved: bool
    ) -> Fed:
        """See `ExpertInputs`."""
        assert loaded.weights is not None
        inputs = []
        for expert in experts:
            x_ND = self.of(expert).to(device)
            up = loaded.weights.up_for_mm[expert].T.contiguous().to(x_ND.dtype)
            inputs.append(loaded.activate(torch.nn.functional.linear(x_ND, up)))
        return fed_by(inputs, None, solved=solved)


def fed_by(inputs: Sequence[torch.Tensor], pooled: torch.Tensor | None, *, solved: bool) -> Fed:
    """From the rows [N, K] of each expert. Without a `pooled` Hessian, those with few tokens are
    drawn toward an isotropic one: channels of down's inputs mean something else in each expert."""
    largest_B = [float(x.abs().amax()) if len(x) else 0.0 for x in inputs]
    if not solved:
        return Fed(None, largest_B)
    hessian_BKK = torch.stack([_per_token_hessian(x) for x in inputs])
    tokens_B = torch.tensor([len(x) for x in inputs])
    if pooled is None:
        seen = hessian_BKK[tokens_B > 0]
        size = hessian_BKK.shape[-1]
        pooled = isotropic(seen.mean(0)) if len(seen) else torch.eye(size, device=inputs[0].device)
    return Fed(shrink_hessian(hessian_BKK, tokens_B, pooled), largest_B)


def _per_token_hessian(x_NK: torch.Tensor) -> torch.Tensor:
    x = x_NK.float()
    return x.T @ x / max(1, len(x))
