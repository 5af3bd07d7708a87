"""One layer rounded by several processes: who rounds what, and how its inputs get there.

Every process runs batches of its own, so what a matrix was fed lies in all of them. After each
round (one batch a process) the rows go to the process that rounds the matrix, and are handed there
to the same `LinearInputs` and `RoutedInputs` as in one process alone, in the order of the batches.
So a Hessian is the sum of the same products in the same order, and the codes are the same bytes,
however many processes there are. Only an owner keeps inputs or Hessians of its matrices.

    experts          in the sets that are rounded together, dealt out
    other Linears    by (parent module, width of the input): what shares an input or a global scale
                     stays together
    pooled Hessian   the last process, which has the fewest experts when they do not come out even

Refused: a Hessian in each process and their sum. It is simpler, but float32 sums in another order
move last bits and with them codes, it needs every Hessian in every process, and K x K sums are
more to send than rows when a batch is small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calibration.batches import PADDING, Batch
from models.experts import RoutedBatch
from models.processes import Parcel, Processes
from quant.inputs import LinearInputs, PooledHessian, RoutedInputs, pair_weights
from quant.layer import ExpertLinears, LayerRounder, LayerRounding
from quant.linears import Linear
from quant.schemes import Quantized

# What a parcel holds beside the inputs of Linears, which go by the modules' names.
ROWS, TOKENS, EXPERTS, WEIGHTS = "#rows", "#tokens", "#experts", "#weights"
POOLED, PAIRS = "#pooled", "#pairs"
TENSORS = ("codes", "scale", "zero_point", "global_scale")


def linear_owners(linears: Sequence[Linear], processes: Processes) -> dict[str, int]:
    """Which process rounds each matrix outside the experts."""
    groups: dict[tuple[str, int], list[str]] = {}
    for linear in linears:
        if not linear.is_expert:
            group = (linear.module.rpartition(".")[0], linear.shape[1])
            groups.setdefault(group, []).append(linear.module)
    # from the last process down: sets of experts are dealt out from the first one up
    return {
        module: processes.size - 1 - number % processes.size
        for number, modules in enumerate(groups.values())
        for module in modules
    }


def expert_owners(
    sets: Sequence[Mapping[int, ExpertLinears]], num_experts: int, processes: Processes
) -> torch.Tensor:
    """Which process rounds each expert, int64 [E]; -1 for one that is not rounded."""
    owner_E = torch.full((num_experts,), -1)
    for number, experts in enumerate(sets):
        owner_E[list(experts)] = number % processes.size
    return owner_E


class SharedRoutedInputs(RoutedInputs):
    """Inputs of the experts that this process rounds; counts and pooled Hessian are of all."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.all_rows = PooledHessian()

    def add_received(self, parcel: Parcel, device: torch.device) -> None:
        """One batch's rows, wherever it was run."""
        rows_ND = parcel[ROWS]
        record = RoutedBatch(
            layer=-1,
            offsets_E=torch.bincount(parcel[EXPERTS], minlength=self.num_experts).cumsum(0),
            expert_P=parcel[EXPERTS],
            token_P=parcel[TOKENS],
            router_weights_P=parcel.get(WEIGHTS, rows_ND.new_empty(0)),
            inputs_TD=rows_ND,
            outputs_PD=rows_ND.new_empty(0),
            weights_applied_to_input=WEIGHTS in parcel,
        )
        self.add(record, without_padding(len(rows_ND)))
        if POOLED in parcel:
            self.all_rows.add(rows_ND.to(device), parcel[POOLED], int(parcel[PAIRS]))

    def gather(self, processes: Processes, device: torch.device, *, pool: bool) -> None:
        """After the last batch: what every process must know of all experts."""
        self.count_E = torch.stack(processes.gather(self.count_E)).sum(0)
        if pool:
            own = {POOLED: self.all_rows.mean()} if self.all_rows.pairs else {}
            (self.mean,) = (
                parcel[POOLED] for parcel in processes.share(own, device) if POOLED in parcel
            )

    def pooled(self, device: torch.device) -> torch.Tensor:
        """As in one process: of all routed tokens of the layer."""
        return self.mean


