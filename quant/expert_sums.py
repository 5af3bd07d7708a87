"""Hessians of a layer's experts, summed on the GPU while the layer runs.

    gate, up   H_e = Σ x xᵀ over the tokens routed to e, straight from the batch's pairs. As many
               sets of experts as have room are summed in the first pass; the layer is run again
               for the others, whose gate and up cannot change what the block is fed.
    pooled     the sum of all H_e; of experts without a matrix of their own, one sum together.
    down       of what the rounded gate and up give. Its inputs are those of every n-th batch,
               kept for that: at most KEPT_BYTES. (All batches where they fit. A share of 600,000
               tokens of a DeepSeek-V3.2 block is ten times what a matrix of 2,048 columns needs.)

Which batches are kept depends on sizes alone, not on the memory of the day, so that a job that was
killed goes on as it began. Experts with few tokens are drawn toward the pooled Hessian as in
quant/gptq.py, here in place on the sums: (S + m P) / (n + m).

Legend: E experts, B experts of a set, P pairs sorted by expert, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calibration.batches import Batch
from models.experts import RoutedBatch, RoutedExperts
from quant.hessians import add_products, made_symmetric, whole_range, zero_sums
from quant.inputs import Fed, is_taken

KEPT_BYTES = 8 << 30
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Pairs:
    """The real pairs of one batch by expert; those of expert e are begin_E[e] .. end_E[e]."""

    inputs_TD: torch.Tensor
    token_P: torch.Tensor
    weight_P: torch.Tensor | None  # that multiplies the input
    expert_P: torch.Tensor
    begin_E: torch.Tensor
    end_E: torch.Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same on `device`."""
        return Pairs(
            self.inputs_TD.to(device),
            self.token_P.to(device),
            None if self.weight_P is None else self.weight_P.to(device),
            self.expert_P.to(device),
            self.begin_E.to(device),
            self.end_E.to(device),
        )

    def rows(self) -> torch.Tensor:
        """The experts' inputs, [P, D]."""
        inputs_PD = self.inputs_TD[self.token_P]
        return inputs_PD if self.weight_P is None else inputs_PD * self.weight_P.unsqueeze(-1)


def pairs_of(record: RoutedBatch, batch: Batch, num_experts: int) -> Pairs:
    """What a batch's experts got, padding left out."""
    token_P, expert_P = record.token_P, record.expert_P.long()  # some routers choose in int32
    weight_P = record.router_weights_P
    real_T = batch.real_T
    if not bool(real_T.all()):
        real_P = batch.real_on(token_P.device)[token_P]
        if record.top_k is None:
            chosen = real_P.nonzero().flatten()
        else:  # to know how many there are nobody has to wait for a GPU
            first = torch.sort((~real_P).to(torch.uint8), stable=True).indices
            chosen = first[: int(real_T.sum()) * record.top_k]
        token_P, expert_P, weight_P = token_P[chosen], expert_P[chosen], weight_P[chosen]
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=token_P.device)
    count_E.scatter_add_(0, expert_P, torch.ones_like(expert_P))
    end_E = count_E.cumsum(0)
    return Pairs(
        inputs_TD=record.inputs_TD,
        token_P=token_P,
        weight_P=weight_P if record.weights_applied_to_input else None,  # Llama-4
        expert_P=expert_P,
        begin_E=end_E - count_E,
        end_E=end_E,
    )


