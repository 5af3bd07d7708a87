"""How far a checkpoint's predictions are from a reference's, measured with one layer in memory.

Both models are walked layer by layer over the same tokens; only then are the two heads loaded
and compared, a few positions at a time. So a 685B model can be judged on one GPU: what must fit
is a layer, a head and the hidden states (RAM or disk), never a model.

    nll  = -log q(next token)                    nats a token, mean
    kl   = sum_v p(v) (log p(v) - log q(v))      p reference, q checkpoint; nats a token, mean
    top1 = share of positions where both have the same most likely token

Every token of a sample but its first is predicted (or from a given place on: windows of one
document overlap, evals/rolling.py); padding never counts. Log-probabilities are float32 from each
model's own logits, sums float64, kept by sample (evals/tally.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calibration.batches import BATCH_TOKENS, Batch
from calibration.hidden_states import HiddenStates
from calibration.mixes import ALL
from calibration.resume import walk_layers
from calibration.stream import LayerWalk
from calibration.tokens import TokenSet
from evals.tally import Tally
from models.errors import InputError
from models.journal import json_bytes, refuse_itself
from models.layer_slot import Carry
from models.manifest import versions, write_manifest
from models.opening import OpenModel, compute_device, compute_dtype, open_model
from models.processes import ALONE, Processes
from models.progress import Progress, Step, silent
from models.shared_journal import open_journal
from models.skeleton import Skeleton
from models.writer import write_file

CHUNK_BYTES = 64 * 2**20  # of float32 log-probabilities held at a time, for each model
RESULT_FILE = "evaluation.json"
REFERENCE = "reference"
ONLY = "model"  # the name of the model where there is one only


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How to compute. `memory` bounds hidden states in host RAM, in bytes (None: no bound)."""

    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    batch_tokens: int | None = None


