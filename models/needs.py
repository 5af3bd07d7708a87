"""What the jobs need before they start: device and host memory, disk and time.

Projections, not promises: amounts of work from the model's numbers, divided by a machine's measured
rates (models/machines.py). With D hidden, F intermediate, E experts, T tokens, for each layer

    forward    T (2 active parameters + 2 S heads (d_qk + d_v)) / forward_flops
    inputs     the same without routed experts, and min(T, T_kept) through their gates and ups
    Hessians   2 (top_k (T D^2 + T_kept F^2) + sum over other inputs of R K^2) / hessian_flops
    solving    sum over matrices of K^3 / factor_cubed + N K (round + sweeps * sweep)

with S tokens a sample, R = min(T, `hessian_rows`) and T_kept the tokens whose inputs are kept for
down's Hessians. Reading runs ahead of computing and writing behind it, so a layer takes the longer
of both and computing. `compress` scores and rounds in one walk: one forward of the intact model,
one of the cut one for its matrices' inputs and one of the rounded one. What makes a job resumable
takes a tenth more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.inventory import Inventory, Weight
from models.machines import Machine
from models.serving import GIB
from models.sizes import Storage, bytes_in, largest_layer

SAMPLE = 2048
CALIBRATION_TOKENS = 1360 * SAMPLE  # the code-tools-swe mix
SWEEPS = 1  # of refinement on a GPU
SNAPSHOT_SHARE = 0.1  # of a job's time, at most, for what makes it resumable
SNAPSHOTS = 1 + SNAPSHOT_SHARE
SLACK = 1.1  # memory that an allocator holds beyond what is in use
CONTEXT = 0.6e9  # bytes of a CUDA context
PLAIN = Storage("bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One job's needs; `host` beyond --memory goes to `spill` bytes of disk instead."""

    device: int
    host: int
    disk: int
    spill: int
    seconds: float


def needs(
    inventory: Inventory,
    form: Storage,
    after: Inventory,
    goal: Storage,
    machine: Machine,
    tokens: int = CALIBRATION_TOKENS,
) -> Mapping[str, Need]:
    """Needs of score, prune, quantize and compress: from a model in `form` to `after` in `goal`."""
    source, pruned = bytes_in(inventory, form, mtp=True), bytes_in(after, form)
    written = bytes_in(after, goal)
    hidden = tokens * inventory.spec.hidden_size * 2
    layers = inventory.spec.num_layers
    host = machine.process_bytes + machine.ring_bytes + largest_layer(after, goal)
    scoring = forward_seconds(inventory, tokens, machine) + source / machine.upload_bytes
    rounding = (
        forward_seconds(after, tokens, machine)
        + input_seconds(after, tokens, machine)
        + hessian_seconds(after, tokens, machine)
        + solve_seconds(after, machine)
        + pruned / machine.upload_bytes
    )
    fixed = layers * machine.layer_seconds
    writing = written / machine.write_bytes
    score_device = device_bytes(inventory, machine)
    quantize_device = device_bytes(after, machine, tokens)
    return {
        "score": Need(
            device=score_device,
            host=round(machine.process_bytes + machine.ring_bytes + hidden),
            disk=0,
            spill=hidden,
            seconds=SNAPSHOTS * max(source / machine.read_bytes, scoring),
        ),
        "prune": Need(
            device=0,
            host=GIB,
            disk=pruned,
            spill=0,
            seconds=pruned / machine.read_bytes + pruned / machine.write_bytes,
        ),
        "quantize": Need(
            device=quantize_device,
            host=round(host + hidden),
            disk=written,
            spill=hidden,
            seconds=SNAPSHOTS * max(pruned / machine.read_bytes + writing, rounding + fixed),
        ),
        "compress": Need(
            device=max(score_device, quantize_device),
            host=round(host + machine.ring_bytes + 2 * hidden),
            disk=written,
            spill=2 * hidden,
            seconds=SNAPSHOTS
            * max((source + pruned) / machine.read_bytes + writing, scoring + rounding + fixed),
        ),
    }


def attention_flops(inventory: Inventory) -> float:
    """Scores and weighted values of one token of a sample of `SAMPLE`, all layers; 0 where the
    config names no heads."""
    config = inventory.config
    heads = config.get("num_attention_heads") or 0
    plain = config.get("head_dim") or 0
    keys = (config.get("qk_nope_head_dim") or 0) + (config.get("qk_rope_head_dim") or 0)
    width = (keys or plain) + (config.get("v_head_dim") or plain)
    return 2.0 * SAMPLE * heads * width * inventory.spec.num_layers


