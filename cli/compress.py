"""`thresher compress`: score, prune and quantize in one pass over the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.options import (
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
from cli.quantize import chosen_recipe, lines, summary
from cli.token_sets import token_facts, token_set
from models.errors import InputError

if TYPE_CHECKING:
    from calibration.tokens import TokenSet
    from models.opening import OpenModel
    from models.processes import Processes
    from quant.quantize import QuantizeSettings
    from reap.ahead import PruneAhead
    from reap.quotas import GroupMode


@click.command()
@model_argument
@click.option("--keep", type=click.IntRange(min=1), required=True, metavar="N", help="Experts.")
@recipe_options
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
        from quant.quantize import QuantizeSettings, quantize
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
        chosen = chosen_recipe(scheme, recipe, group_size, asymmetric)
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
        settings = QuantizeSettings(
            method=method,
            device=device,
            dtype=dtype,
            memory=None if memory is None else memory // 2,  # for each of the two streams
            batch_tokens=batch_tokens,
            layout=layout,
        )
        ahead, pruned = prune_ahead(
            open_model(model), used, keep, criterion, groups, settings, processes
        )
        manifest = quantize(
            pruned,
            chosen,
            out,
            settings,
            tokens=used,
            inputs=token_facts(used),
            ahead=ahead,
            force=force,
            progress=progress,
            processes=processes,
        )
    if not processes.is_first:
        return
    with stdout_kept(), shown(quiet) as progress:
        report = verify_checkpoint(out, progress=progress)
        facts = {"out": str(out), "keep": keep, **summary(manifest), "verified": report.ok}
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))
    report.demand()


def prune_ahead(
    opened: OpenModel,
    tokens: TokenSet,
    keep: int,
    criterion: str,
    groups: GroupMode,
    settings: QuantizeSettings,
    processes: Processes,
) -> tuple[PruneAhead, OpenModel]:
    """The work that goes before each layer, and the pruned model as it will be."""
    from calibration.batches import BATCH_TOKENS
    from models.opening import OpenModel, compute_device, compute_dtype
    from reap.ahead import PruneAhead
    from reap.plan import PrunePlan
    from reap.pruned_source import PrunedSource
    from reap.score import check_tokens

    check_tokens(opened, tokens)
    plan = PrunePlan(
        criterion=criterion,
        num_experts=opened.spec.num_experts,
        keep=keep,
        layers={layer: tuple(range(keep)) for layer in opened.spec.scored_layers},
        groups=groups,
    )
    source = PrunedSource(opened.source, plan)
    device = compute_device(settings.device)
    ahead = PruneAhead(
        opened=opened,
        source=source,
        tokens=tokens,
        criterion=criterion,
        groups=groups,
        seed=0,
        device=device,
        dtype=compute_dtype(opened.spec, settings.dtype),
        memory=settings.memory,
        batch_tokens=settings.batch_tokens or BATCH_TOKENS[device.type],
        processes=processes,
    )
    return ahead, OpenModel(opened.checkpoint, source.spec, source)
