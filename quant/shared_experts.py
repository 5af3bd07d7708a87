"""Inputs of the experts that one of several processes rounds (quant/sharing.py).

The rows come from all processes, the work on them is that of one: `RoutedInputs` on a CPU,
`ExpertSums` on a GPU. What concerns all experts of a layer, counts and the pooled Hessian, is
brought together when a pass is over. On a CPU the last process sums the pooled Hessian over all
rows, as one process alone would; on a GPU it is the sum of the processes' own, set by set, equal
to that of one process where each has room for all its sets and else up to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from calibration.batches import Batch
from models.experts import RoutedBatch
from models.processes import Parcel, Processes
from quant.expert_sums import ExpertSums
from quant.inputs import ExpertInputs, Fed, PooledHessian, RoutedInputs

POOLED, PAIRS = "#pooled", "#pairs"  # tensors of a parcel: token weights, and how many pairs


class SharedExpertInputs(ExpertInputs, Protocol):
    """Expert inputs that come from several processes. All call `finish` and `catch_up`."""

    def add_pooled(self, rows_TD: torch.Tensor, parcel: Parcel) -> None:
        """All rows of a batch, for the pooled Hessian; `parcel` has POOLED and PAIRS."""

    def finish(self) -> None:
        """The first pass is over."""

    def catch_up(self) -> None:
        """The own experts are rounded; those of others may still need another pass."""


class SharedRoutedInputs(RoutedInputs):
    """`RoutedInputs` of the own experts; counts and pooled Hessian of all."""

    def __init__(self, num_experts: int, processes: Processes, device: torch.device) -> None:
        super().__init__(num_experts)
        self.processes, self.device = processes, device
        self.all_rows = PooledHessian()

    def add_pooled(self, rows_TD: torch.Tensor, parcel: Parcel) -> None:
        """See `SharedExpertInputs`."""
        self.all_rows.add(rows_TD.to(self.device), parcel[POOLED], int(parcel[PAIRS]))

    def finish(self) -> None:
        """See `SharedExpertInputs`."""
        self.count_E = torch.stack(self.processes.gather(self.count_E)).sum(0)
        own = {POOLED: self.all_rows.mean()} if self.all_rows.pairs else {}
        for parcel in self.processes.share(own, self.device):
            self.mean = parcel.get(POOLED, self.mean)

    def catch_up(self) -> None:
        """See `SharedExpertInputs`: everything is kept, no pass is needed."""


class SharedExpertSums(ExpertSums):
    """`ExpertSums` of the own experts; counts and pooled Hessian of all.

    Before each set all processes say whether one of them lacks room and needs another pass.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        num_experts: int,
        processes: Processes,
        device: torch.device,
        *,
        with_hessian: bool,
        num_tokens: int,
        room: int,
        again: Callable[[], None],
    ) -> None:
        super().__init__(
            sets,
            num_experts,
            with_hessian=with_hessian,
            num_tokens=num_tokens,
            room=room,
            again=again,
        )
        self.processes, self.device = processes, device
        self.all_counts = torch.zeros(num_experts, dtype=torch.int64)
        self.listening = bool(sets)

    @property
    def count_E(self) -> torch.Tensor:
        """Tokens of each expert, its owner's or not, int64 [E] on the CPU."""
        return self.all_counts

    def add(self, record: RoutedBatch, batch: Batch) -> None:
        """As `ExpertSums.add`; nothing in a pass for others."""
        if self.listening:
            super().add(record, batch)

    def add_pooled(self, rows_TD: torch.Tensor, parcel: Parcel) -> None:
        """See `SharedExpertInputs`: the pooled Hessian is the sum of the experts'."""

    def finish(self) -> None:
        """See `SharedExpertInputs`."""
        self.first_pass = False
        self.all_counts = torch.stack(self.processes.gather(super().count_E)).sum(0)
        if self.with_hessian:
            self.pooled = self._summed_by_all().div_(max(1, int(self.all_counts.sum())))

    def _summed_by_all(self) -> torch.Tensor:
        """`summed` over all processes: set by set in the order of one process alone."""
        parts = [{POOLED: total.sum(0)} for total in self.sums.values()]
        parts += [{}] * (max(self.processes.gather(len(parts))) - len(parts))
        parts.append({} if self.rest is None else {POOLED: self.rest[0]})
        self.rest = None
        whole: torch.Tensor | None = None
        for own in parts:
            for parcel in self.processes.share(own, self.device):
                if POOLED in parcel:
                    whole = parcel[POOLED] if whole is None else whole.add_(parcel[POOLED])
        assert whole is not None
        return whole

    def up(self, experts: Sequence[int], device: torch.device, *, solved: bool) -> Fed:
        """As `ExpertSums.up`, in step with the other processes."""
        number = self.index[tuple(experts)]
        self._in_step(number if solved and number not in self.sums else None)
        return super().up(experts, device, solved=solved)

    def catch_up(self) -> None:
        """See `SharedExpertInputs`."""
        while not self._in_step(None, ready=True):
            pass

    def _in_step(self, lacking: int | None, *, ready: bool = False) -> bool:
        """Run the layer again if any process lacks the sums of a set; True when all are ready."""
        said = self.processes.gather((lacking is not None, ready))
        if any(lacks for lacks, _ in said):
            if lacking is not None:
                assert self.pooled is not None
                self.sums.clear()
                self._make_room(lacking, len(self.pooled), self.device)
            self.listening = lacking is not None
            self.again()
            self.listening = True
        return all(is_ready for _, is_ready in said)
