"""`thresher prune`: a checkpoint with fewer experts, in the source's own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cli.options import (
    ByDomain,
    compute_options,
    force_option,
    json_option,
    model_argument,
    out_option,
    quiet_option,
    stdout_kept,
)
from cli.progress import shown
from models.errors import InputError
from reap.quotas import GroupMode, MTPMode, resolve_keep

if TYPE_CHECKING:
    from models.opening import OpenModel
    from reap.plan import PrunePlan


@click.command()
@model_argument
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="What thresher score wrote.",
)
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Experts a layer to keep.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1),
    metavar="R",
    help="Share of the experts to remove, instead of --keep.",
)
@click.option(
    "--criterion",
    default="reap",
    show_default=True,
    metavar="C",
    help="reap, reap_sum, ean, ean_sum, frequency, router_weight, max_norm, random, output-error, "
    "or auto: of these, the one measured to lose least.",
)
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Held-out token set on which --criterion auto judges.",
)
@click.option(
    "--mtp",
    type=click.Choice(get_args(MTPMode)),
    default="drop",
    show_default=True,
    help="Drop MTP layers, or prune them by their own saliency.",
)
@click.option(
    "--groups",
    type=click.Choice(get_args(GroupMode)),
    default="keep",
    show_default=True,
    help="With group-limited routing: the same number from each group, or one group.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="S",
    help="Seed of the criterion random.",
)
@click.option(
    "--weights",
    type=ByDomain("="),
    metavar="D=W,...",
    help="What a token of each domain counts, e.g. code=2,tools=1; those not named count 1, with 0 "
    "one is left out.",
)
@click.option(
    "--protect",
    type=ByDomain(":"),
    metavar="D:Q,...",
    help="Keep these domains' own best experts: a share of a layer's (code:0.1) or a number "
    "(code:8); all:Q for every domain.",
)
@click.option(
    "--repair",
    metavar="KINDS",
    help="Correct kept experts toward the original's output, by any of scales, down and up, as in "
    "scales,down,up.",
)
@click.option(
    "--repair-tokens",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibration token set of --repair; --device, --dtype, --memory and --batch-tokens are "
    "for it, and for --criterion auto.",
)
@compute_options
@click.option("--plan-only", is_flag=True, help="Write plan.json and no checkpoint.")
@out_option("Folder of the pruned checkpoint.")
@force_option
@json_option
@quiet_option
def prune(
    model: str,
    scores: Path,
    keep: int | None,
    ratio: float | None,
    criterion: str,
    tokens: Path | None,
    mtp: MTPMode,
    groups: GroupMode,
    seed: int,
    weights: dict[str, float] | None,
    protect: dict[str, float] | None,
    repair: str | None,
    repair_tokens: Path | None,
    device: str,
    dtype: str,
    memory: int | None,
    batch_tokens: int | None,
    plan_only: bool,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write MODEL without its least salient experts; kept tensors are copied byte for byte, but
    for experts' projections where --repair asks to correct them.

    Run again with the same arguments after an interruption, it continues and ends with the same
    bytes.
    """
    with stdout_kept(), shown(quiet) as progress:
        from models.checkpoint import load_config
        from models.families import spec_of
        from models.opening import open_model
        from reap.criteria import AUTO, OUTPUT_ERROR, check_criterion
        from reap.damage_file import DAMAGE_FILE, DamageStats
        from reap.plan import make_plan
        from reap.prune import prune_checkpoint
        from reap.stats import SaliencyStats

        # from config.json alone: wrong numbers are refused before anything else is looked at
        resolve_keep(spec_of(load_config(model)), keep=keep, ratio=ratio, groups=groups)
        check_criterion(criterion)
        if (tokens is not None) != (criterion == AUTO):
            raise InputError(
                "--criterion auto judges on held-out tokens, which no other criterion reads; "
                "give --tokens FILE with auto, and only with it"
            )
        if (repair is None) != (repair_tokens is None) or (repair is not None and plan_only):
            raise InputError(
                "--repair corrects the written experts by calibration tokens; give --repair KINDS "
                "and --repair-tokens FILE together, and not with --plan-only"
            )
        stats, opened = SaliencyStats.load(scores), open_model(model)
        asked: dict[str, Any] = {
            "keep": keep,
            "ratio": ratio,
            "mtp": mtp,
            "groups": groups,
            "seed": seed,
        }
        if weights or protect:
            if criterion in (OUTPUT_ERROR, AUTO):
                raise InputError(
                    f"--criterion {criterion} measures all tokens alike; --weights and --protect "
                    "belong to the criteria that rank experts by their sums"
                )
            asked |= {"weights": weights, "protect": protect}
        wants_damage = criterion == OUTPUT_ERROR or (
            criterion == AUTO and (scores / DAMAGE_FILE).exists()
        )
        damage = DamageStats.load(scores) if wants_damage else None
        if tokens is not None:
            from calibration.tokens import TokenSet
            from cli.auto import best_plan
            from evals.fidelity import EvalSettings

            how = EvalSettings(device=device, dtype=dtype, memory=memory, batch_tokens=batch_tokens)
            held_out = TokenSet.load(tokens)
            plan = best_plan(
                stats, damage, opened, held_out, scores, asked, settings=how, progress=progress
            )
        else:
            plan = make_plan(stats, opened.spec, criterion=criterion, damage=damage, **asked)
        check_same_model(plan, opened, scores)
        facts = {"out": str(out), **summary(plan)}
        if plan_only:
            write_plan(plan, out, force)
        else:
            inputs = {
                "scores": str(scores.resolve()),
                "saliency_sha256": plan.saliency_sha256,
                "tokens": stats.digests.get("tokens", ""),
            }
            mending = None
            if repair is not None and repair_tokens is not None:
                from calibration.tokens import TokenSet
                from reap.repair import Repair, RepairSettings
                from reap.repair_fit import repair_kinds

                settings = RepairSettings(
                    kinds=repair_kinds(repair),
                    tokens=TokenSet.load(repair_tokens),
                    device=device,
                    dtype=dtype,
                    memory=memory,
                    batch_tokens=batch_tokens,
                )
                mending = Repair(opened, plan, settings)
            manifest = prune_checkpoint(
                opened.source,
                plan,
                out,
                inputs=inputs,
                repair=mending,
                force=force,
                progress=progress,
            )
            facts["bytes"] = manifest["total_size"]
            if mending is not None:
                facts["repair"] = manifest["repair"]
    click.echo(json.dumps(facts) if as_json else line(facts))


