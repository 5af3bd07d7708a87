"""What rounding one part of one layer costs, in KL of the whole model's predictions.

    for every (part, scheme):   the intact model with that part alone rounded
                                -> its later layers, intact -> KL to the intact model, nats a token

All these models are walked *together*: they share the layers before their part (the trunk), branch
off where the part stands, and each layer is read once, so one streaming pass with one layer in
memory measures them all:

    trunk    h_0 -> h_1 -> h_2 -> ...
    branch          \\-> rounded layer 1 -> layer 2 -> ... -> head -> KL

For N layers, P parts a layer and S schemes that is N (N - 1) / 2 * P * S layer passes over few
tokens (`DAMAGE_TOKENS`): some 270 walks of them for DeepSeek-V3.2 and three schemes. Parts are
rounded to nearest with searched scales, which needs no tokens: a ranking is wanted, and GPTQ of
every candidate would cost the quantizing job S times.

The relative error of the layer's own output was refused as the measure: it is cheaper (no
branches) and does not say how much the later layers make of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.batches import BATCH_TOKENS
from calibration.hidden_states import HiddenStates
from calibration.resume import HIDDEN, begin_at, keep_place
from calibration.stream import LayerWalk, SnapshotClock, check_finite, tokens_are_finite
from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings, check_fit, logits_at, predicted
from models.errors import InputError
from models.journal import Journal, json_bytes, refuse_itself
from models.manifest import versions, write_manifest
from models.memory import release_freed_memory
from models.opening import OpenModel, compute_device, compute_dtype
from models.progress import Progress, Step, silent
from models.skeleton import Skeleton
from models.writer import write_file
from quant.budget import Menu, Part
from quant.layer import LayerRounder
from quant.layer_rounding import LayerRounding
from quant.recipes import uniform
from quant.schemes import Scheme
from quant.walked_layer import loaded_modules, put_in_place

DAMAGE_TOKENS = 4096
RESULT_FILE = "damage.json"
NAME = "damage"

Damage = dict[Part, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Branch:
    """The intact model but for one part under one scheme (its index in the menu)."""

    part: Part
    scheme: int


def part_damage(
    opened: OpenModel,
    menu: Menu,
    tokens: TokenSet,
    settings: EvalSettings,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Damage:
    """KL of each measured part by scheme, in the menu's order; also OUT/damage.json.

    `tokens` are all used (see `some_samples`). A killed job goes on behind its last snapshot.
    """
    started = time.monotonic()
    check_fit({"model": opened}, tokens)
    device = compute_device(settings.device)
    dtype = compute_dtype(opened.spec, settings.dtype)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS[device.type]
    job = {
        "command": NAME,
        "source": opened.checkpoint.digest(),
        "schemes": [uniform(scheme).to_json()[0] for scheme in menu.schemes],
        "tokens": tokens.digest(), "device": device.type, "dtype": str(dtype),
        "batch_tokens": batch_tokens, "versions": versions(),
    }  # fmt: skip
    refuse_itself(opened.checkpoint.root, out)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(out, job, force=force))
        if journal.complete:
            return read_damage(out, menu)
        states = HiddenStates(journal.folder / "hidden", settings.memory)
        skeleton = Skeleton(opened.source, dtype=dtype, device=device)
        walk = LayerWalk(skeleton, tokens, states, batch_tokens)
        branches = [
            Branch(part, scheme) for part in menu.measured for scheme in range(len(menu.schemes))
        ]
        run_branches(walk, menu, branches, journal, progress)
        kl = divergences(walk, len(branches), progress)
        found: Damage = {
            part: tuple(
                value for branch, value in zip(branches, kl, strict=True) if branch.part == part
            )
            for part in menu.measured
        }
        content = {
            "model_digest": opened.checkpoint.digest(),
            "tokens": sum(tokens.lengths()),
            "schemes": [scheme.name for scheme in menu.schemes],
            "kl": [
                {"layer": part.layer, "part": part.kind, "by_scheme": list(values)}
                for part, values in found.items()
            ],
        }
        write_file(journal, RESULT_FILE, json_bytes(content))
        write_manifest(journal, started, {})
    return found


def read_damage(out: Path, menu: Menu) -> Damage:
    """What `part_damage` wrote."""
    entries: list[dict[str, Any]] = json.loads((out / RESULT_FILE).read_bytes())["kl"]
    found = {Part(one["layer"], one["part"]): tuple(one["by_scheme"]) for one in entries}
    return {part: found[part] for part in menu.measured}


def some_samples(tokens: TokenSet, limit: int) -> TokenSet:
    """Whole samples spread evenly over the set, of `limit` tokens or little more."""
    lengths = tokens.lengths()
    share = min(1.0, limit / sum(lengths))
    chosen: list[int] = []
    due = 0.0
    for number, length in enumerate(lengths):
        due += share * length
        if due >= sum(lengths[place] for place in chosen) + length / 2:
            chosen.append(number)
    chosen = chosen or [max(range(len(lengths)), key=lengths.__getitem__)]
    return replace(
        tokens,
        input_ids=torch.cat([tokens.sample(number) for number in chosen]),
        offsets=torch.tensor([0, *(lengths[number] for number in chosen)]).cumsum(0),
        domain=tokens.domain[chosen],
    )


def run_branches(
    walk: LayerWalk,
    menu: Menu,
    branches: Sequence[Branch],
    journal: Journal,
    progress: Progress,
) -> None:
    """Trunk and branches through all layers. Lane 0 is the trunk, lane i the branch i - 1; the
    carries of lane i are at the batch numbers i * len(cuts) + ..."""
    skeleton = walk.skeleton
    clock = SnapshotClock()
    start = begin_at(walk, journal, NAME)
    alive = 1 + sum(branch.part.layer < start for branch in branches)
    for layer in range(start, walk.num_layers):
        skeleton.load_layer(layer)
        skeleton.prefetch_layer(layer + 1)
        pass_lanes(walk, layer, range(1, alive))
        pass_lanes(walk, layer, [0], keep=True)
        for part in (part for part in menu.measured if part.layer == layer):
            skeleton.load_layer(layer)  # as it is, after another part was rounded
            check_replaceable(menu, part, skeleton)
            for scheme in menu.schemes:
                round_in_place(menu, part, scheme, skeleton)
                pass_lanes(walk, layer, [0], into=alive, keep=True)
                alive += 1
        skeleton.unload_layer(layer)
        release_freed_memory()
        walk.hidden_states.forget_from_ram(layer)
        keep_place({HIDDEN: walk}, journal, f"{NAME} {layer}", layer, clock)
        progress(Step(job=NAME, done=layer + 1, total=walk.num_layers, note=f"layer {layer}"))


def pass_lanes(
    walk: LayerWalk,
    layer: int,
    lanes: Sequence[int],
    *,
    into: int | None = None,
    keep: bool = False,
) -> None:
    """Every batch of these lanes through the loaded layer; `into` is a new lane for the result.

    `keep` leaves what entered the layer, for new branches.
    """
    count = len(walk.cuts)
    places = [(lane, number) for lane in lanes for number in range(count)]
    entering = walk.carries.entering(
        layer, [lane * count + number for lane, number in places], keep=keep
    )
    for (lane, number), carry in zip(places, entering, strict=True):
        batch = walk.batch(number)
        leaving = walk.through(layer, batch, carry)
        check_finite(layer, [tokens_are_finite(batch, leaving["hidden_states"])])
        walk.carries.put(layer + 1, (lane if into is None else into) * count + number, leaving)
    walk.carries.settle()


def check_replaceable(menu: Menu, part: Part, skeleton: Skeleton) -> None:
    """InputError where transformers keeps a part's matrices in another form: rounding them could
    not be seen."""
    rounder = rounder_of(menu, part, menu.schemes[0], skeleton)
    replaced = loaded_modules(rounder, skeleton, part.layer, menu.parts[part])
    for linear in menu.parts[part]:
        if not linear.is_expert and linear.module not in replaced:
            raise InputError(
                f"{linear.logical} is joined with others when {skeleton.spec.architecture.title} "
                "runs, its damage cannot be measured; give the schemes by --recipe"
            )


def rounder_of(menu: Menu, part: Part, scheme: Scheme, skeleton: Skeleton) -> LayerRounder:
    """Rounds a part's matrices to nearest."""
    return LayerRounder(
        skeleton.source,
        {linear.module: scheme for linear in menu.parts[part]},
        damping={},
        scale_dtype=skeleton.dtype,
        device=skeleton.device,
    )


