"""`thresher inspect`: what a model is and needs, before anything is downloaded or loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_args

import click

from cli.options import json_option, model_argument, stdout_kept
from models.machines import MACHINES, Machine
from models.sizes import SCHEMES
from reap.quotas import GroupMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.inventory import Inventory
    from models.needs import Need


@click.command()
@model_argument
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Experts a layer to keep.")
@click.option(
    "--groups",
    type=click.Choice(get_args(GroupMode)),
    default="keep",
    show_default=True,
    help="How --keep treats group-limited routing.",
)
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="Number format to quantize to.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=32768,
    show_default=True,
    metavar="T",
    help="Tokens of KV cache to serve with.",
)
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask whether N GPUs can share the model (tensor parallelism).",
)
@click.option(
    "--machine",
    type=click.Choice(list(MACHINES)),
    default="h200",
    show_default=True,
    help="Machine whose measured rates the jobs' times are projected from.",
)
@click.option(
    "--disk",
    type=click.FloatRange(min=0.01),
    metavar="GB/S",
    help="Rate of the disk, reading and writing, instead of that machine's own.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens the jobs are projected for.  [default: 2,785,280]",
)
@json_option
def inspect(
    model: str,
    keep: int | None,
    groups: GroupMode,
    scheme: str | None,
    context: int,
    tp: int | None,
    machine: str,
    disk: float | None,
    calibration_tokens: int | None,
    as_json: bool,
) -> None:
    """Parameters, bytes, memory to serve and needs of the jobs, from the config alone.

    Nothing is loaded; the index or the headers, where they are there, refine the bytes.
    """
    with stdout_kept():
        on = MACHINES[machine]
        if disk is not None:
            title, rate = f"{on.title}, here {disk:g} GB/s", disk * 1e9
            on = replace(on, title=title, read_bytes=rate, write_bytes=rate)
        facts = gather(model, keep, groups, scheme, context, on, calibration_tokens)
        if tp is not None:
            facts["tensor_parallel"] = shared(model, scheme, tp)
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


def gather(
    model: str,
    keep: int | None,
    groups: GroupMode,
    scheme: str | None,
    context: int,
    machine: Machine,
    calibration_tokens: int | None,
) -> dict[str, Any]:
    """Everything that is printed, as one JSON object."""
    from models.checkpoint import load_config
    from models.families import spec_of
    from models.inventory import take
    from models.listing import find_listing
    from models.needs import CALIBRATION_TOKENS, needs
    from models.serving import RESERVE, cache_bytes, caches, fitting
    from models.sizes import bytes_in, quantized, storage
    from reap.quotas import check_keep

    config = load_config(model)
    spec = spec_of(config)
    if keep is not None:
        check_keep(spec, keep, groups)
    before, form = take(spec), storage(config, spec.text)
    listing = find_listing(model, spec)
    mtp_bytes = bytes_in(before, form, mtp=True) - bytes_in(before, form)
    main_bytes = bytes_in(before, form)
    if listing is not None:
        mtp_bytes = mtp_bytes if listing.mtp_bytes is None else listing.mtp_bytes
        main_bytes = listing.num_bytes - mtp_bytes
    has_mtp = spec.num_mtp_layers > 0 if listing is None else listing.mtp
    after = before if keep is None else before.keep(keep)
    goal = form if scheme is None else quantized(scheme)
    # what the config cannot know (a vision tower) is taken to be cut in proportion
    scale = main_bytes / bytes_in(before, form) if scheme is None else 1.0
    served = round(bytes_in(after, goal) * scale)
    kept_mtp = 0 if keep is not None or not has_mtp else mtp_bytes
    if kept_mtp and scheme is not None:
        # what the config cannot know (MTP layers that are not numbered) is carried as it is
        now, then = (bytes_in(before, f, mtp=True) - bytes_in(before, f) for f in (form, goal))
        kept_mtp += then - now
    tokens = calibration_tokens or CALIBRATION_TOKENS
    layers = caches(after)
    cache = cache_bytes(layers, context)
    return {
        "model": model,
        "family": spec.family,
        "title": spec.architecture.title,
        "model_type": config["model_type"],
        "source": "config" if listing is None else listing.origin,
        "layers": spec.num_layers,
        "moe_layers": len(spec.moe_layers),
        "hash_layers": len(spec.hash_layers),
        "mtp_layers": spec.num_mtp_layers if has_mtp else 0,
        "experts": spec.num_experts,
        "top_k": spec.top_k,
        "groups": spec.num_groups,
        "topk_groups": spec.topk_groups,
        "parameters": {
            "total": before.total,
            "active": before.active,
            "routed_experts": before.routed,
            "mtp": (before.mtp or None) if has_mtp else 0,  # None: not told by the config
        },
        "precision": form.title,
        "bytes": main_bytes + mtp_bytes,
        "after": {
            "keep": spec.num_experts if keep is None else keep,
            "scheme": scheme,
            "parameters": {"total": after.total, "active": after.active},
            "bytes": served + kept_mtp,
            "refused": None if scheme is None else refusal(after, scheme),
        },
        "serving": {
            "context": context,
            "weights": served,
            "kv_cache": cache,
            "reserve": RESERVE,
            "bytes": served + cache + RESERVE,
            "gpus": [
                {"gpu": name, "count": count} for name, count in fitting(served, layers, context)
            ],
        },
        "jobs": projected(tokens, machine, needs(before, form, after, goal, machine, tokens)),
    }


def refusal(inventory: Inventory, scheme: str) -> str | None:
    """Why `quantize --scheme` will not take the model, None where it will."""
    from models.sizes import unfit

    weight = unfit(inventory, scheme)
    if weight is None:
        return None
    where = weight.path if weight.layer is None else f"layers.{weight.layer}.{weight.path}"
    return (
        f"{where} has K = {weight.shape[1]}, no whole number of {SCHEMES[scheme].block[1]}: "
        f"quantize --scheme {scheme} will refuse it"
    )


def projected(tokens: int, machine: Machine, jobs: Mapping[str, Need]) -> dict[str, Any]:
    """What the jobs will need."""
    return {
        "hardware": machine.title,
        "tokens": tokens,
        **{
            name: {
                "device_memory": need.device,
                "host_memory": need.host,
                "disk": need.disk,
                "spill": need.spill,
                "seconds": round(need.seconds),
            }
            for name, need in jobs.items()
        },
    }


def shared(model: str, scheme: str | None, tp: int) -> dict[str, Any]:
    """Whether `tp` GPUs can share the model in a scheme (None: as it is)."""
    from models.checkpoint import load_config
    from models.families import spec_of
    from models.source_formats import quantization_config
    from models.tensor_parallel import GROUPS, findings, group_of

    spec = spec_of(load_config(model))
    group = group_of(quantization_config(spec)) if scheme is None else GROUPS.get(scheme, 1)
    found = list(findings(spec, tp, group))
    return {"gpus": tp, "possible": not found, "findings": found}


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    parameters, after, serving = facts["parameters"], facts["after"], facts["serving"]
    experts = f"{facts['experts']} experts, {facts['top_k']} a token"
    if facts["groups"] > 1:
        experts += f", from {facts['topk_groups']} of {facts['groups']} groups"
    layers = f"{facts['layers']}, {facts['moe_layers']} with experts"
    if facts["hash_layers"]:
        layers += f" ({facts['hash_layers']} routed by token id, never pruned)"
    if facts["mtp_layers"]:
        size = parameters["mtp"]
        layers += f"; and {facts['mtp_layers']} MTP" + (f" ({billions(size)})" if size else "")
    cut = after["keep"] != facts["experts"]
    change = [f"{after['keep']} experts"] if cut else []
    change += [after["scheme"]] if after["scheme"] else []
    text = [
        f"{facts['model']}: {facts['title']} ({facts['model_type']})",
        "",
        f"layers        {layers}",
        f"experts       {experts}",
        f"parameters    {billions(parameters['total'])}, {billions(parameters['active'])} active",
        f"on disk       {gigabytes(facts['bytes'])}, {facts['precision']} "
        f"(from the {facts['source']})",
    ]
    if change:
        total, active = after["parameters"]["total"], after["parameters"]["active"]
        text += [
            "",
            f"with {' and '.join(change)}"
            + (", MTP layers dropped" if facts["mtp_layers"] and cut else ""),
            f"parameters    {billions(total)}, {billions(active)} active",
            f"on disk       {gigabytes(after['bytes'])}",
        ]
        text += [f"warning       {after['refused']}"] if after["refused"] else []
    text += [
        "",
        f"to serve      {gigabytes(serving['bytes'])}: weights {gigabytes(serving['weights'])}, "
        f"KV cache {gigabytes(serving['kv_cache'])} for {serving['context']:,} tokens, "
        f"reserve {gigabytes(serving['reserve'])}",
    ]
    text += [
        f"  {entry['gpu']:<28}" + (f"{entry['count']}" if entry["count"] else "more than 8")
        for entry in serving["gpus"]
    ]
    if "tensor_parallel" in facts:
        asked = facts["tensor_parallel"]
        verdict = "yes" if asked["possible"] else "; ".join(asked["findings"])
        text += ["", f"shared by {asked['gpus']} GPUs: {verdict}"]
    return text + job_lines(facts["jobs"])


def job_lines(jobs: dict[str, Any]) -> list[str]:
    """The jobs' needs as a small table."""
    text = [
        "",
        f"jobs, projected for {jobs['hardware']}, {jobs['tokens']:,} calibration tokens",
        f"  {'':<10}{'GPU':>10}{'host':>10}{'disk':>10}{'spill*':>10}{'time':>12}",
    ]
    for name in ("score", "prune", "quantize", "compress"):
        job = jobs[name]
        sizes = (job["device_memory"], job["host_memory"], job["disk"], job["spill"])
        cells = "".join(f"{gigabytes(size) if size else '-':>10}" for size in sizes)
        text.append(f"  {name:<10}{cells}{timedelta(seconds=job['seconds'])!s:>12}")
    return [
        *text,
        "  * hidden states, which --memory moves from host memory to disk; saved there as well,",
        "    from time to time and where there is room, so that a job that is killed goes on",
    ]


def billions(count: int) -> str:
    """671.9B, or millions below one billion."""
    return f"{count / 1e9:,.1f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"


def gigabytes(size: int) -> str:
    """689.5 GB, or smaller units below one."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:,.1f} kB"
