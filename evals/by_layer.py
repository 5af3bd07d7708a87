"""Where the loss comes from: KL when one decoder layer alone is the compressed one.

    for each layer L:   the base model's states entering L -> the checkpoint's layer L
                        -> the base model's layers after it -> its head, against the base model

The states entering L are carried along once, so N layers cost N + N (N + 1) / 2 layer passes and
memory is one layer and the states, as everywhere. Measured, not estimated: errors that later layers
heal or blow up are in it. Replacing all layers but one was refused: what is asked is where to spend
bits, and losses do not add up from that side.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from calibration.batches import BATCH_TOKENS
from calibration.hidden_states import HiddenStates
from calibration.stream import LayerWalk
from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings, check_fit, compare
from models.errors import InputError
from models.journal import Journal, json_bytes, refuse_itself
from models.manifest import versions, write_manifest
from models.opening import compute_device, compute_dtype, open_model
from models.progress import Progress, Step, silent
from models.skeleton import Skeleton
from models.writer import write_file

RESULT_FILE = "by_layer.json"


def damage_by_layer(
    model: str | Path,
    reference: str | Path,
    tokens: TokenSet,
    settings: EvalSettings,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """{"tokens", "kl": {layer: nats a token}, "model_digest"}; also OUT/by_layer.json.

    Every layer's figure is recorded as it comes; a killed job goes on with the next one. Raises
    InputError when the two models are not of one shape between their layers.
    """
    started = time.monotonic()
    own, base = open_model(model), open_model(reference)
    check_fit({"model": own, "reference": base}, tokens)
    if (own.spec.num_layers, own.spec.hidden_size) != (base.spec.num_layers, base.spec.hidden_size):
        raise InputError("the two models have other layers; compare checkpoints of one base model")
    device = compute_device(settings.device)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS[device.type]
    dtype = compute_dtype(base.spec, settings.dtype)
    job = {
        "command": "eval by layer",
        "models": {"model": own.checkpoint.digest(), "reference": base.checkpoint.digest()},
        "tokens": tokens.digest(), "device": device.type, "dtype": str(dtype),
        "batch_tokens": batch_tokens, "versions": versions(),
    }  # fmt: skip
    for opened in (own, base):
        refuse_itself(opened.checkpoint.root, out)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(out, job, force=force))
        if journal.complete:
            found: dict[str, Any] = json.loads((out / RESULT_FILE).read_bytes())
            return found
        budget = None if settings.memory is None else settings.memory // 3
        states = {
            name: HiddenStates(journal.folder / f"hidden-{name}", budget)
            for name in ("whole", "trunk", "branch")
        }
        skeletons = [Skeleton(one.source, dtype=dtype, device=device) for one in (base, own)]
        whole, trunk, branch = (
            LayerWalk(skeletons[0], tokens, kept, batch_tokens) for kept in states.values()
        )
        replaced = LayerWalk(skeletons[1], tokens, states["branch"], batch_tokens)
        run_whole(whole, progress)
        trunk.embed()
        for layer in range(trunk.num_layers):
            if not journal.done(f"layer {layer}"):
                fork(trunk, branch, layer)
                replaced.run(layer)
                for later in range(layer + 1, branch.num_layers):
                    branch.run(later)
                result = compare(branch, whole, silent).result(True)
                journal.record(f"layer {layer}", kl=result["kl"], tokens=result["tokens"])
                branch.hidden_states.forget_before(branch.num_layers + 1)
            trunk.run(layer)
            trunk.hidden_states.forget_before(layer + 1)
            progress(Step(job="by layer", done=layer + 1, total=trunk.num_layers))
        facts = [journal.facts(f"layer {layer}") for layer in range(trunk.num_layers)]
        summary = {
            "model_digest": own.checkpoint.digest(),
            "tokens": facts[0]["tokens"],
            "kl": {str(layer): own_facts["kl"] for layer, own_facts in enumerate(facts)},
        }
        write_file(journal, RESULT_FILE, json_bytes(summary))
        write_manifest(journal, started, {})
    return summary


def run_whole(whole: LayerWalk, progress: Progress) -> None:
    """The base model as it is; what leaves its last layer stays for all comparisons."""
    whole.embed()
    for layer in range(whole.num_layers):
        whole.run(layer)
        whole.hidden_states.forget_before(layer + 1)
        progress(Step(job="reference", done=layer + 1, total=whole.num_layers))


def fork(trunk: LayerWalk, branch: LayerWalk, layer: int) -> None:
    """Copy what enters `layer` to the branch."""
    for number in range(len(trunk.cuts)):
        carry = trunk.hidden_states.take(layer, number, keep=True)
        copy = {name: tensor.clone() for name, tensor in carry.items()}
        branch.hidden_states.put(layer, number, copy)
