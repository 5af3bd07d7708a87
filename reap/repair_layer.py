"""The repair of one layer: what its kept experts did is corrected, stored, and run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from calibration.batches import Batch
from calibration.stream import LayerWalk
from models.errors import InputError
from models.experts import RoutedBatch
from models.journal import Journal, write_atomically
from models.layer_slot import Carry
from models.opening import OpenModel
from reap.repair_descent import Aim, FedTokens, Matrices, descend, outputs_of_all
from reap.repair_fit import (
    HELD_OUT,
    LayerTokens,
    RepairKind,
    RoutedInputs,
    correct,
    fit,
    weighted_square,
)
from reap.stored_experts import StoredMatrices, up_roles


def repaired_file(folder: Path, layer: int) -> Path:
    """The corrected tensors of one layer, under the output's names, while the job runs."""
    return folder / f"repaired_{layer:05d}.safetensors"


class LayerRepair:
    """One layer: what its kept experts did, corrected, rounded as stored, and run again."""

    def __init__(
        self,
        pruned: OpenModel,
        kinds: Sequence[RepairKind],
        whole: LayerWalk,
        cut: LayerWalk,
        layer: int,
    ) -> None:
        self.pruned, self.kinds, self.layer = pruned, kinds, layer
        self.whole, self.cut = whole, cut
        self.experts = cut.skeleton.experts[layer]
        self.routed: list[list[RoutedInputs]] = [[] for _ in range(self.experts.num_experts)]
        self.lacking: list[torch.Tensor] = []
        self.weight: list[torch.Tensor] = []
        self.held_out: list[torch.Tensor] = []
        self.fed: list[FedTokens] = []
        self.number = self.seen = 0

    @torch.inference_mode()
    def run(self, journal: Journal) -> dict[str, Any]:
        """Correct the layer, write its file, leave what enters the next one; the facts."""
        cut, layer, skeleton = self.cut, self.layer, self.cut.skeleton
        current: list[Batch] = []
        skeleton.load_layer(layer, lambda record: self._routed(record, current[0]))
        cut.pass_through(layer, current, keep_output=False, left=self._left)
        tokens = LayerTokens(
            [join(own) for own in self.routed],
            torch.cat(self.lacking),
            torch.cat(self.weight),
            torch.cat(self.held_out),
        )
        self.routed, self.lacking = [], []
        down = StoredMatrices(self.pruned, skeleton, layer, "down")
        old_EDF = down.read()
        correction = correct(tokens, old_EDF, self.kinds)
        new_EDF = correction.down_EDF
        more: dict[str, Any] = {}
        files: dict[str, torch.Tensor] = {}
        changed_E = torch.zeros(len(old_EDF), dtype=torch.bool)
        without_tokens = sum(not len(own.token_N) for own in tokens.experts)
        if "up" in self.kinds:
            fitting = tokens.only(~tokens.held_out_T)
            unseen_EDF, _ = fit(fitting, old_EDF, self.kinds, correction.ridge)
            # at the size of DeepSeek-V3.2 what is not needed any more has to go before the descent
            del fitting
            tokens = replace(tokens, experts=())
            new_EDF, more, files, changed_E = self._descend(tokens, old_EDF, new_EDF, unseen_EDF)
        changed_down = (new_EDF != old_EDF).flatten(1).any(1).tolist()
        found, rounded = down.stored(new_EDF, changed_down)
        write_atomically(repaired_file(journal.folder, layer), save_tensors(files | found))
        self._put(rounded, up=False)
        self.experts.observe = None
        cut.pass_through(layer, current, keep_output=True, last_pass=True)
        skeleton.unload_layer(layer)
        return {
            "experts": int((changed_E | torch.tensor(changed_down)).sum()),
            "without_tokens": without_tokens,
            "ridge": correction.ridge,
            "error_left": correction.lacking,
            **more,
        }

    def _descend(
        self,
        tokens: LayerTokens,
        old_EDF: torch.Tensor,
        fitted_EDF: torch.Tensor,
        unseen_EDF: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
        """(new down projections, facts, stored tensors of gate and up, whose experts they are).

        `fitted_EDF` are the corrected down projections, `unseen_EDF` those of the fit without the
        held-out tokens.
        """
        pruned, skeleton = self.pruned, self.cut.skeleton
        stored = [
            StoredMatrices(pruned, skeleton, self.layer, role)
            for role in up_roles(pruned.spec, skeleton.names, self.layer)
        ]
        parts = [matrices.read() for matrices in stored]
        widths = [part.shape[1] for part in parts]
        old_EGD, activate = torch.cat(parts, 1), self.experts.activate
        del parts
        fed = FedTokens(
            torch.cat([part.inputs_TD for part in self.fed]),
            torch.cat([part.expert_TK for part in self.fed]),
            torch.cat([part.weight_TK for part in self.fed]),
        )
        self.fed = []
        before = outputs_of_all(fed, Matrices(list(old_EGD), list(old_EDF)), activate)
        aim = Aim(tokens.lacking_TD + before, tokens.weight_T, tokens.held_out_T)
        start = Matrices(list(old_EGD), list(fitted_EDF))
        unseen = Matrices(list(old_EGD), list(unseen_EDF))
        with_down = "down" in self.kinds
        descent = descend(fed, aim, start, unseen, activate, with_down=with_down)
        lacking_TD = aim.wanted_TD - outputs_of_all(fed, descent.matrices, activate)
        left = weighted_square(tokens.weight_T, lacking_TD)
        whole = weighted_square(tokens.weight_T, tokens.lacking_TD)
        new_EGD = torch.stack(list(descent.matrices.up))
        changed_E = (new_EGD != old_EGD).flatten(1).any(1).cpu()
        files: dict[str, torch.Tensor] = {}
        decoded: list[dict[int, torch.Tensor]] = []
        for matrices, new in zip(stored, new_EGD.split(widths, 1), strict=True):
            own_files, own = matrices.stored(new, changed_E.tolist())
            files |= own_files
            decoded.append(own)
        joined = {
            expert: torch.cat([own[expert] for own in decoded])
            for expert in changed_E.nonzero().flatten().tolist()
        }
        self._put(joined, up=True)
        facts = {"descended": descent.helped, "error_left": left / whole if whole else 1.0}
        return torch.stack(list(descent.matrices.down)), facts, files, changed_E

    def _put(self, rounded: dict[int, torch.Tensor], *, up: bool) -> None:
        """Put what was stored into the loaded layer."""
        weights = self.experts.weights
        assert weights is not None
        place = weights.up if up else weights.down
        for expert, value in rounded.items():
            place[expert].copy_(value.T if weights.transposed else value)

    def _routed(self, record: RoutedBatch, batch: Batch) -> None:
        """Each expert's tokens and what its down projection was fed, times the router's weight."""
        real_T = batch.real_on(record.token_P.device)
        place_T = real_T.cumsum(0) - 1 + self.seen
        assert record.inputs_PD is not None  # weighted inputs were refused
        activated_PF = self.experts.activated(record.inputs_PD, record.expert_P, record.offsets_E)
        activated_PF = activated_PF * record.router_weights_P.to(activated_PF.dtype)[:, None]
        real_P = real_T[record.token_P]
        if "up" in self.kinds:
            order_TK = torch.argsort(record.token_P, stable=True).view(len(real_T), -1)[real_T]
            self.fed.append(
                FedTokens(
                    record.inputs_TD[real_T],
                    record.expert_P[order_TK],
                    record.router_weights_P[order_TK].float(),
                )
            )
        start = 0
        for expert, end in enumerate(record.offsets_E.tolist()):
            real_N, tokens_N = real_P[start:end], record.token_P[start:end]
            self.routed[expert].append(
                RoutedInputs(place_T[tokens_N[real_N]], activated_PF[start:end][real_N])
            )
            start = end
        self.seen += int(real_T.sum())

    def _left(self, batch: Batch, carry: Carry) -> None:
        """What the layer's output lacks."""
        hidden = carry["hidden_states"]
        if hidden.ndim != 3:
            raise InputError(
                f"layer {self.layer} hands on several streams of hidden states, to which no repair "
                "is known; prune without --repair"
            )
        wanted = self.whole.hidden_states.take(self.layer + 1, self.number, keep=True)
        self.number += 1
        real_T = batch.real_on(hidden.device)
        wanted_TD = wanted["hidden_states"].to(hidden.device).flatten(0, 1)[real_T].float()
        self.lacking.append(wanted_TD - hidden.flatten(0, 1)[real_T].float())
        self.weight.append(wanted_TD.square().sum(1).clamp_min(1e-30).reciprocal())
        width = hidden.shape[1]
        held = [sample % HELD_OUT == HELD_OUT - 1 for sample in batch.samples]
        held_T = torch.tensor(held, device=hidden.device).repeat_interleave(width)
        self.held_out.append(held_T[real_T])


def join(parts: Sequence[RoutedInputs]) -> RoutedInputs:
    """An expert's tokens of all batches, in float32."""
    return RoutedInputs(
        torch.cat([part.token_N for part in parts]),
        torch.cat([part.inputs_NF for part in parts]).float(),
    )