def check_same_model(plan: PrunePlan, opened: OpenModel, scores: Path) -> None:
    """InputError when the scores are of another checkpoint."""
    digest = opened.checkpoint.digest()
    if plan.model_digest and plan.model_digest != digest:
        raise InputError(
            f"{scores} holds scores of another checkpoint (digest {plan.model_digest[:12]}, "
            f"{opened.checkpoint.root} has {digest[:12]}); run thresher score on this one"
        )


def write_plan(plan: PrunePlan, out: Path, force: bool) -> None:
    """OUT/plan.json and nothing else; a different one there is replaced by --force only."""
    file = out / "plan.json"
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if path.name != file.name)
    if others and not force:
        raise InputError(
            f"{out} is not empty ({others[0]!r}); choose another output folder, or use --force "
            "to write plan.json beside what is there"
        )
    if file.exists() and not force:
        from reap.plan import PrunePlan

        if PrunePlan.load(file).to_json() == plan.to_json():
            return
        raise InputError(
            f"{file} is another plan; choose another output folder, or use --force to replace it"
        )
    plan.save(file)


def summary(plan: PrunePlan) -> dict[str, Any]:
    """What the plan does."""
    return {
        "criterion": plan.criterion,
        "num_experts": plan.num_experts,
        "keep": plan.keep,
        "layers": len(plan.layers),
        "groups": plan.groups,
        "mtp": plan.mtp,
        **({"weights": dict(plan.weights)} if plan.weights else {}),
        **({"protect": dict(plan.protect)} if plan.protect else {}),
        "dead": plan.num_dead,
        "dead_kept": plan.num_dead_kept,
    }


def line(facts: dict[str, Any]) -> str:
    """The facts as text."""
    dead = ""
    if facts["dead"]:
        dead = f"; {facts['dead']} experts saw no token, {facts['dead_kept']} of them kept"
    size = f", {facts['bytes'] / 1e9:,.2f} GB" if "bytes" in facts else ", plan only"
    if "repair" in facts:
        layers = facts["repair"]["layers"].values()
        experts = sum(layer["experts"] for layer in layers)
        left = sum(layer["error_left"] for layer in layers) / max(1, len(layers))
        dead += (
            f"; {experts} experts corrected by {', '.join(facts['repair']['repairs'])}, "
            f"{left:.0%} of the layers' error left on their tokens"
        )
    return (
        f"{facts['out']}: {facts['keep']} of {facts['num_experts']} experts kept in "
        f"{facts['layers']} layers by {facts['criterion']}{size}{dead}"
    )
