"""What is on record about a checkpoint: manifests, plan, saliency, evaluations, tasks.

    OUT/thresher.json ── source.path ──► its thresher.json ── ... ──► the base model
          │ inputs.scores ──► saliency.json
    evaluation folders: found by the digest of the checkpoint that they judged, never by a name

The model card and the report are made of this and of nothing else: a figure that no file holds is
"not measured". A folder on the way that was moved or changed (its digest differs) ends the chain
there instead of lending its facts to another checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.by_layer import RESULT_FILE
from evals.fidelity import REFERENCE
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.families import spec_of
from models.inventory import take
from models.journal import MANIFEST, read_object
from models.model_spec import ModelSpec
from reap.plan import PrunePlan
from reap.stats import SaliencyStats

BY_LAYER = Path("by-layer") / RESULT_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A checkpoint's own numbers, from its config and headers."""

    family: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden_size: int
    context: int | None
    total: int  # parameters
    active: int
    num_bytes: int
    counted_bytes: int  # of what `total` counts
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One checkpoint's streaming evaluation: the result and what it was run on."""

    name: str
    path: str
    digest: str
    result: dict[str, Any]
    tokens: dict[str, Any]
    tokens_digest: str
    reference: dict[str, Any]  # path and digest of the model it was compared with; may be empty
    folder: Path
    own: bool  # of the checkpoint in question, not of a variant

    def like(self, other: Judged) -> bool:
        """Whether both were judged on the same tokens and against the same model."""
        return (self.tokens_digest, self.reference.get("digest")) == (
            other.tokens_digest, other.reference.get("digest"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything on record about the checkpoint in `folder`."""

    folder: Path
    manifest: dict[str, Any]
    facts: Facts
    steps: tuple[dict[str, Any], ...]  # manifests, the last step first
    base_path: str
    base_digest: str
    base: Facts | None
    plan: PrunePlan | None
    saliency: SaliencyStats | None
    calibration: dict[str, Any] | None
    calibrated_on: frozenset[str]  # digests of all token sets that shaped it
    judged: tuple[Judged, ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()
    by_layer: dict[str, Any] | None = None
    licences: tuple[str, ...] = field(default=())

    @property
    def fidelity(self) -> Judged | None:
        """The checkpoint's own streaming evaluation."""
        return next((one for one in self.judged if one.own), None)

    @property
    def recipe(self) -> list[dict[str, Any]] | None:
        """The quantization recipe's rules, None where nothing was quantized."""
        return next((step["recipe"] for step in self.steps if "recipe" in step), None)

    @property
    def rounding(self) -> dict[str, Any]:
        """What quantization recorded by unit."""
        return next((step["rounding"] for step in self.steps if "rounding" in step), {})

    @property
    def repair(self) -> dict[str, Any] | None:
        """What was corrected in kept experts after pruning, None where nothing was."""
        return next((step["repair"] for step in self.steps if "repair" in step), None)

    def other_reference(self, one: Judged) -> str | None:
        """Name of the model that `one` was compared with where that is not the base model."""
        if not one.reference or one.reference["digest"] == self.base_digest:
            return None
        return Path(one.reference["path"]).name

    def held_out(self, one: Judged) -> bool | None:
        """Whether the tokens of `one` are none that shaped the checkpoint; None: not known."""
        if not self.calibrated_on or not one.tokens_digest:
            return None
        return one.tokens_digest not in self.calibrated_on


def gather(
    checkpoint: str | Path,
    *,
    evaluations: Sequence[Path] = (),
    scores: Path | None = None,
) -> Evidence:
    """All evidence about a checkpoint that one of our jobs wrote.

    `evaluations` are folders of `thresher eval -o`; `scores` overrides where saliency lies.
    Raises InputError for a folder without a manifest, and for evaluations or scores of something
    else.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder of a written checkpoint")
    manifest = read_object(folder / MANIFEST)
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST}; a card is made of what prune, quantize or compress "
            "recorded there"
        )
    opened = Checkpoint.open(folder)
    steps, base_path = chain(folder, manifest)
    plan = plan_of(folder, steps)
    found_scores = scores or scores_of(steps)
    saliency = None
    if scores is not None or (found_scores and (found_scores / "saliency.json").is_file()):
        assert found_scores is not None
        saliency = SaliencyStats.load(found_scores)
        if plan is not None and saliency.digest() != plan.saliency_sha256:
            if scores is not None:
                raise InputError(
                    f"{scores} holds other scores than {folder} was pruned by (by digest); give "
                    "the folder that thresher prune read"
                )
            saliency, found_scores = None, None
    judged = tuple(one for path in evaluations for one in evaluations_in(path, opened.digest()))
    if evaluations and not any(one.own for one in judged) and not any_tasks(evaluations):
        raise InputError(
            f"none of {', '.join(map(str, evaluations))} judged {folder} as it is now (by digest); "
            "evaluate this checkpoint"
        )
    return Evidence(
        folder=folder,
        manifest=manifest,
        facts=facts_of(folder),
        steps=steps,
        base_path=base_path,
        base_digest=str((steps[-1].get("source") or {}).get("digest", "")),
        base=facts_of(Path(base_path)) if (Path(base_path) / "config.json").is_file() else None,
        plan=plan,
        saliency=saliency,
        calibration=calibration_of(steps, found_scores),
        calibrated_on=frozenset(calibrated_on(steps, saliency)),
        judged=judged,
        tasks=tuple(task for path in evaluations for task in tasks_in(path, opened.digest())),
        by_layer=damage_in(evaluations, opened.digest()),
        licences=tuple(sorted(licence_files(folder))),
    )


def chain(folder: Path, manifest: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], str]:
    """Manifests from the last step to the first, and the path of the base model."""
    steps, seen = [manifest], {folder.resolve()}
    while True:
        source = steps[-1].get("source") or {}
        path = str(source.get("path", ""))
        earlier = read_object(Path(path) / MANIFEST) if path else None
        if earlier is None or Path(path).resolve() in seen:
            return tuple(steps), path
        if Checkpoint.open(path).digest() != source.get("digest"):
            return tuple(steps), path  # another checkpoint lies there now
        seen.add(Path(path).resolve())
        steps.append(earlier)


def plan_of(folder: Path, steps: Sequence[dict[str, Any]]) -> PrunePlan | None:
    """The prune plan, from this folder or that of the step which pruned."""
    folders = [folder, *(Path(str((s.get("source") or {}).get("path", ""))) for s in steps)]
    for place in folders[: len(steps)]:
        if (place / "plan.json").is_file():
            return PrunePlan.load(place / "plan.json")
    return None


def scores_of(steps: Sequence[dict[str, Any]]) -> Path | None:
    """Where the pruning step read its scores."""
    for step in steps:
        path = (step.get("inputs") or {}).get("scores")
        if path:
            return Path(str(path))
    return None


def calibration_of(steps: Sequence[dict[str, Any]], scores: Path | None) -> dict[str, Any] | None:
    """{mix, seed, by_domain: {domain: {samples, tokens}}, report} of the calibration tokens."""
    if scores is not None:
        found = (read_object(scores / MANIFEST) or {}).get("tokens")
        if isinstance(found, dict) and "by_domain" in found:
            return {"report": [], **found}
    for step in steps:
        inputs = step.get("inputs") or {}
        if isinstance(inputs.get("tokens"), dict):
            return {
                "mix": inputs.get("mix"),
                "seed": inputs.get("seed"),
                "by_domain": inputs["tokens"],
                "report": inputs.get("report") or [],
            }
    return None


def calibrated_on(steps: Sequence[dict[str, Any]], saliency: SaliencyStats | None) -> Iterator[str]:
    """Digests of the tokens that experts were scored, corrected or rounded by."""
    found = [saliency.digests.get("tokens")] if saliency is not None else []
    for step in steps:
        job = step.get("job") or {}
        found += [
            (step.get("inputs") or {}).get("tokens"),
            job.get("tokens"),
            job.get("score_tokens"),
            (job.get("repair") or {}).get("tokens"),
        ]
    for digest in found:
        if isinstance(digest, str) and digest:
            yield from digest.split("+")  # of scores that were added


def evaluations_in(folder: Path, digest: str) -> Iterator[Judged]:
    """The streaming evaluations of a folder; those of `digest` are the checkpoint's own."""
    result = read_object(folder / "evaluation.json")
    manifest = read_object(folder / MANIFEST)
    if result is None:
        if not any_tasks([folder]) and read_object(folder / BY_LAYER) is None:
            raise InputError(f"{folder} holds no evaluation; run `thresher eval ... -o {folder}`")
        return
    if manifest is None or "models" not in manifest:
        raise InputError(f"{folder}/{MANIFEST} is missing; run `thresher eval` again")
    models = {name: own for name, own in manifest["models"].items() if name != REFERENCE}
    for name, own in models.items():
        yield Judged(
            name=name,
            path=own["path"],
            digest=own["digest"],
            result=result if list(models) == ["model"] else result[name],
            tokens=manifest.get("tokens") or {},
            tokens_digest=str((manifest.get("job") or {}).get("tokens", "")),
            reference=manifest["models"].get(REFERENCE) or {},
            folder=folder,
            own=own["digest"] == digest,
        )


def damage_in(folders: Sequence[Path], digest: str) -> dict[str, Any] | None:
    """What `thresher eval --by-layer` measured of this checkpoint."""
    found = (read_object(folder / BY_LAYER) for folder in folders)
    return next((own for own in found if own and own.get("model_digest") == digest), None)


def any_tasks(folders: Sequence[Path]) -> bool:
    """Whether some task's result is among the folders."""
    return any(True for folder in folders for _ in folder.glob("tasks/*/result.json"))


def tasks_in(folder: Path, digest: str) -> Iterator[dict[str, Any]]:
    """Results of tasks in a folder; "own": of this checkpoint, not of some server's model."""
    for file in sorted(folder.glob("tasks/*/result.json")):
        result = read_object(file)
        if result is not None:
            yield {**result, "own": result.get("model_digest") == digest}


def licence_files(folder: Path) -> Iterator[str]:
    """Names of licence and notice files in a folder."""
    for path in folder.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            yield path.name


def is_extra(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of an MTP layer or of vision, which parameters are not counted of."""
    place = spec.place(name)
    return place.kind in ("mtp", "vision") or (place.layer or 0) >= spec.num_layers


def facts_of(folder: Path) -> Facts:
    """A checkpoint's numbers. Parameters are counted, MTP layers and vision left out."""
    from models.sizes import storage

    opened = Checkpoint.open(folder)
    spec = spec_of(opened.config)
    inventory = take(spec)
    context = spec.text.get("max_position_embeddings")
    return Facts(
        family=spec.architecture.title,
        layers=spec.num_layers,
        moe_layers=len(spec.moe_layers),
        experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        context=context if isinstance(context, int) else None,
        total=inventory.total,
        active=inventory.active,
        num_bytes=sum(info.nbytes for info in opened.tensors.values()),
        counted_bytes=sum(
            info.nbytes for name, info in opened.tensors.items() if not is_extra(spec, name)
        ),
        precision=storage(opened.config, spec.text).title,
    )