def layer_matrices(inventory: Inventory) -> list[Weight]:
    """Matrices of the decoder layers, MTP left out."""
    return [w for w in inventory.main if w.layer is not None and len(w.shape) == 2]


def forward_seconds(inventory: Inventory, tokens: int, machine: Machine) -> float:
    """Every token through every layer once."""
    active = sum(active_parameters(inventory).values())
    return tokens * (2 * active + attention_flops(inventory)) / machine.forward_flops


def input_seconds(inventory: Inventory, tokens: int, machine: Machine) -> float:
    """The pass for the inputs of matrices, and what downs are fed."""
    active = active_parameters(inventory)
    if inventory.spec.architecture.moe.feeds_linears:  # what experts give is wanted after all
        return forward_seconds(inventory, tokens, machine)
    flops = tokens * (2 * active["rest"] + attention_flops(inventory))
    kept = kept_tokens(inventory, tokens, machine)
    return (flops + kept * 2 * active["up"]) / machine.forward_flops


def kept_tokens(inventory: Inventory, tokens: int, machine: Machine) -> float:
    """T_kept."""
    return min(tokens, machine.kept_bytes / (2 * inventory.spec.hidden_size))


def active_parameters(inventory: Inventory) -> Mapping[str, float]:
    """Parameters of the layers' matrices that a token meets: of experts' gates and ups, their
    downs, and the rest."""
    spec, active = inventory.spec, {"up": 0.0, "down": 0.0, "rest": 0.0}
    for weight in layer_matrices(inventory):
        if weight.kind == "expert" and weight.layer is not None:
            experts = spec.num_experts_of(weight.layer)
            role = "down" if "down_proj" in weight.path else "up"
            active[role] += min(spec.top_k, experts) / experts * weight.parameters
        else:
            active["rest"] += weight.parameters
    return active


def hessian_rows(columns: int) -> int:
    """How many rows a Hessian [K, K] of a Linear outside the experts is summed over, at most: 64
    for each column (the noise of sampling is then an eighth), 262,144 where that is more."""
    return max(1 << 18, 64 * columns)


def hessian_seconds(inventory: Inventory, tokens: int, machine: Machine) -> float:
    """Adding x xᵀ: for experts' gates and ups of every token, for other Linears of `hessian_rows`;
    those of one module that are equally wide (q, k and v; gate and up) share their inputs."""
    spec = inventory.spec
    pairs = min(spec.top_k, spec.num_experts) * len(spec.moe_layers)
    kept = kept_tokens(inventory, tokens, machine)
    total = pairs * (tokens * spec.hidden_size**2 + kept * spec.expert_intermediate**2)
    inputs = {
        (weight.layer, weight.path.rpartition(".")[0].rpartition(".")[0], weight.shape[1])
        for weight in layer_matrices(inventory)
        if weight.kind == "linear"
    }
    total += sum(min(tokens, hessian_rows(columns)) * columns**2 for _, _, columns in inputs)
    return 2 * total / machine.hessian_flops


def solve_seconds(inventory: Inventory, machine: Machine) -> float:
    """GPTQ of every matrix; gate and up of an expert share their factor."""
    each = machine.round_seconds + SWEEPS * machine.sweep_seconds
    total = 0.0
    for weight in layer_matrices(inventory):
        if weight.kind in ("expert", "linear"):
            factors = weight.count / 2 if weight.shape[0] < weight.shape[1] else weight.count
            total += factors * weight.shape[1] ** 3 / machine.factor_cubed
            total += weight.parameters * each
    return total


def hessian_bytes(inventory: Inventory) -> int:
    """float32 Hessians of one layer's gates and ups, which stand while the layer runs."""
    return 4 * inventory.spec.num_experts * inventory.spec.hidden_size**2


def device_bytes(inventory: Inventory, machine: Machine, tokens: int | None = None) -> int:
    """GPU memory to run a layer, and with `tokens` to round it: Hessians, inputs kept for down's
    and a set of experts in the solver with them."""
    spec = inventory.spec
    wide = spec.top_k * (2 * spec.hidden_size + 3 * spec.expert_intermediate)
    batch = 2 * machine.batch_tokens * wide
    total = largest_layer(inventory, PLAIN) + float(batch)
    if tokens is not None:
        columns, rows = spec.hidden_size, 2 * spec.expert_intermediate
        one = 4 * (4 * columns * columns + 3 * rows * columns)
        kept = min(machine.kept_bytes, 2.0 * tokens * columns)
        solving = min(machine.experts_at_once, spec.num_experts) * one
        rounding = hessian_bytes(inventory) + kept + solving
        total = largest_layer(inventory, PLAIN) + max(float(batch), rounding)
    return round(SLACK * total + CONTEXT)