def round_in_place(menu: Menu, part: Part, scheme: Scheme, skeleton: Skeleton) -> None:
    """The part's matrices as rounding gives them, in the loaded layer.

    They are read from the source: the layer may hold the part under another scheme.
    """
    rounder, linears = rounder_of(menu, part, scheme, skeleton), menu.parts[part]
    result = LayerRounding()
    rounder.round_linears(linears, None, result)
    put_in_place(rounder, loaded_modules(rounder, skeleton, part.layer, linears), result)
    sets = rounder.expert_sets(linears)
    rounder.round_experts(sets, None, None, result)
    if sets:
        rounder.put_in_place(sets, skeleton.experts[part.layer], result)


def divergences(walk: LayerWalk, branches: int, progress: Progress) -> list[float]:
    """Mean KL of each branch to the trunk over all predicted tokens, float64 sums."""
    skeleton, states, count = walk.skeleton, walk.hidden_states, len(walk.cuts)
    totals, tokens = [0.0] * branches, 0
    skeleton.load_head()
    for number in range(count):
        batch = walk.batch(number)
        trunk = states.take(walk.num_layers, number)
        parts = list(predicted(batch, skeleton.spec.text["vocab_size"]))
        for branch in range(branches):
            own = states.take(walk.num_layers, (branch + 1) * count + number)
            for position_N, _ in parts:
                log_p = logits_at(walk, trunk, position_N).log_softmax(-1)
                log_q = logits_at(walk, own, position_N).log_softmax(-1)
                kl_N = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
                totals[branch] += float(kl_N.sum(dtype=torch.float64))
        tokens += sum(len(position_N) for position_N, _ in parts)
        progress(Step(job="heads", done=number + 1, total=count, unit="batches"))
    skeleton.unload_head()
    return [total / tokens for total in totals]
