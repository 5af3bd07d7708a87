"""What dropping experts does to a layer's output: its error for any set of experts that stay.

For a token t let y_t be the weighted sum of its experts in the model as it is, and y_t(S) that of
the layer with only the experts S, routed anew and renormalised as the pruned router will do it
(models/routing.py). The damage of S is

    e(S) = sum_t a_t |y_t - y_t(S)|^2 / sum_t a_t |y_t|^2,      a_t = 1 / |h_t|^2

with h_t the hidden states that leave the layer: every later layer norms them, so an error counts
relative to them. Without a_t a few tokens of huge norm decide alone.

|y_t - y_t(S)|^2 is a quadratic form in the inner products <f_e(t), f_e'(t)> of *unweighted* expert
outputs, so one small matrix a token serves every S. It is kept for R sampled tokens and each one's
C best experts by the router's own order; these outputs are computed while the layer is resident.
An expert beyond those C, should S be so poor that a token falls through to it, counts as
orthogonal to the others, with its mean squared norm.

A sample's error is noisy in the experts few tokens reach. What needs no re-routing is known over
*all* tokens: G, the inner products of weighted contributions of experts that ran together. Its
form g(S) = sum over dropped d, d' of G_dd' is what S costs if nothing takes the dropped experts'
place. Sample and whole are joined by the classical ratio estimator

    e(S) = e_sample(S) * g_all(S) / g_sample(S).

Legend: T tokens of a batch, R sampled tokens, E experts, K top_k, C candidates, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from calibration.batches import Batch
from calibration.tokens import TokenSet
from models.device import has_kernels, sent
from models.errors import InputError
from models.experts import RoutedBatch, RoutedExperts
from models.layer_slot import Carry
from models.processes import ALONE, Processes
from models.routing import RoutingLaw, best_fit
from models.skeleton import Skeleton
from reap.segments import Segments

SAMPLED_TOKENS = 2048
CANDIDATES = 4  # times top_k: how far down the router's order a re-routed token is followed
# Expert outputs computed at a time; every time a GPU reads all experts once.
ROWS_AT_ONCE = {"cpu": 4096, "cuda": 32768}
TOKENS_AT_ONCE = 1024  # of which contributions are copied at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDamage:
    """The statistics of one layer; float32 but where said."""

    law: RoutingLaw
    logits_RE: torch.Tensor
    bias_E: torch.Tensor
    weights_RE: torch.Tensor  # of the forward pass, 0 where an expert was not chosen
    candidates_RC: torch.Tensor  # int16, best first
    products_RCC: torch.Tensor  # <f_e, f_e'> of a token's candidates
    token_weight_R: torch.Tensor  # a_t
    gram_EE: torch.Tensor  # float64, over all tokens: sum a_t w_e w_e' <f_e, f_e'>
    norm_sq_E: torch.Tensor  # mean |f_e|^2 over the sampled tokens that have e as a candidate

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_RE.shape[1]


TENSORS = tuple(name for name in LayerDamage.__dataclass_fields__ if name != "law")


def sampled_rows(
    tokens: TokenSet, cuts: Sequence[tuple[int, ...]], size: int, *, packed: bool
) -> dict[tuple[int, ...], torch.Tensor]:
    """For every batch (by its samples) the rows of the flattened batch that are sampled, ascending.

    `size` tokens of the set, or all, drawn uniformly with a fixed seed: the same in every layer
    and in a resumed run. Padding is never drawn. `packed` samples follow each other in one row.
    """
    lengths = tokens.lengths()
    total = sum(lengths)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:size]
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[drawn] = True
    rows, start = {}, 0
    for samples in cuts:
        width = max(lengths[sample] for sample in samples)
        found, place = [], 0
        for sample in samples:
            inside = chosen[start : start + lengths[sample]].nonzero().flatten()
            found.append(inside + place)
            start += lengths[sample]
            place += lengths[sample] if packed else width
        rows[samples] = torch.cat(found)
    return rows


@dataclass(slots=True)
class DamageCollector:
    """Fills a `LayerDamage` in one pass over the batches of a layer, dealt to `processes`."""

    layer: int
    num_experts: int
    top_k: int
    rows: dict[tuple[int, ...], torch.Tensor]
    processes: Processes = ALONE
    inputs: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    token_weights: list[torch.Tensor] = field(default_factory=list)
    grams: list[torch.Tensor] = field(default_factory=list)  # [E, E]: one, or one for each batch
    pending: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def routed(self, record: RoutedBatch, batch: Batch) -> None:
        """What the layer's experts did with a batch."""
        num_tokens, num_pairs = len(batch.domain_T), len(record.token_P)
        if record.weights_applied_to_input or num_pairs != num_tokens * self.top_k:
            raise InputError(
                f"layer {self.layer}: experts with weighted inputs (Llama-4) or zero-computation "
                "experts (LongCat) cannot be re-routed offline; score without --damage"
            )
        device = record.outputs_PD.device
        order_TK = torch.argsort(record.token_P, stable=True).view(num_tokens, self.top_k)
        expert_TK = record.expert_P[order_TK].long()
        weights_TK = record.router_weights_P[order_TK].float()
        rows = sent(self.rows[batch.samples], device)
        self.inputs.append(record.inputs_TD[rows])
        weights_RE = torch.zeros(len(rows), self.num_experts, device=device)
        self.weights.append(weights_RE.scatter_(1, expert_TK[rows], weights_TK[rows]))
        self.pending = (expert_TK, products_of(record.outputs_PD, order_TK, weights_TK), rows)

    def left(self, batch: Batch, carry: Carry) -> None:
        """What left the layer for the batch `routed` saw last."""
        assert self.pending is not None
        expert_TK, products_TKK, rows = self.pending
        self.pending = None
        hidden = carry["hidden_states"]
        hidden_TD = hidden.reshape(len(batch.domain_T), -1)
        norm_T = torch.linalg.vector_norm(hidden_TD, dim=-1, dtype=torch.float32)
        weight_T = norm_T.square().clamp_min(1e-30).reciprocal()
        self.token_weights.append(weight_T[rows])
        weighted_TKK = (products_TKK * weight_T[:, None, None]).double()
        padding_T = ~batch.real_on(hidden.device)  # may hold anything
        weighted_TKK.masked_fill_(padding_T[:, None, None], 0.0)
        cells = (expert_TK[:, :, None] * self.num_experts + expert_TK[:, None, :]).flatten()
        if cells.is_cuda:
            segments = Segments.of(cells.int(), self.num_experts**2)
            total = segments.reduced(segments.sorted(weighted_TKK.flatten()), "sum")
        else:
            total = torch.bincount(cells, weighted_TKK.flatten(), minlength=self.num_experts**2)
        total = total.view(self.num_experts, -1)
        if self.processes.size > 1 or not self.grams:
            self.grams.append(total)
        else:
            self.grams[-1] += total

    def gather(self) -> None:
        """Bring what all processes collected together, in the order of the batches."""
        if self.processes.size > 1:
            self.inputs = self.processes.gather_dealt([rows.cpu() for rows in self.inputs])
            for parts in (self.weights, self.token_weights, self.grams):
                parts[:] = self.processes.gather_dealt([part.cpu() for part in parts])

    @torch.inference_mode()
    def finish(self, skeleton: Skeleton) -> LayerDamage:
        """The statistics, while the layer is loaded. InputError when its router is not known."""
        inputs_RD = torch.cat(self.inputs).to(skeleton.device)
        weights_RE = torch.cat(self.weights).cpu()
        law, logits_RE, bias_E = self._router(skeleton, inputs_RD, weights_RE)
        zero_to_all = torch.ones(self.num_experts, dtype=torch.bool)
        choice_RE = law.probabilities(logits_RE, zero_to_all) + bias_E
        count = min(self.num_experts, CANDIDATES * self.top_k)
        candidates_RC = choice_RE.topk(count, dim=-1).indices
        # groups can choose an expert that is not among the best of all
        missed = (weights_RE.gather(1, candidates_RC) != 0).sum(1) < self.top_k
        if missed.any():
            first = choice_RE[missed].masked_fill(weights_RE[missed] != 0, float("inf"))
            candidates_RC[missed] = first.topk(count, dim=-1).indices
        products_RCC = self._candidate_products(
            skeleton.experts[self.layer], inputs_RD, candidates_RC
        )
        squares_RC = products_RCC.diagonal(dim1=1, dim2=2).double()
        shape = (self.num_experts,)
        count_E = torch.bincount(candidates_RC.flatten(), minlength=self.num_experts)
        sum_E = torch.zeros(shape, dtype=torch.float64).index_add_(
            0, candidates_RC.flatten(), squares_RC.flatten()
        )
        return LayerDamage(
            law=law,
            logits_RE=logits_RE,
            bias_E=bias_E,
            weights_RE=weights_RE,
            candidates_RC=candidates_RC.to(torch.int16),
            products_RCC=products_RCC,
            token_weight_R=torch.cat(self.token_weights).cpu(),
            gram_EE=sum(self.grams[1:], self.grams[0]).cpu(),
            norm_sq_E=(sum_E / count_E.clamp_min(1)).float(),
        )

    def _router(
        self, skeleton: Skeleton, inputs_RD: torch.Tensor, weights_RE: torch.Tensor
    ) -> tuple[RoutingLaw, torch.Tensor, torch.Tensor]:
        """The router's law with the logits [R, E] and the selection bias [E] it works on."""
        matrix: torch.Tensor | None = None
        vectors: dict[str, torch.Tensor] = {}
        for name in skeleton.by_part[self.layer]:
            if skeleton.spec.place(name).kind != "router":
                continue
            value = skeleton.source.read(skeleton.names[name]).float().cpu()
            if value.numel() == self.num_experts:
                vectors[name] = value.flatten()
            elif matrix is None and value.shape == (self.num_experts, inputs_RD.shape[1]):
                matrix = value
        if matrix is None:
            raise InputError(
                f"layer {self.layer}: no router weight of shape [{self.num_experts}, "
                f"{inputs_RD.shape[1]}] is stored; score without --damage"
            )
        logits_RE = (inputs_RD.float() @ matrix.T.to(inputs_RD.device)).cpu()
        # each stored vector may be a bias of the selection or of the logits, or neither
        inputs = [(logits_RE, torch.zeros(self.num_experts))]
        for vector_E in vectors.values():
            inputs += [(logits_RE, vector_E), (logits_RE + vector_E, inputs[0][1])]
        fitted = best_fit(skeleton.spec, inputs, weights_RE)
        if fitted is None:
            raise InputError(
                f"layer {self.layer}: the router of this {skeleton.spec.architecture.title} model "
                "follows no law that can be applied to fewer experts offline; score without "
                "--damage, and use another criterion than output-error"
            )
        number, law = fitted
        return law, *inputs[number]

    def _candidate_products(
        self, experts: RoutedExperts, inputs_RD: torch.Tensor, candidates_RC: torch.Tensor
    ) -> torch.Tensor:
        count = candidates_RC.shape[1]
        block = max(1, ROWS_AT_ONCE[inputs_RD.device.type] // count)
        products = []
        for inputs_BD, ids_BC in zip(
            inputs_RD.split(block), candidates_RC.to(inputs_RD.device).split(block), strict=True
        ):
            expert_P, order_P = torch.sort(ids_BC.flatten(), stable=True)
            offsets_E = torch.bincount(expert_P, minlength=self.num_experts).cumsum(0)
            outputs_PD = experts.expert_outputs(inputs_BD[order_P // count], expert_P, offsets_E)
            sorted_back = torch.empty_like(outputs_PD)
            sorted_back[order_P] = outputs_PD
            outputs_BCD = sorted_back.view(len(ids_BC), count, -1).float()
            products.append((outputs_BCD @ outputs_BCD.mT).cpu())
        return torch.cat(products)


def products_of(
    outputs_PD: torch.Tensor, order_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Inner products of the weighted contributions of each token, float32 [T, K, K]; row
    `order_TK[t, k]` of `outputs_PD` is what its choice k gave."""
    if has_kernels(outputs_PD) and outputs_PD.element_size() == 2:
        from reap.kernels.gram import weighted_products

        return weighted_products(outputs_PD, order_TK, weights_TK)
    found = []
    for order, weights in zip(
        order_TK.split(TOKENS_AT_ONCE), weights_TK.split(TOKENS_AT_ONCE), strict=True
    ):
        outputs_TKD = outputs_PD[order].float() * weights.unsqueeze(-1)
        found.append(outputs_TKD @ outputs_TKD.mT)
    return torch.cat(found)
