"""`--criterion auto`: the plan whose pruned model is measured to be nearest to the original.

Every criterion but `random` (and `output-error`, where its statistics were collected) makes its
plan; each pruned model is walked over held-out tokens without being written (reap.pruned_source),
and the plan of least KL to the original is taken. Plans that keep the same experts are judged once.
The measurements lie beside the scores, under auto/, so that a killed or repeated run continues,
and go into plan.json.

Refused: choosing layer by layer. By the KL it takes as many walks as layers times criteria, for 8 %
at most; by the error of each layer's output on held-out tokens it was no better (docs/log.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibration.tokens import TokenSet
from evals.fidelity import EvalSettings, evaluate_all
from models.opening import OpenModel
from models.progress import Progress, silent
from reap.criteria import AUTO, CRITERIA, OUTPUT_ERROR
from reap.damage_file import DamageStats
from reap.plan import PrunePlan, make_plan
from reap.pruned_source import pruned_view
from reap.stats import SaliencyStats


def best_plan(
    stats: SaliencyStats,
    damage: DamageStats | None,
    opened: OpenModel,
    tokens: TokenSet,
    scores: Path,
    asked: Mapping[str, Any],
    *,
    settings: EvalSettings,
    progress: Progress = silent,
) -> PrunePlan:
    """The plan of least measured KL on `tokens`; `asked` are the other arguments of `make_plan`.

    Its `evidence` names the criterion and every candidate's KL and perplexity. InputError when
    the tokens do not fit the model.
    """
    names = [name for name in CRITERIA if name != "random"]
    if damage is not None:
        names.append(OUTPUT_ERROR)
    plans = {
        name: make_plan(stats, opened.spec, criterion=name, damage=damage, **asked)
        for name in names
    }
    first_with: dict[str, str] = {}  # layers -> the first criterion that gives them
    same_as = {
        name: first_with.setdefault(json.dumps(plan.to_json()["layers"]), name)
        for name, plan in plans.items()
    }
    judged = sorted(set(same_as.values()), key=names.index)
    identity = {name: _fingerprint(plans[name]) for name in judged}
    how = [settings.device, settings.dtype, settings.batch_tokens]
    key = hashlib.sha256(json.dumps([identity, tokens.digest(), how]).encode()).hexdigest()
    found = evaluate_all(
        {name: pruned_view(opened, plans[name]) for name in judged},
        tokens,
        settings,
        reference=opened.checkpoint.root,
        identity=identity,
        out=scores / "auto" / key[:16],
        progress=progress,
    )
    measured = {
        name: {"kl": found[same]["kl"], "perplexity": found[same]["perplexity"]}
        for name, same in same_as.items()
    }
    best = min(judged, key=lambda name: (measured[name]["kl"], names.index(name)))
    evidence = {
        **plans[best].evidence,
        "chosen": best,
        "held_out_tokens": tokens.digest(),
        "measured": measured,
    }
    return replace(plans[best], criterion=AUTO, evidence=evidence)


def _fingerprint(plan: PrunePlan) -> str:
    content = plan.to_json()
    facts = {name: content[name] for name in ("layers", "groups", "mtp", "model_digest")}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
