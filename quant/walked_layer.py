"""One layer of a walk: run, rounded by what its matrices were fed, and run again rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from calibration.batches import Batch
from calibration.stream import LayerWalk
from models.experts import RoutedBatch
from models.memory import free_bytes, release_freed_memory
from models.skeleton import Skeleton
from quant.expert_linears import ExpertLinears
from quant.expert_sums import ExpertSums
from quant.inputs import ExpertInputs, LinearInputs, RoutedInputs, watched
from quant.layer import LayerRounder
from quant.layer_rounding import LayerRounding
from quant.linears import Linear
from quant.shared_experts import SharedExpertInputs, SharedExpertSums, SharedRoutedInputs
from quant.sharing import InputExchange, expert_owners, linear_owners, round_layer

Sets = Sequence[Mapping[int, ExpertLinears]]
SUMMED_ON = ("cuda",)  # where experts' Hessians are summed while a layer runs


def walk_layer(
    rounder: LayerRounder,
    walk: LayerWalk,
    layer: int,
    linears: Sequence[Linear],
    *,
    compressed: bool,
) -> LayerRounding:
    """Round `linears`, the matrices of `layer`. The carries entering layer + 1 are left behind,
    as the rounded layer gives them if `compressed`."""
    skeleton, processes = walk.skeleton, walk.processes
    sets = rounder.expert_sets(linears)
    current: list[Batch] = []
    inputs = LinearInputs(bool(rounder.damping), walk.num_tokens)
    exchange = exchange_of(rounder, walk, layer, linears, inputs) if processes.size > 1 else None
    after_round = None if exchange is None else exchange.send
    watching: list[ExpertInputs] = []

    def keep(record: RoutedBatch) -> None:
        if exchange is None:
            watching[0].add(record, current[0])
        else:
            exchange.add_routed(record, current[0])

    skeleton.load_layer(layer, keep if sets else None)
    skeleton.prefetch_layer(layer + 1)
    again = partial(walk.pass_through, layer, current, keep_output=False, after_round=after_round)
    if exchange is None:
        watching.append(expert_inputs(rounder, walk, layer, sets, again))
    elif sets:
        exchange.routed = shared_expert_inputs(rounder, walk, layer, sets, again)
        watching.append(exchange.routed)
    modules = loaded_modules(rounder, skeleton, layer, linears)
    loaded = skeleton.experts.get(layer)
    if loaded is not None:  # what the intact experts give is run only for who is fed by it
        loaded.inputs_only = compressed and not skeleton.spec.architecture.moe.feeds_linears
    with watched(modules, inputs if exchange is None else exchange, current):
        walk.pass_through(layer, current, keep_output=not compressed, after_round=after_round)
    if exchange is not None:
        exchange.finish()
    release_freed_memory()  # running a layer and rounding it want memory in other pieces
    routed = watching[0] if watching else None
    result = round_layer(rounder, linears, processes, inputs, routed, loaded, exchange)
    if compressed:
        put_in_place(rounder, modules, result)  # experts are in place
        if loaded is not None:
            loaded.observe, loaded.inputs_only = None, False
        walk.pass_through(layer, current, keep_output=True, last_pass=True)
    skeleton.unload_layer(layer)
    walk.hidden_states.forget_from_ram(layer)
    return result


def loaded_modules(
    rounder: LayerRounder, skeleton: Skeleton, layer: int, linears: Sequence[Linear]
) -> dict[str, nn.Linear]:
    """Module path -> the loaded layer's module, of matrices outside the experts with a scheme."""
    return {
        linear.module: module
        for linear in linears
        if not linear.is_expert
        and rounder.schemes[linear.module] is not None
        and (module := skeleton.linear_of(layer, linear.logical)) is not None
    }


def put_in_place(
    rounder: LayerRounder, modules: Mapping[str, nn.Linear], result: LayerRounding
) -> None:
    """Decoded rounded weights instead of the modules' own, in their type."""
    for name, module in modules.items():
        module.weight.data = rounder.decoded(name, result).to(module.weight)


def expert_inputs(
    rounder: LayerRounder, walk: LayerWalk, layer: int, sets: Sets, again: Callable[[], None]
) -> ExpertInputs:
    """What watches the layer's experts: sums on a GPU, the inputs themselves elsewhere."""
    num_experts = walk.skeleton.spec.num_experts_of(layer)
    if rounder.device.type not in SUMMED_ON:
        return RoutedInputs(num_experts)
    return ExpertSums(
        [list(one) for one in sets],
        num_experts,
        with_hessian=rounder.experts_solved(sets),
        num_tokens=walk.num_tokens,
        room=free_bytes(rounder.device) // 2,  # the other half is for running the layer
        again=again,
    )


def shared_expert_inputs(
    rounder: LayerRounder, walk: LayerWalk, layer: int, sets: Sets, again: Callable[[], None]
) -> SharedExpertInputs:
    """The same for the experts that this one of several processes rounds."""
    processes, num_experts = walk.processes, walk.skeleton.spec.num_experts_of(layer)
    if rounder.device.type not in SUMMED_ON:
        return SharedRoutedInputs(num_experts, processes, rounder.device)
    return SharedExpertSums(
        [list(one) for one in sets[processes.rank :: processes.size]],
        num_experts,
        processes,
        rounder.device,
        with_hessian=rounder.experts_solved(sets),
        num_tokens=walk.num_tokens,
        room=free_bytes(rounder.device) // 2,
        again=again,
    )


def exchange_of(
    rounder: LayerRounder,
    walk: LayerWalk,
    layer: int,
    linears: Sequence[Linear],
    inputs: LinearInputs,
) -> InputExchange:
    """What brings the layer's inputs to their owners; experts' are to be set when it is loaded."""
    sets, num_experts = rounder.expert_sets(linears), walk.skeleton.spec.num_experts_of(layer)
    return InputExchange(
        processes=walk.processes,
        device=walk.skeleton.device,
        owner=linear_owners(linears, walk.processes),
        owner_E=expert_owners(sets, num_experts, walk.processes),
        inputs=inputs,
        pool=rounder.experts_solved(sets) and rounder.device.type not in SUMMED_ON,
    )
