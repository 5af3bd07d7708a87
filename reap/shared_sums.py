"""The sums of a layer whose batches were run by several processes.

Each process keeps the sums of each of its batches, and the first one adds them up in the order of
the batches: the very additions, in the order, of one process alone, and so the same bits however
many processes there were. Adding up one total a process was refused: it would move last bits with
their number, and a job resumed with more processes would not end with the same bytes.
"""

from __future__ import annotations

import torch

from models.processes import Processes
from reap.sums import FIELDS, ExpertSums, LayerStats


class SharedSums:
    """The sums of one layer over all batches, of which each process sees some."""

    def __init__(
        self,
        processes: Processes,
        num_experts: int,
        domains: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.processes, self.num_experts, self.domains = processes, num_experts, domains
        self.device = device
        self.parts: list[LayerStats] = []

    def next(self) -> LayerStats:
        """Where this process's next batch is to be added."""
        if self.processes.size > 1 or not self.parts:
            self.parts.append(LayerStats.empty(self.num_experts, self.domains, self.device))
        return self.parts[-1]

    def total(self) -> LayerStats:
        """The sums over the batches of all processes, in all of them."""
        own = [
            torch.stack([values_ME for _, values_ME in part.sums.named()]).cpu()
            for part in self.parts
        ]
        total = LayerStats.empty(self.num_experts, self.domains)
        for values_SME in self.processes.gather_dealt(own):
            sums = ExpertSums(**dict(zip(FIELDS, values_SME, strict=True)))
            total = total + LayerStats(domains=self.domains, sums=sums)
        return total