@dataclass(slots=True)
class InputExchange:
    """Takes what this process's batch fed to a layer's matrices and brings it to their owners.

    `inputs` and `routed` are filled with what this process rounds; `routed` is None where the
    layer has no experts to round. `pool`: experts lean on the layer's pooled Hessian.
    """

    processes: Processes
    device: torch.device
    owner: Mapping[str, int]  # of Linears
    owner_E: torch.Tensor
    inputs: LinearInputs
    routed: SharedRoutedInputs | None
    pool: bool
    last: torch.Tensor | None = None
    entered: list[tuple[list[str], torch.Tensor]] = field(default_factory=list)
    parcels: list[dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.parcels = [{} for _ in range(self.processes.size)]

    def add(self, name: str, x: torch.Tensor, batch: Batch) -> None:
        """One batch's input [..., K] of a Linear; as `LinearInputs.add`."""
        if x is self.last:
            self.entered[-1][0].append(name)
            return
        self.last = x
        real_T = (batch.domain_T != PADDING).to(x.device)
        self.entered.append(([name], x.reshape(len(real_T), -1)[real_T]))

    def add_routed(self, record: RoutedBatch, batch: Batch) -> None:
        """What one batch's experts got; as `RoutedInputs.add`."""
        device = record.token_P.device
        real_P = (batch.domain_T != PADDING).to(device)[record.token_P]
        token_P, expert_P = record.token_P[real_P], record.expert_P[real_P]
        weight_P = record.router_weights_P[real_P] if record.weights_applied_to_input else None
        owner_P = self.owner_E.to(device)[expert_P]
        num_tokens = len(record.inputs_TD)
        for rank, parcel in enumerate(self.parcels):
            own_P = owner_P == rank
            rows_N = token_P[own_P].unique()
            if self.pool and rank == self.processes.size - 1:
                rows_N = torch.arange(num_tokens, device=device)
                parcel[POOLED] = pair_weights(token_P, weight_P, num_tokens)
                parcel[PAIRS] = torch.tensor(len(token_P))
            place_T = torch.empty(num_tokens, dtype=torch.int64, device=device)
            place_T[rows_N] = torch.arange(len(rows_N), device=device)
            parcel[ROWS] = record.inputs_TD[rows_N]
            parcel[TOKENS] = place_T[token_P[own_P]]
            parcel[EXPERTS] = expert_P[own_P]
            if weight_P is not None:
                parcel[WEIGHTS] = weight_P[own_P]

    def send(self) -> None:
        """Exchange a round's inputs. Every process calls it equally often."""
        for names, rows in self.entered:
            for rank, parcel in enumerate(self.parcels):
                if own := [name for name in names if self.owner[name] == rank]:
                    parcel[" ".join(own)] = rows
        received = self.processes.exchange(self.parcels, self.device)
        self.entered, self.last = [], None
        self.parcels = [{} for _ in range(self.processes.size)]
        for batch in received:
            for key, rows in batch.items():
                if not key.startswith("#"):
                    for name in key.split():
                        self.inputs.add(name, rows, without_padding(len(rows)))
            if ROWS in batch:
                assert self.routed is not None
                self.routed.add_received(batch, self.device)

    def finish(self) -> None:
        """All rounds are over."""
        if self.routed is not None:
            self.routed.gather(self.processes, self.device, pool=self.pool)


def round_layer(
    rounder: LayerRounder,
    linears: Sequence[Linear],
    inputs: LinearInputs | None,
    routed: RoutedInputs | None,
    activate: Callable[[torch.Tensor], torch.Tensor] | None,
    processes: Processes,
) -> LayerRounding:
    """All matrices of a layer, each rounded by its owner; `inputs` and `routed` are this
    process's, None where nothing was run."""
    own = LayerRounding()
    owner = linear_owners(linears, processes)
    rounder.round_linears(
        [one for one in linears if owner.get(one.module) == processes.rank], inputs, own
    )
    sets = rounder.expert_sets(linears)
    rounder.round_experts(sets[processes.rank :: processes.size], routed, activate, own)
    result = own if processes.size == 1 else gathered(own, processes, rounder.device)
    rounder.count_experts(sets, routed, result)
    return result


def without_padding(num_rows: int) -> Batch:
    """Stands for a batch of which only tokens' rows are left."""
    return Batch(
        samples=(),
        lengths=(num_rows,),
        input_ids=torch.empty((1, 0), dtype=torch.int64),
        attention_mask=None,
        domain_T=torch.zeros(num_rows, dtype=torch.uint8),
    )


def gathered(own: LayerRounding, processes: Processes, device: torch.device) -> LayerRounding:
    """What all processes rounded of a layer, in all of them."""
    parcel = {
        f"{part} {module}": tensor
        for module, quantized in own.quantized.items()
        for part in TENSORS
        if (tensor := getattr(quantized, part)) is not None
    }
    whole = LayerRounding()
    for shared in processes.share(parcel, device):
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in shared.items():
            part, module = name.split(" ", 1)
            parts.setdefault(module, {})[part] = tensor
        whole.quantized |= {module: Quantized(**found) for module, found in parts.items()}
    for other in processes.gather((own.largest_input, own.errors, own.fell_back)):
        largest_input, errors, fell_back = other
        whole.largest_input |= largest_input
        whole.errors |= errors
        whole.fell_back += fell_back
    return whole
