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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calibration.batches import Batch
from models.experts import RoutedBatch, RoutedExperts
from models.processes import Parcel, Processes
from quant.expert_linears import ExpertLinears
from quant.inputs import ExpertInputs, LinearInputs, pair_weights
from quant.layer import LayerRounder
from quant.layer_rounding import LayerRounding
from quant.linears import Linear
from quant.schemes import Quantized
from quant.shared_experts import PAIRS, POOLED, SharedExpertInputs

# What a parcel holds beside inputs of Linears, which go by a number and the modules' names.
ROWS, TOKENS, EXPERTS, WEIGHTS = "#rows", "#tokens", "#experts", "#weights"
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
    """Which process rounds each expert, int64 [E]. One that stays as it is falls to the first: its
    inputs count in the pooled Hessian."""
    owner_E = torch.zeros(num_experts, dtype=torch.int64)
    for number, experts in enumerate(sets):
        owner_E[list(experts)] = number % processes.size
    return owner_E


@dataclass(slots=True)
class InputExchange:
    """Takes what this process's batch fed to a layer's matrices and brings it to their owners.

    `inputs` and `routed` are filled with what this process rounds; `routed` is None where the
    layer has no experts to round. `pool`: the last process is to see every expert's rows.
    """

    processes: Processes
    device: torch.device
    owner: Mapping[str, int]  # of Linears
    owner_E: torch.Tensor
    inputs: LinearInputs
    pool: bool
    routed: SharedExpertInputs | None = None
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
        real_T = batch.real_on(x.device)
        self.entered.append(([name], x.reshape(len(real_T), -1)[real_T]))

    def add_routed(self, record: RoutedBatch, batch: Batch) -> None:
        """What one batch's experts got; as `RoutedInputs.add`."""
        device = record.token_P.device
        real_P = batch.real_on(device)[record.token_P]
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
        for number, (names, rows) in enumerate(self.entered):
            for rank, parcel in enumerate(self.parcels):
                if own := [name for name in names if self.owner[name] == rank]:
                    parcel[" ".join([str(number), *own])] = rows
        received = self.processes.exchange(self.parcels, self.device)
        self.entered, self.last = [], None
        self.parcels = [{} for _ in range(self.processes.size)]
        for batch in received:
            self._hand_on(batch)

    def _hand_on(self, parcel: Parcel) -> None:
        """One batch's rows to what takes them in one process alone."""
        for key, rows in parcel.items():
            if not key.startswith("#"):
                for name in key.split()[1:]:
                    self.inputs.add(name, rows, without_padding(len(rows)))
        if ROWS not in parcel:
            return
        assert self.routed is not None
        rows_TD = parcel[ROWS].clone()  # kept perhaps, and the whole message is not to be
        record = RoutedBatch(
            layer=-1,
            offsets_E=torch.bincount(parcel[EXPERTS], minlength=len(self.owner_E)).cumsum(0),
            expert_P=parcel[EXPERTS],
            token_P=parcel[TOKENS],
            router_weights_P=parcel.get(WEIGHTS, rows_TD.new_empty(0)),
            inputs_TD=rows_TD,
            outputs_PD=rows_TD.new_empty(0),
            weights_applied_to_input=WEIGHTS in parcel,
        )
        self.routed.add(record, without_padding(len(rows_TD)))
        if POOLED in parcel:
            self.routed.add_pooled(rows_TD, parcel)

    def finish(self) -> None:
        """The first pass is over."""
        if self.routed is not None:
            self.routed.finish()

    def catch_up(self) -> None:
        """This process's experts are rounded."""
        if self.routed is not None:
            self.routed.catch_up()


def round_layer(
    rounder: LayerRounder,
    linears: Sequence[Linear],
    processes: Processes,
    inputs: LinearInputs | None = None,
    routed: ExpertInputs | None = None,
    loaded: RoutedExperts | None = None,
    exchange: InputExchange | None = None,
) -> LayerRounding:
    """All matrices of a layer, each rounded by its owner; decoded experts replace those `loaded`.

    `inputs` and `routed` are of what this process rounds, None where nothing was run; `exchange`
    is what filled them, where several processes did.
    """
    result = LayerRounding()
    owner = linear_owners(linears, processes)
    rounder.round_linears(
        [one for one in linears if owner.get(one.module) == processes.rank], inputs, result
    )
    sets = rounder.expert_sets(linears)
    rounder.round_experts(sets[processes.rank :: processes.size], routed, loaded, result)
    if exchange is not None:
        exchange.catch_up()
    if processes.size > 1:
        result = gathered(result, processes, rounder.device)
        if loaded is not None:
            others = [one for n, one in enumerate(sets) if n % processes.size != processes.rank]
            rounder.put_in_place(others, loaded, result)
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
