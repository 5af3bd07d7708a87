"""Scoring: tokens through the model, one layer resident, saliency of every expert.

What is summed (reap/stats.py) comes from the forward pass itself: the router weights are the
coefficients that multiplied the outputs, and the norms are those of the very outputs. Activations
are the original, unpruned model's in every layer.

    OUT/saliency.safetensors, saliency.json     the result
    OUT/damage.safetensors                      with `damage_tokens`: reap/damage.py
    OUT/.thresher/                              while the job runs: journal, hidden states, sums
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from calibration.batches import BATCH_TOKENS, PADDING, Batch
from calibration.hidden_states import HiddenStates
from calibration.packing import check_packable
from calibration.resume import walk_layers
from calibration.stream import BatchObserver, LayerWalk
from calibration.tokens import TokenSet
from models.device import sent
from models.errors import InputError
from models.experts import RoutedBatch
from models.journal import Journal, refuse_itself, write_atomically
from models.manifest import versions, write_manifest
from models.mtp import MTPLayer, runnable_mtp_layers
from models.opening import OpenModel, compute_device, compute_dtype, open_model
from models.processes import ALONE, Processes
from models.progress import Progress, Step, silent
from models.shared_journal import open_journal
from models.skeleton import Skeleton
from models.writer import unit_of
from reap.damage_file import DAMAGE_FILE, DamageStats, read_layer_damage
from reap.damage_watch import DamageWatch, damage_path
from reap.shared_sums import SharedSums
from reap.stats import FACTS_FILE, TENSORS_FILE, LayerStats, SaliencyStats

ROWS_NORMED_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """How to compute. `memory` bounds hidden states in host RAM, in bytes (None: no bound).

    `damage_tokens`: of how many sampled tokens second-order statistics are kept (0: none).
    """

    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    batch_tokens: int | None = None
    pack: bool = False  # samples in rows without padding: calibration/packing.py
    damage_tokens: int = 0


def score(
    model: str | Path,
    tokens: TokenSet,
    out: Path,
    settings: ScoreSettings,
    *,
    force: bool = False,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> SaliencyStats:
    """Score every routed expert of `model` on `tokens` and write the result to `out`.

    The same call on the same folder after an interruption continues and ends with the same
    bytes. Raises InputError for anything wrong with the model, the tokens or the folder. Called
    in each of several `processes`, it deals the batches among them; the first one writes.
    """
    opened = open_model(model)
    check_tokens(opened, tokens)
    if settings.pack:
        check_packable(opened.spec)
    device = compute_device(settings.device)
    dtype = compute_dtype(opened.spec, settings.dtype)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS[device.type]
    started = time.monotonic()
    job = {
        "command": "score",
        "model": opened.checkpoint.digest(),
        "tokens": tokens.digest(),
        "device": device.type,
        "dtype": str(dtype),
        "batch_tokens": batch_tokens,
        **({"pack": True} if settings.pack else {}),
        "versions": versions(),
    }
    if settings.damage_tokens:
        job["damage_tokens"] = settings.damage_tokens
    refuse_itself(opened.checkpoint.root, out)
    with open_journal(out, job, force, processes) as journal:
        if journal.complete:
            return SaliencyStats.load(out)
        how = (device, dtype, batch_tokens)
        _run_layers(opened, tokens, journal, settings, how, progress, processes)
        return processes.from_first(
            lambda: _write_result(opened, tokens, journal, settings, started)
        )


def _write_result(
    opened: OpenModel,
    tokens: TokenSet,
    journal: Journal,
    settings: ScoreSettings,
    started: float,
) -> SaliencyStats:
    """The output's files, from the sums of all layers."""
    out = journal.out
    domains = tuple(tokens.domains)
    num_experts = opened.spec.num_experts
    units = journal.units()
    mtp_layers = [int(unit.split()[-1]) for unit in units if unit.startswith("score mtp ")]
    stats = SaliencyStats(
        layers={
            layer: read_layer(journal, layer, num_experts, domains)
            for layer in (*opened.spec.scored_layers, *mtp_layers)
        },
        tokens={name: counts["tokens"] for name, counts in tokens.counts().items()},
        model=opened.checkpoint.root.name,
        digests={"model": opened.checkpoint.digest(), "tokens": tokens.digest()},
        versions=versions(),
    )
    stats.save(out)
    written = [TENSORS_FILE, FACTS_FILE]
    if settings.damage_tokens:
        read_damage(journal, opened, stats).save(out)
        written.append(DAMAGE_FILE)
    for name in written:
        data = (out / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        journal.record(unit_of(name), file=name, bytes=len(data), sha256=digest)
    facts = {
        "source": {
            "path": str(opened.checkpoint.root.resolve()),
            "digest": opened.checkpoint.digest(),
        },
        "family": opened.spec.family,
        "tokens": {
            "mix": tokens.mix,
            "seed": tokens.seed,
            "by_domain": tokens.counts(),
            "report": tokens.report(),
        },
        "dead_experts": sum(len(dead) for dead in stats.dead_experts().values()),
    }
    write_manifest(journal, started, facts)
    return stats


def check_tokens(opened: OpenModel, tokens: TokenSet) -> None:
    """InputError when the token set holds ids the model has no embedding for."""
    name = opened.spec.architecture.embed
    by_own = {opened.spec.canonical(n): n for n in opened.source.names()}
    if name not in by_own:
        raise InputError(f"{opened.checkpoint.root} holds no {name}; the checkpoint is incomplete")
    vocabulary = opened.source.shape(by_own[name])[0]
    tokens.check_vocabulary(vocabulary)


def _run_layers(
    opened: OpenModel,
    tokens: TokenSet,
    journal: Journal,
    settings: ScoreSettings,
    how: tuple[torch.device, torch.dtype, int],
    progress: Progress,
    processes: Processes,
) -> None:
    """Every layer's sums, in files of the job's folder."""
    device, dtype, batch_tokens = how
    skeleton = Skeleton(opened.source, dtype=dtype, device=device)
    states = HiddenStates(journal.folder / "hidden", settings.memory, journal.discard)
    walk = LayerWalk(
        skeleton, tokens, states, batch_tokens, pack=settings.pack, processes=processes
    )
    domains = tuple(tokens.domains)
    scored = opened.spec.scored_layers
    mtp_layers = runnable_mtp_layers(skeleton)
    collected: dict[int, SharedSums] = {}
    damage = DamageWatch(walk, journal, settings.damage_tokens)

    def observer(layer: int) -> BatchObserver | None:
        if layer not in scored:
            return None
        collected[layer] = SharedSums(processes, opened.spec.num_experts, domains, device)
        return damage.beside(layer, summing_batches(collected[layer]))

    def after(layer: int) -> None:
        if layer in collected:
            write_layer(journal, layer, collected.pop(layer))

    walk_layers(
        walk,
        journal,
        name="score",
        observer=observer,
        after=after,
        progress=progress,
        extra_units=len(mtp_layers),
        leaves=bool(mtp_layers),
        finisher=damage.finisher,
    )
    for number, layer in enumerate(mtp_layers):
        if not journal.done(f"score mtp {layer}"):
            sums = SharedSums(processes, opened.spec.num_experts, domains, device)
            _score_mtp(walk, layer, summing_batches(sums), last=number == len(mtp_layers) - 1)
            write_layer(journal, layer, sums)
            journal.record(f"score mtp {layer}")
        progress(
            Step(
                job="score",
                done=walk.num_layers + number + 1,
                total=walk.num_layers + len(mtp_layers),
                note=f"layer {layer} (MTP)",
            )
        )


def summing_batches(sums: SharedSums) -> BatchObserver:
    """The observer that adds what each batch's experts did to `sums`."""
    return lambda record, batch: summing(sums.next())(record, batch)


def summing(stats: LayerStats) -> Callable[[RoutedBatch, Batch], None]:
    """The observer that adds what a batch's experts did to `stats`."""

    def add(record: RoutedBatch, batch: Batch) -> None:
        domain_P = sent(batch.domain_T, record.token_P.device)[record.token_P]
        norms_P = row_norms(record.outputs_PD) if record.norms_P is None else record.norms_P
        weights_P = record.router_weights_P.double()
        if record.weights_applied_to_input:
            # Llama-4: the contribution is f(w x); the norm before weighting is its norm over w
            norms_P = norms_P / weights_P
        stats.add_routed(record.expert_P, domain_P, weights_P, norms_P)

    return add


def read_damage(journal: Journal, opened: OpenModel, stats: SaliencyStats) -> DamageStats:
    """The damage statistics of every scored decoder layer."""
    return DamageStats(
        layers={
            layer: read_layer_damage(damage_path(journal, layer), layer)
            for layer in opened.spec.scored_layers
        },
        saliency_sha256=stats.digest(),
        model_digest=stats.digests["model"],
        tokens_digest=stats.digests["tokens"],
    )


def row_norms(rows_PD: torch.Tensor) -> torch.Tensor:
    """L2 norms in float64 [P]; chunks bound the float64 copy of the rows."""
    return torch.cat(
        [
            torch.linalg.vector_norm(chunk, dim=-1, dtype=torch.float64)
            for chunk in rows_PD.split(ROWS_NORMED_AT_ONCE)
        ]
    )


def _score_mtp(
    walk: LayerWalk,
    layer: int,
    observe: Callable[[RoutedBatch, Batch], None],
    *,
    last: bool,
) -> None:
    """The MTP layer over what left the last decoder layer."""
    skeleton = walk.skeleton
    mtp = MTPLayer(skeleton, layer)
    current: list[Batch] = []
    mtp.load(lambda record: observe(record, current[0]))
    skeleton.load_embedding()
    for number in walk.own:
        batch = walk.batch(number)
        next_ids = batch.input_ids.roll(-1, dims=1)
        # the last token of a sample has no successor: its position counts as padding
        domain_T = batch.domain_T.clone()
        domain_T[list(batch.ends)] = PADDING
        current[:] = [
            Batch(
                samples=batch.samples,
                lengths=batch.lengths,
                input_ids=next_ids,
                attention_mask=batch.attention_mask,
                domain_T=domain_T,
                position_ids=batch.position_ids,
            )
        ]
        mask = batch.attention_mask
        mask = None if mask is None else mask.to(skeleton.device)
        carry = walk.hidden_states.take(layer, number)
        carry = {name: tensor.to(skeleton.device) for name, tensor in carry.items()}
        positions = batch.position_ids
        positions = None if positions is None else positions.to(skeleton.device)
        out = mtp.run(next_ids.to(skeleton.device), mask, carry, positions)
        if not last:
            walk.hidden_states.put(layer + 1, number, out)
    skeleton.unload_embedding()
    mtp.unload()


def _sums_path(journal: Journal, layer: int) -> Path:
    return journal.folder / f"sums_{layer:05d}.safetensors"


def write_layer(journal: Journal, layer: int, sums: SharedSums) -> None:
    """Keep a layer's sums until the job ends; the first process writes them."""
    stats = sums.total()
    stats.check_finite(layer)
    if sums.processes.is_first:
        write_atomically(_sums_path(journal, layer), save_tensors(stats.to_tensors(layer)))


def read_layer(
    journal: Journal, layer: int, num_experts: int, domains: tuple[str, ...]
) -> LayerStats:
    return LayerStats.from_tensors(
        load_file(_sums_path(journal, layer)), layer, num_experts, domains
    )
