"""`thresher compress`: score, prune and quantize in one pass over the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.budget import Budget, budget_recipe, checked_menu
from cli.options import (
    budget_options,
    compute_options,
    force_option,
    json_option,
    model_argument,
    out_option,
    quiet_option,
    recipe_options,
    stdout_kept,
    storage_options,
    token_options,
    tokens_option,
)
from cli.progress import shown
from cli.quantize import asked_bits, lines, summary
from cli.token_sets import token_facts, token_set
from models.errors import InputError

if TYPE_CHECKING:
    from calibration.tokens import TokenSet
    from models.opening import OpenModel
    from models.processes import Processes
    from quant.quantize_plan import QuantizeSettings
    from reap.ahead import PruneAhead
    from reap.quotas import GroupMode


@click.command()
@model_argument
@click.option("--keep", type=click.IntRange(min=1), required=True, metavar="N", help="Experts.")
@recipe_options
@budget_options
@click.option("--criterion", default="reap", show_default=True, metavar="C")
@click.option("--groups", type=click.Choice(["keep", "flatten"]), default="keep", show_default=True)
@click.option("--method", type=click.Choice(["gptq", "rtn"]), default="gptq", show_default=True)
@storage_options
@token_options
@tokens_option
@out_option("Folder of the compressed checkpoint.")
@compute_options
@force_option
@json_option
@quiet_option
def compress(
    model: str,
    keep: int,
    scheme: str | None,
    recipe: Path | None,
    budget: int | None,
    schemes: str,
    damage_folder: Path | None,
    damage_tokens: int,
    criterion: str,
    groups: GroupMode,
    method: Literal["gptq", "rtn"],
    layout: Literal["compressed-tensors", "auto-round", "gptq", "modelopt"],
    group_size: int | None,
    asymmetric: bool,
    mix: str | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    tokens: Path | None,
    out: Path,
    device: str,
    dtype: str,
    memory: int | None,
    batch_tokens: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score MODEL, keep N experts a layer and write them quantized, without a model in between.

    The kept experts and the bytes are those of score, prune and quantize run one after another
    on the same tokens. MTP layers are dropped.
    """
    from models.processes import joined

    with (
        stdout_kept(),
        joined(device) as processes,
        shown(quiet or not processes.is_first) as progress,
    ):
        from models.checkpoint import load_config
        from models.families import spec_of
        from models.opening import open_model
        from quant.quantize import quantize
        from quant.quantize_plan import QuantizeSettings, meet
        from quant.verify import verify_checkpoint
        from reap.criteria import AUTO, check_criterion
        from reap.quotas import resolve_keep

        check_criterion(criterion)
        if criterion == AUTO:
            raise InputError(
                "auto judges whole pruned models, compress chooses layer by layer; "
                "run score, prune and quantize one after another"
            )
        resolve_keep(spec_of(load_config(model)), keep=keep, ratio=None, groups=groups)
        asked = asked_bits(
            scheme, recipe, budget, schemes, damage_folder, damage_tokens, group_size, asymmetric
        )
        settings = QuantizeSettings(
            method=method,
            device=device,
            dtype=dtype,
            memory=None if memory is None else memory // 2,  # for each of the two streams
            batch_tokens=batch_tokens,
            layout=layout,
        )
        opened = open_model(model)
        pruned = still_unpruned(opened, keep, criterion, groups)
        menu = None
        if isinstance(asked, Budget):
            menu = checked_menu(pruned, asked, settings, processes)
        else:
            meet(pruned, asked)
        used = processes.from_first(
            lambda: token_set(
                model,
                tokens=tokens,
                mix=mix,
                samples=samples,
                max_length=max_length,
                seed=seed,
                progress=progress,
            )
        )
        inputs = token_facts(used)
        ahead = prune_ahead(opened, pruned, used, settings, processes)
        if isinstance(asked, Budget):
            assert menu is not None
            chosen, inputs["budget"] = budget_recipe(
                asked, menu, opened, used, out, settings, force, progress
            )
        else:
            chosen = asked
        manifest = quantize(
            pruned,
            chosen,
            out,
            settings,
            tokens=used,
            inputs=inputs,
            ahead=ahead,
            force=force,
            progress=progress,
            processes=processes,
        )
    if not processes.is_first:
        return
    with stdout_kept(), shown(quiet) as progress:
        report = verify_checkpoint(out, progress=progress, device=device)
        facts = {"out": str(out), "keep": keep, **summary(manifest), "verified": report.ok}
        if "budget" in inputs:
            facts["budget"] = inputs["budget"]
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))
    report.demand()


def still_unpruned(opened: OpenModel, keep: int, criterion: str, groups: GroupMode) -> OpenModel:
    """The pruned model as it will be, its kept experts still to be chosen."""
    from models.opening import OpenModel
    from reap.plan import PrunePlan
    from reap.pruned_source import PrunedSource

    plan = PrunePlan(
        criterion=criterion,
        num_experts=opened.spec.num_experts,
        keep=keep,
        layers={layer: tuple(range(keep)) for layer in opened.spec.scored_layers},
        groups=groups,
    )
    source = PrunedSource(opened.source, plan)
    return OpenModel(opened.checkpoint, source.spec, source)


def prune_ahead(
    opened: OpenModel,
    pruned: OpenModel,
    tokens: TokenSet,
    settings: QuantizeSettings,
    processes: Processes,
) -> PruneAhead:
    """The work that goes before each layer; it fills `pruned` (of `still_unpruned`)."""
    from calibration.batches import BATCH_TOKENS
    from models.opening import compute_device, compute_dtype
    from reap.ahead import PruneAhead
    from reap.pruned_source import PrunedSource
    from reap.score import check_tokens

    check_tokens(opened, tokens)
    assert isinstance(pruned.source, PrunedSource)
    plan = pruned.source.plan
    device = compute_device(settings.device)
    return PruneAhead(
        opened=opened,
        source=pruned.source,
        tokens=tokens,
        criterion=plan.criterion,
        groups=plan.groups,
        seed=0,
        device=device,
        dtype=compute_dtype(opened.spec, settings.dtype),
        memory=settings.memory,
        batch_tokens=settings.batch_tokens or BATCH_TOKENS[device.type],
        processes=processes,
    )
