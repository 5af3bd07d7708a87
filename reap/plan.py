"""Prune plans: which experts of each layer stay.

The number kept is one and the same in every layer, because config.json has one number and every
engine reads it; budgets that differ by layer would need patched engines.

Which numbers can be kept, and what groups mean for it, is in reap/quotas.py.

Of equal scores the lower expert id is kept; dead experts come after all living ones. What single
domains may ask for (weights, protected experts) is in reap/domains.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from models.errors import InputError
from models.journal import write_atomically
from models.model_spec import ModelSpec
from reap.criteria import OUTPUT_ERROR, check_criterion, score_experts
from reap.damage_file import DamageStats
from reap.domains import all_weights, check_protected, protected_counts, protected_experts
from reap.elimination import least_damaging
from reap.quotas import (
    GroupMode,
    MTPMode,
    check_keep,
    planned_layers,
    quota_groups,
    resolve_keep,
)
from reap.ranking import best_experts
from reap.stats import SaliencyStats

__all__ = ["PrunePlan", "best_experts", "make_plan"]

FORMAT = "thresher.plan/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """The kept experts of every scored layer, ascending, and how they were chosen.

    `layers` and `dead_experts` are keyed by the layer's index in the checkpoint; MTP layers are
    in `layers` exactly when `mtp` is "prune". `dead_experts` lists all dead ones of a layer, kept
    or not. `saliency_sha256` is of the saliency.safetensors it was made from, `model_digest` of
    the checkpoint that was scored ("" where not known). `weights` and `protect` are what was asked
    by domain (reap/domains.py), `evidence` what a measuring criterion measured; plan.json has each
    only where there is any.
    """

    criterion: str
    num_experts: int
    keep: int
    layers: Mapping[int, tuple[int, ...]]
    groups: GroupMode = "keep"
    mtp: MTPMode = "drop"
    seed: int = 0
    dead_experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    saliency_sha256: str = ""
    model_digest: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    protect: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of the experts removed."""
        return 1 - self.keep / self.num_experts

    @property
    def num_dead(self) -> int:
        """Dead experts over all layers."""
        return sum(len(dead) for dead in self.dead_experts.values())

    @property
    def num_dead_kept(self) -> int:
        """Dead experts that stay, because too few living ones were there to fill the quota."""
        return sum(
            len(set(dead) & set(self.layers.get(layer, ())))
            for layer, dead in self.dead_experts.items()
        )

    def dropped(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that go, ascending."""
        kept = set(self.layers[layer])
        return tuple(expert for expert in range(self.num_experts) if expert not in kept)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "format": FORMAT,
            "criterion": self.criterion,
            "num_experts": self.num_experts,
            "keep": self.keep,
            "groups": self.groups,
            "mtp": self.mtp,
            "seed": self.seed,
            **({"weights": dict(self.weights)} if self.weights else {}),
            **({"protect": dict(self.protect)} if self.protect else {}),
            "saliency_sha256": self.saliency_sha256,
            "model_digest": self.model_digest,
            **({"evidence": dict(self.evidence)} if self.evidence else {}),
            "dead_experts": {str(k): list(v) for k, v in sorted(self.dead_experts.items())},
            "layers": {str(k): list(v) for k, v in sorted(self.layers.items())},
        }

    def save(self, path: str | Path) -> None:
        """Write plan.json: one line a layer, to be read and compared by people."""
        lines = []
        for key, value in self.to_json().items():
            if isinstance(value, dict) and value:
                rows = [f'  "{k}": {json.dumps(v)}' for k, v in value.items()]
                lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        write_atomically(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read plan.json (provenance may be missing, the contract's keys not). InputError else."""
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a plan.json") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); make the plan again") from error
        return _from_json(content, str(path))

    def validate(self, spec: ModelSpec) -> None:
        """InputError unless the plan can be carried out on the model and leaves it routable."""
        if self.num_experts != spec.num_experts:
            raise InputError(
                f"the plan is for {self.num_experts} experts a layer, the model has "
                f"{spec.num_experts}; make a plan from this model's scores"
            )
        check_keep(spec, self.keep, self.groups)
        expected = planned_layers(spec, self.mtp)
        if tuple(sorted(self.layers)) != expected:
            odd = sorted(set(self.layers) ^ set(expected))
            raise InputError(
                f"the plan's layers are not the model's: layer {odd[0]} is in one of them only; "
                "make a plan from this model's scores"
            )
        num_groups = quota_groups(spec, self.groups)
        size, quota = self.num_experts // num_groups, self.keep // num_groups
        for layer, kept in self.layers.items():
            if list(kept) != sorted(set(kept)) or any(
                not 0 <= expert < self.num_experts for expert in kept
            ):
                raise InputError(
                    f"plan, layer {layer}: kept experts must be distinct, ascending and within "
                    f"0..{self.num_experts - 1}; make the plan again"
                )
            counts = [0] * num_groups
            for expert in kept:
                counts[expert // size] += 1
            if counts != [quota] * num_groups:
                raise InputError(
                    f"plan, layer {layer}: {', '.join(map(str, counts))} experts are kept in "
                    f"{num_groups} groups, {quota} of each are wanted; make the plan again"
                )


def make_plan(
    stats: SaliencyStats,
    spec: ModelSpec,
    *,
    keep: int | None = None,
    ratio: float | None = None,
    criterion: str = "reap",
    mtp: MTPMode = "drop",
    groups: GroupMode = "keep",
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    protect: Mapping[str, float] | None = None,
    damage: DamageStats | None = None,
) -> PrunePlan:
    """Rank every scored layer's experts by `criterion` and keep the best.

    Exactly one of `keep` (experts a layer) and `ratio` (share removed, see `resolve_keep`).
    `seed` matters to `random` only. `weights` multiplies the sums of the domains it names, and
    `protect` keeps the best experts of the domains it names (reap/domains.py). `damage` (of the
    same scoring run) is for `output-error`, which cannot do without and takes neither. InputError
    when the number, criterion or mode is not possible, or the statistics are not of this model.
    """
    keep = resolve_keep(spec, keep=keep, ratio=ratio, groups=groups)
    check_criterion(criterion)
    layers = planned_layers(spec, mtp)
    check_stats(stats, spec, layers)
    num_groups = quota_groups(spec, groups)
    weights = all_weights(stats.domains, weights or {})
    if weights and not any(weights[name] and stats.tokens.get(name) for name in weights):
        raise InputError(
            "--weights leaves no domain that has tokens; give one of them a weight above 0"
        )
    protect = protected_counts(stats.domains, protect or {}, spec.num_experts, num_groups)
    if criterion == OUTPUT_ERROR:
        check_damage(damage, stats, layers)
        if weights or protect:
            raise InputError(
                f"{OUTPUT_ERROR} measures all tokens alike; leave out weights and protect, or use "
                "another criterion"
            )
    kept: dict[int, tuple[int, ...]] = {}
    dead: dict[int, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    for layer in layers:
        sums = stats.pooled(layer, weights or None)
        if criterion == OUTPUT_ERROR:
            assert damage is not None
            kept[layer], error = least_damaging(damage.layers[layer], keep, num_groups, sums)
            errors[str(layer)] = round(error, 6)
        else:
            scores_E = score_experts(criterion, sums, layer=layer, seed=seed)
            safe = protected_experts(stats, criterion, layer, protect, num_groups, seed)
            check_protected(safe, layer, keep, num_groups, spec.num_experts)
            kept[layer] = best_experts(scores_E, keep, num_groups, safe)
        if sums.dead:
            dead[layer] = sums.dead
    plan = PrunePlan(
        criterion=criterion,
        num_experts=spec.num_experts,
        keep=keep,
        layers=kept,
        groups=groups,
        mtp=mtp,
        seed=seed,
        dead_experts=dead,
        saliency_sha256=stats.digest(),
        model_digest=stats.digests.get("model", ""),
        weights=weights,
        protect=protect,
        evidence={"layer_error": errors} if errors else {},
    )
    plan.validate(spec)
    return plan


def check_damage(damage: DamageStats | None, stats: SaliencyStats, layers: tuple[int, ...]) -> None:
    """InputError unless `damage` is of the same scoring run and has every layer to prune."""
    if damage is None:
        raise InputError(
            f"{OUTPUT_ERROR} needs damage statistics; run thresher score with --damage"
        )
    if damage.saliency_sha256 != stats.digest():
        raise InputError(
            "damage.safetensors is of another scoring run than saliency.safetensors; "
            "score again with --damage"
        )
    missing = sorted(set(layers) - set(damage.layers))
    if missing:
        raise InputError(
            f"no damage statistics are collected for MTP layer {missing[0]}; "
            "use --mtp drop, or another criterion"
        )


def check_stats(stats: SaliencyStats, spec: ModelSpec, layers: tuple[int, ...]) -> None:
    """InputError unless the statistics cover `layers` of this model and nothing foreign."""
    if stats.num_experts != spec.num_experts:
        raise InputError(
            f"the scores are of {stats.num_experts} experts a layer, the model has "
            f"{spec.num_experts}; score this model"
        )
    missing = [layer for layer in layers if layer not in stats.layers]
    if missing and missing[0] in spec.mtp_layers:
        raise InputError(
            f"the scores hold nothing of MTP layer {missing[0]}; score a checkpoint that has "
            "that layer, or use --mtp drop"
        )
    if missing:
        raise InputError(f"the scores hold nothing of layer {missing[0]}; score this model")
    foreign = sorted(set(stats.layers) - {*spec.scored_layers, *spec.mtp_layers})
    if foreign:
        raise InputError(
            f"the scores hold layer {foreign[0]}, which is no scored layer here; score this model"
        )


def _from_json(content: Any, path: str) -> PrunePlan:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}; make the plan again")
    wanted: dict[str, type] = {"criterion": str, "num_experts": int, "keep": int, "layers": dict}
    for key, kind in wanted.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path}: {key} is missing or wrong; make the plan again")
    for key, modes in (("groups", GroupMode), ("mtp", MTPMode)):
        if key in content and content[key] not in get_args(modes):
            raise InputError(
                f"{path}: {key} is {content[key]!r}, known are {', '.join(get_args(modes))}"
            )
    try:
        layers = _expert_lists(content["layers"])
        dead = _expert_lists(content.get("dead_experts", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: layers must map layer numbers to lists of expert ids; make the plan again"
        ) from error
    return PrunePlan(
        criterion=content["criterion"],
        num_experts=content["num_experts"],
        keep=content["keep"],
        layers=layers,
        groups=content.get("groups", "keep"),
        mtp=content.get("mtp", "drop"),
        seed=content.get("seed", 0),
        dead_experts=dead,
        saliency_sha256=content.get("saliency_sha256", ""),
        model_digest=content.get("model_digest", ""),
        weights=content.get("weights", {}),
        protect=content.get("protect", {}),
        evidence=content.get("evidence", {}),
    )


def _expert_lists(lists: dict[str, list[int]]) -> dict[int, tuple[int, ...]]:
    """{"3": [0, 2]} -> {3: (0, 2)}. TypeError or ValueError for anything else."""
    found = {}
    for layer, experts in lists.items():
        if not isinstance(experts, list) or any(type(expert) is not int for expert in experts):
            raise TypeError(layer)
        found[int(layer)] = tuple(experts)
    return found