def evaluate(
    model: str | Path,
    tokens: TokenSet,
    settings: EvalSettings,
    *,
    reference: str | Path | None = None,
    out: Path | None = None,
    first: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Perplexity of `model` on `tokens` and, with `reference`, KL and top-1 agreement to it.

    With `out` the job keeps its state there, can be resumed, and leaves evaluation.json and
    samples.jsonl; several `processes`, which share the batches, need it. `first`: of each sample,
    the place of the first token that is predicted (1).
    Raises InputError for models or tokens that do not fit, or when no token is predicted.
    """
    return evaluate_all(
        {ONLY: model}, tokens, settings,
        reference=reference, out=out, first=first, force=force, progress=progress,
        processes=processes,
    )[ONLY]  # fmt: skip


def evaluate_all(
    models: Mapping[str, str | Path | OpenModel],
    tokens: TokenSet,
    settings: EvalSettings,
    *,
    reference: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    out: Path | None = None,
    first: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> dict[str, dict[str, Any]]:
    """`evaluate` of several models by name; the reference is walked once for all of them.

    Their sums by sample are in samples-NAME.jsonl. Models may be open views of a checkpoint that
    was never written (reap.pruned_source); what tells them from the checkpoint they are views of
    is then `identity`, part of the job's.
    """
    started = time.monotonic()
    assert REFERENCE not in models
    assert out is not None or processes.size == 1
    opened = {
        name: model if isinstance(model, OpenModel) else open_model(model)
        for name, model in models.items()
    }
    if reference is not None:
        opened = {REFERENCE: open_model(reference), **opened}
    check_fit(opened, tokens)
    if out is not None:
        for one in opened.values():
            refuse_itself(one.checkpoint.root, out)
    device = compute_device(settings.device)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS[device.type]
    dtypes = {name: compute_dtype(one.spec, settings.dtype) for name, one in opened.items()}
    job = {
        "command": "eval",
        "models": {name: one.checkpoint.digest() for name, one in opened.items()},
        "tokens": tokens.digest(),
        "device": device.type,
        "dtype": {name: str(dtype) for name, dtype in dtypes.items()},
        "batch_tokens": batch_tokens,
        "first": None if first is None else list(first),
        "versions": versions(),
        **({"identity": dict(identity)} if identity else {}),
    }
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory("thresher-eval")))
        journal = stack.enter_context(open_journal(folder, job, force, processes))
        if journal.complete:
            stored = json.loads((folder / RESULT_FILE).read_text())
            return {name: stored if list(models) == [ONLY] else stored[name] for name in models}
        budget = None if settings.memory is None else settings.memory // min(2, len(opened))
        against: LayerWalk | None = None
        for name, one in opened.items():
            if journal.done(f"result {name}"):
                results[name] = dict(journal.facts(f"result {name}")["result"])
                continue
            states = HiddenStates(journal.folder / f"hidden-{name}", budget)
            skeleton = Skeleton(one.source, dtype=dtypes[name], device=device)
            walk = LayerWalk(skeleton, tokens, states, batch_tokens, processes=processes)
            walk_layers(
                walk,
                journal,
                name=name,
                observer=lambda layer: None,
                after=lambda layer: None,
                progress=progress,
            )
            if name == REFERENCE:
                against = walk
                continue
            tally = compare(walk, against, progress, first)
            lines = tally.samples(reference is not None)
            processes.from_first(partial(write_file, journal, samples_file(name), lines))
            results[name] = tally.result(reference is not None)
            journal.record(f"result {name}", result=results[name])
            walk.forget_before(walk.num_layers + 1)
        whole = results[ONLY] if list(models) == [ONLY] else results
        facts = {
            name: {"path": str(one.checkpoint.root.resolve()), "digest": one.checkpoint.digest()}
            for name, one in opened.items()
        }
        about = {"mix": tokens.mix, "seed": tokens.seed, "by_domain": tokens.counts()}

        def write() -> None:
            write_file(journal, RESULT_FILE, json_bytes(whole))
            write_manifest(journal, started, {"models": facts, "tokens": about})

        processes.from_first(write)
    return results


def check_fit(opened: Mapping[str, OpenModel], tokens: TokenSet) -> None:
    """InputError unless the models share a vocabulary that the tokens fit."""
    if sum(tokens.lengths()) == len(tokens.lengths()):
        raise InputError("every sample of the token set has one token; nothing can be predicted")
    if len(tokens.domains) > 1 and ALL in tokens.domains:
        raise InputError(
            f"a domain of the tokens is named `{ALL}`, as the total is; name it otherwise in the "
            "mix and make them again"
        )
    sizes = {name: vocabulary_size(one) for name, one in opened.items()}
    for size in sizes.values():
        tokens.check_vocabulary(size)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} ({name})" for name, size in sizes.items())
        raise InputError(
            f"the models have vocabularies of different sizes: {found}; "
            "compare checkpoints of the same base model"
        )


def vocabulary_size(opened: OpenModel) -> int:
    """Rows of the embedding."""
    name = opened.spec.architecture.embed
    for stored in opened.source.names():
        if opened.spec.canonical(stored) == name:
            return opened.source.shape(stored)[0]
    raise InputError(f"{opened.checkpoint.root} holds no {name}; the checkpoint is incomplete")


def samples_file(name: str) -> str:
    """Where the sums by sample of a model are."""
    return "samples.jsonl" if name == ONLY else f"samples-{name}.jsonl"


def compare(
    walk: LayerWalk,
    reference: LayerWalk | None,
    progress: Progress,
    first: Sequence[int] | None = None,
) -> Tally:
    """Load the heads and compare the two models position by position."""
    tally = Tally(walk.tokens.domain.tolist(), list(walk.tokens.domains))
    walks = [walk] if reference is None else [walk, reference]
    for one in walks:
        one.skeleton.load_head()
    for number in walk.own:
        tally.begin_batch()
        batch = walk.batch(number)
        carries = [  # another model may be compared with the reference
            one.hidden_states.take(one.num_layers, number, keep=one is reference) for one in walks
        ]
        width = batch.input_ids.shape[1]
        sample_B = torch.tensor(batch.samples)
        begin = None if first is None else [first[sample] for sample in batch.samples]
        for position_N, target_N in predicted(batch, walk.skeleton.spec.text["vocab_size"], begin):
            rows = [logits_at(w, c, position_N) for w, c in zip(walks, carries, strict=True)]
            target = target_N.to(rows[0].device)
            log_q = rows[0].log_softmax(-1)
            nll = -log_q.gather(1, target[:, None])[:, 0]
            against = None
            if reference is not None:
                log_p = rows[1].log_softmax(-1)
                against = (
                    -log_p.gather(1, target[:, None])[:, 0],
                    (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0),
                    log_p.argmax(-1) == log_q.argmax(-1),
                )
            tally.add(sample_B[position_N // width], position_N % width + 1, nll, against)
        progress(Step(job="heads", done=number + 1, total=len(walk.cuts), unit="batches"))
    for one in walks:
        one.skeleton.unload_head()
    tally.gather(walk.processes)
    return tally


def predicted(
    batch: Batch, vocabulary: int, first: Sequence[int] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Chunks of (flat positions whose next token is predicted, those next tokens), int64 [N].

    `first`: of each row, the place of the first predicted token (1 where not given).
    """
    width = batch.input_ids.shape[1]
    begin = first or [1] * len(batch.lengths)
    positions = torch.cat(
        [
            torch.arange(begin[row] - 1, length - 1) + row * width
            for row, length in enumerate(batch.lengths)
        ]
    )
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    flat = batch.input_ids.reshape(-1)
    for start in range(0, len(positions), chunk):
        part = positions[start : start + chunk]
        yield part, flat[part + 1]


def logits_at(walk: LayerWalk, carry: Carry, position_N: torch.Tensor) -> torch.Tensor:
    """float32 logits [N, V] at flat positions of a batch."""
    hidden = carry["hidden_states"]
    rows = hidden.reshape(-1, *hidden.shape[2:])[position_N].unsqueeze(0)
    logits = walk.skeleton.logits({"hidden_states": rows.to(walk.skeleton.device)})
    return logits[0].float()
