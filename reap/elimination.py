"""`output-error`: the experts whose absence changes the layer's output least.

Backward elimination: of all experts, drop the one whose removal leaves the smallest error e(S)
(reap/damage.py), re-route, and again, until the number is reached; then swaps: a dropped expert
comes back where another of its group can go for it with a smaller error, until no swap helps or
two rounds are done. Group quotas are kept throughout: the group-limited router is the one of the
final numbering, because masking the dropped experts inside a group is what slicing them out does.

A removal concerns the tokens that were sent to the expert, so only those are re-routed to rank it
(a removal can also change which groups a token reaches; that enters once the removal is made, not
its ranking). Experts without any sampled token cost nothing; among equals the one with the least
`reap_sum` goes first, so dead experts go first of all.

Refused: ranking once by the error of removing each expert alone. Experts that stand in for each
other are each cheap to drop and dear together.

Legend: N rows, R sampled tokens, E experts, K top_k, C candidates.
"""

from __future__ import annotations

import torch

from models.routing import RoutingLaw
from reap.damage import LayerDamage
from reap.sums import ExpertSums

SWAP_ROUNDS = 2
LEAST_GAIN = 1e-4  # of the error, for a swap to be made


class KeptSet:
    """A set of experts of one layer, the routing of the sampled tokens over it, and its error."""

    def __init__(self, damage: LayerDamage, law: RoutingLaw) -> None:
        self.damage, self.law = damage, law
        experts, rows = damage.num_experts, len(damage.logits_RE)
        candidates_RC = damage.candidates_RC.long()
        count = candidates_RC.shape[1]
        self.slot_RE = torch.full((rows, experts), count, dtype=torch.int64)
        self.slot_RE.scatter_(1, candidates_RC, torch.arange(count).expand(rows, -1))
        self.whole_RC = damage.weights_RE.gather(1, candidates_RC)
        known_E = damage.norm_sq_E > 0
        mean = damage.norm_sq_E[known_E].mean() if known_E.any() else torch.tensor(1.0)
        self.norm_sq_E = torch.where(known_E, damage.norm_sq_E, mean)
        every_R = torch.arange(rows)
        self.base = float(self._total(self._form(every_R, self.whole_RC)))
        self.kept_E = torch.ones(experts, dtype=torch.bool)
        # the form of what is dropped, if nothing takes its place: over all tokens and the sample
        self.gram_all = damage.gram_EE / damage.gram_EE.sum().clamp_min(1e-30)
        self.gram_sample = self._sample_gram()
        self.set(self.kept_E)

    def _sample_gram(self) -> torch.Tensor:
        damage = self.damage
        weighted = damage.products_RCC * self.whole_RC[:, :, None] * self.whole_RC[:, None, :]
        weighted = weighted * damage.token_weight_R[:, None, None]
        ids = damage.candidates_RC.long()
        experts = damage.num_experts
        cell = ids[:, :, None] * experts + ids[:, None, :]
        total = torch.bincount(cell.flatten(), weighted.double().flatten(), minlength=experts**2)
        return total.view(experts, experts) / self.base

    def _total(self, errors_R: torch.Tensor) -> torch.Tensor:
        return (errors_R.double() * self.damage.token_weight_R).sum()

    def _form(self, rows_N: torch.Tensor, difference_NC: torch.Tensor) -> torch.Tensor:
        products = self.damage.products_RCC[rows_N]
        return ((products @ difference_NC.unsqueeze(-1)).squeeze(-1) * difference_NC).sum(-1)

    def _errors(
        self, rows_N: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """|y - y(S)|^2 of rows routed so."""
        slots_NK = self.slot_RE[rows_N].gather(1, ids_NK)
        difference = torch.nn.functional.pad(self.whole_RC[rows_N], (0, 1))
        difference = difference.scatter_add(1, slots_NK, -weights_NK)[:, :-1]
        beyond_NK = (slots_NK == self.whole_RC.shape[1]) * weights_NK
        unknown_N = (beyond_NK.square() * self.norm_sq_E[ids_NK]).sum(-1)
        return self._form(rows_N, difference).clamp_min(0) + unknown_N

    def set(self, kept_E: torch.Tensor) -> None:
        """Keep `kept_E` (bool [E]) and route every sampled token over it."""
        rows = torch.arange(len(self.slot_RE))
        ids, weights = self.law.route(self.damage.logits_RE, self.damage.bias_E, kept_E)
        self.kept_E = kept_E.clone()
        self.ids_RK, self.errors_R = ids, self._errors(rows, ids, weights)
        self.without_RK = torch.empty(0)
        self.looked_at_RE = torch.empty(0)

    def error(self) -> float:
        """e(S): the damage as a share of the layer's routed output."""
        sample = float(self._total(self.errors_R)) / self.base
        dropped = (~self.kept_E).double()
        return sample * self._ratio(
            dropped @ self.gram_all @ dropped, dropped @ self.gram_sample @ dropped
        )

    @staticmethod
    def _ratio(whole: torch.Tensor, sample: torch.Tensor) -> float:
        """How much more the dropped experts did over all tokens than in the sample."""
        return float(whole / sample) if sample > 1e-12 else 1.0

    def _rank_rows(self, rows_N: torch.Tensor) -> torch.Tensor:
        """The error [N, K] of each row if the expert of each of its choices were not there."""
        ids_NK = self.ids_RK[rows_N]
        count, top_k = ids_NK.shape
        kept = self.kept_E.expand(count * top_k, -1).clone()
        kept[torch.arange(count * top_k), ids_NK.flatten()] = False
        repeated = rows_N.repeat_interleave(top_k)
        ids, weights = self.law.route(self.damage.logits_RE[repeated], self.damage.bias_E, kept)
        looked_at = torch.zeros(count, self.damage.num_experts, dtype=torch.bool)
        looked_at.scatter_(1, ids_NK, True).scatter_(1, ids.view(count, top_k * top_k), True)
        self.looked_at_RE[rows_N] = looked_at
        return self._errors(repeated, ids, weights).view(count, top_k)

    def removal_errors(self) -> torch.Tensor:
        """Estimated e(S without e) of every expert, float64 [E] (infinite for dropped ones)."""
        if not len(self.without_RK):
            self.looked_at_RE = torch.empty(self.slot_RE.shape, dtype=torch.bool)
            self.without_RK = self._rank_rows(torch.arange(len(self.slot_RE)))
        change_RK = (self.without_RK - self.errors_R[:, None]).double()
        change_RK = change_RK * self.damage.token_weight_R[:, None]
        experts = self.damage.num_experts
        change_E = torch.bincount(self.ids_RK.flatten(), change_RK.flatten(), minlength=experts)
        sample_E = (self._total(self.errors_R) + change_E) / self.base
        dropped = (~self.kept_E).double()
        forms = [
            dropped @ gram @ dropped + 2 * (gram @ dropped) + gram.diagonal()
            for gram in (self.gram_all, self.gram_sample)
        ]
        seen_E = forms[1] > 1e-12
        ratio_E = torch.where(seen_E, forms[0] / forms[1].clamp_min(1e-12), 1.0)
        # not in the sample at all: what it did over all tokens
        error_E = torch.where(seen_E, sample_E * ratio_E, sample_E + forms[0])
        return error_E.masked_fill(~self.kept_E, float("inf"))

    def remove(self, expert: int) -> None:
        """Drop an expert; only rows that it concerns are looked at anew."""
        self.kept_E[expert] = False
        ids, weights = self.law.route(self.damage.logits_RE, self.damage.bias_E, self.kept_E)
        changed_R = (ids.sort(1).values != self.ids_RK.sort(1).values).any(1)
        if len(self.without_RK):  # also where it was next in line
            changed_R |= self.looked_at_RE[:, expert]
        if not self.law.normalises and self.law.score == "softmax":  # every weight has changed
            changed_R[:] = True
        rows = changed_R.nonzero().flatten()
        self.ids_RK[rows] = ids[rows]
        self.errors_R[rows] = self._errors(rows, ids[rows], weights[rows])
        if len(self.without_RK):
            self.without_RK[rows] = self._rank_rows(rows)


def least_damaging(
    damage: LayerDamage, keep: int, quota_groups: int, sums: ExpertSums
) -> tuple[tuple[int, ...], float]:
    """The experts to keep, ascending, and the error they leave.

    `quota_groups` consecutive equal slices keep the same number each; 1 is a free choice, after
    which the router has no groups either. `sums` are the layer's over all tokens.
    """
    state = KeptSet(damage, pruned_law(damage, quota_groups))
    experts = damage.num_experts
    group_E = torch.arange(experts) // (experts // quota_groups)
    quota = keep // quota_groups
    rank_E = torch.empty(experts, dtype=torch.float64)
    rank_E[sums.weighted_norm_sum.argsort(stable=True)] = torch.arange(experts, dtype=torch.float64)
    while int(state.kept_E.sum()) > keep:
        full_E = torch.bincount(group_E[state.kept_E], minlength=quota_groups)[group_E] > quota
        error_E = state.removal_errors().masked_fill(~full_E, float("inf"))
        equal = error_E <= error_E.min() + 1e-12
        state.remove(int(rank_E.masked_fill(~equal, float("inf")).argmin()))
    _swap(state, group_E)
    return tuple(state.kept_E.nonzero().flatten().tolist()), state.error()


def pruned_law(damage: LayerDamage, quota_groups: int) -> RoutingLaw:
    """The layer's routing once pruned: its own, without groups where those are given up."""
    return damage.law if quota_groups == damage.law.num_groups else damage.law.flattened()


def _swap(state: KeptSet, group_E: torch.Tensor) -> None:
    for _ in range(SWAP_ROUNDS):
        improved = False
        for added in (~state.kept_E).nonzero().flatten().tolist():
            before, error = state.kept_E.clone(), state.error()
            with_added = before.clone()
            with_added[added] = True
            state.set(with_added)
            if state.error() < error * (1 - LEAST_GAIN):  # else no removal can win it back
                errors_E = state.removal_errors()
                errors_E[(group_E != group_E[added]) | (torch.arange(len(group_E)) == added)] = (
                    float("inf")
                )
                with_added[int(errors_E.argmin())] = False
                state.set(with_added)
                if state.error() < error * (1 - LEAST_GAIN):
                    improved = True
                    continue
            state.set(before)
        if not improved:
            return


def kept_error(damage: LayerDamage, kept: tuple[int, ...], quota_groups: int) -> float:
    """e(S) of any set of experts; `quota_groups` as above."""
    state = KeptSet(damage, pruned_law(damage, quota_groups))
    kept_E = torch.zeros(damage.num_experts, dtype=torch.bool)
    kept_E[list(kept)] = True
    state.set(kept_E)
    return state.error()