class ExpertSums:
    """What the experts of `sets` were fed; see the module's docstring.

    `room` is how many bytes of Hessians may be held at once, `again` runs the layer once more
    with this object watching. `num_tokens` is what a pass holds, padding not counted.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        num_experts: int,
        *,
        with_hessian: bool,
        num_tokens: int,
        room: int,
        again: Callable[[], None],
    ) -> None:
        self.sets = [torch.tensor(list(one)) for one in sets]
        self.index = {tuple(one): number for number, one in enumerate(sets)}
        self.num_experts, self.num_tokens = num_experts, num_tokens
        self.with_hessian, self.room, self.again = with_hessian, room, again
        self.first_pass = True
        self.batches = 0
        self.kept: list[Pairs] = []
        self.counts: torch.Tensor | None = None  # of pairs, int64 [E]
        self.largest_E: torch.Tensor | None = None
        self.sums: dict[int, torch.Tensor] = {}  # set -> [B, D, D], lower triangles
        self.held_E = torch.zeros(0, dtype=torch.bool)  # experts that had room in the first pass
        self.rest: torch.Tensor | None = None  # [1, D, D] of the experts that had no room
        self.pooled: torch.Tensor | None = None  # a pair's, lower triangle
        self.middle_counts: torch.Tensor | None = None  # of kept pairs
        self.middle_largest_E: torch.Tensor | None = None

    # -- while the layer runs ------------------------------------------------------------------

    def add(self, record: RoutedBatch, batch: Batch) -> None:
        """Take in what one batch's experts got; padding left out."""
        pairs = pairs_of(record, batch, self.num_experts)
        inputs_PD = record.inputs_PD
        if inputs_PD is None or len(inputs_PD) != len(pairs.token_P):  # padding among them
            inputs_PD = pairs.rows()
        if self.first_pass:
            self._take_first(pairs, inputs_PD)
        self._add_sets(inputs_PD, pairs)

    def _take_first(self, pairs: Pairs, inputs_PD: torch.Tensor) -> None:
        """What is taken in the first pass alone: counts, ranges, inputs for down, and the sum
        over experts without a sum of their own."""
        device, size = inputs_PD.device, inputs_PD.shape[1]
        if self.counts is None:
            self.counts = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.largest_E = torch.zeros(self.num_experts, device=device)
            if self.with_hessian:
                self._make_room(0, size, device)
                self.held_E = torch.zeros(self.num_experts, dtype=torch.bool, device=device)
                self.held_E[torch.cat([self.sets[number] for number in self.sums])] = True
                if not bool(self.held_E.all()):
                    self.rest = zero_sums(1, size, device)
        assert self.largest_E is not None
        self.counts += pairs.end_E - pairs.begin_E
        if pairs.weight_P is None:
            largest_P = largest_of_rows(pairs.inputs_TD)[pairs.token_P]
        else:
            largest_P = largest_of_rows(inputs_PD)
        self.largest_E.scatter_reduce_(0, pairs.expert_P, largest_P, "amax")
        self._keep(pairs)
        if self.rest is not None:
            rows = inputs_PD[~self.held_E[pairs.expert_P]]
            add_products(self.rest, rows, *whole_range(rows))

    def _make_room(self, start: int, size: int, device: torch.device) -> None:
        """Zero sums for the sets from `start` on, as many as there is room for, one at least."""
        taken = 0
        for number in range(start, len(self.sets)):
            taken += FLOAT * size * size * len(self.sets[number])
            if self.sums and taken > self.room:
                break
            self.sums[number] = zero_sums(len(self.sets[number]), size, device)

    def _add_sets(self, inputs_PK: torch.Tensor, pairs: Pairs) -> None:
        """Products of the experts' inputs, or of down's, to the sums there are."""
        for number, total in self.sums.items():
            experts = self.sets[number] = self.sets[number].to(inputs_PK.device)
            add_products(total, inputs_PK, pairs.begin_E[experts], pairs.end_E[experts])

    def _keep(self, pairs: Pairs) -> None:
        """Hold a batch's pairs for down, where it is among the batches kept."""
        width = pairs.inputs_TD.shape[1] * pairs.inputs_TD.element_size()
        if is_taken(self.batches, KEPT_BYTES / max(1, width * self.num_tokens)):
            self.kept.append(pairs.to(torch.device("cpu")) if self.room < KEPT_BYTES else pairs)
        self.batches += 1

    # -- when it has run -----------------------------------------------------------------------

    @property
    def count_E(self) -> torch.Tensor:
        """Tokens of each expert, int64 [E] on the CPU."""
        if self.counts is None:
            return torch.zeros(self.num_experts, dtype=torch.int64)
        return self.counts.cpu()

    def summed(self) -> torch.Tensor:
        """The Hessian of all pairs together, while all sums are there; lower triangle [D, D]."""
        parts = [total.sum(0) for total in self.sums.values()]
        if self.rest is not None:
            parts.append(self.rest[0])
        whole = parts[0]
        for part in parts[1:]:
            whole += part
        self.rest = None
        return whole

    def _end_first_pass(self) -> None:
        """The pooled Hessian."""
        if not self.first_pass:
            return
        self.first_pass = False
        if self.with_hessian:
            assert self.counts is not None
            self.pooled = self.summed().div_(self.counts.sum().clamp(min=1))

    def up(self, experts: Sequence[int], device: torch.device, *, solved: bool) -> Fed:
        """What gate and up of a set were fed. Sums are given up: once for each set, in order."""
        self._end_first_pass()
        assert self.counts is not None
        assert self.largest_E is not None
        largest_B = self.largest_E[list(experts)].tolist()
        if not solved:
            return Fed(None, largest_B)
        number = self.index[tuple(experts)]
        if number not in self.sums:
            assert self.pooled is not None
            self.sums.clear()
            self._make_room(number, len(self.pooled), device)
            self.again()
        assert self.pooled is not None
        hessian = self.sums.pop(number)
        tokens_B = self.counts[list(experts)].float()
        strength = float(hessian.shape[-1])
        hessian.add_(self.pooled, alpha=strength).div_((tokens_B + strength)[:, None, None])
        return Fed(made_symmetric(hessian), largest_B)

    def down(
        self, experts: Sequence[int], loaded: RoutedExperts, device: torch.device, *, solved: bool
    ) -> Fed:
        """What down of a set is fed by the gate and up in `loaded`. For each set once, in order,
        after all gate and up are in place."""
        number = self.index[tuple(experts)]
        if self.middle_counts is None or (solved and number not in self.sums):
            self._sum_middles(number, loaded, device, solved=solved)
        assert self.middle_counts is not None
        assert self.middle_largest_E is not None
        largest_B = self.middle_largest_E[list(experts)].tolist()
        if not solved:
            return Fed(None, largest_B)
        hessian = self.sums.pop(number)
        tokens_B = self.middle_counts[list(experts)].float()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        seen_B = tokens_B > 0
        means_B = diagonal.mean(1) / tokens_B.clamp(min=1)
        common = means_B.sum() / seen_B.sum() if bool(seen_B.any()) else torch.ones_like(means_B[0])
        strength = float(hessian.shape[-1])
        diagonal.add_(strength * common)  # toward an isotropic one, as quant/inputs.py says
        hessian.div_((tokens_B + strength)[:, None, None])
        return Fed(made_symmetric(hessian), largest_B)

    def _sum_middles(
        self, start: int, loaded: RoutedExperts, device: torch.device, *, solved: bool
    ) -> None:
        """Run the kept inputs through gate and up; sums for sets from `start` on."""
        self.sums.clear()
        first = self.middle_counts is None
        if first:
            self.middle_counts = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.middle_largest_E = torch.zeros(self.num_experts, device=device)
        assert self.middle_counts is not None
        assert self.middle_largest_E is not None
        for kept in self.kept:
            pairs = kept.to(device)
            middle_PF = loaded.activated(pairs.rows(), pairs.expert_P, pairs.end_E)
            if first:
                self.middle_counts += pairs.end_E - pairs.begin_E
                largest_P = largest_of_rows(middle_PF)
                self.middle_largest_E.scatter_reduce_(0, pairs.expert_P, largest_P, "amax")
            if solved:
                if not self.sums:
                    self._make_room(start, middle_PF.shape[1], device)
                self._add_sets(middle_PF, pairs)


def largest_of_rows(inputs_TK: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row, float32, in one pass."""
    return torch.linalg.vector_norm(inputs_TK, ord=torch.inf, dim=1).float()
