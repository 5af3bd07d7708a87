"""`thresher quantize`: a model with fewer bits, one layer in memory, verified at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.budget import Budget, budget_lines, budget_of, budget_recipe, checked_menu
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
from cli.token_sets import token_facts, token_set
from models.errors import InputError

if TYPE_CHECKING:
    from quant.recipes import Recipe


@click.command()
@model_argument
@recipe_options
@budget_options
@click.option("--dry-run", is_flag=True, help="With --budget: measure, write the recipe, stop.")
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn", "awq", "autoround"]),
    default="gptq",
    show_default=True,
    help="How codes are chosen; rtn needs no tokens. awq and autoround are llm-compressor's and "
    "hold the whole model in memory.",
)
@storage_options
@click.option(
    "--propagate",
    type=click.Choice(["compressed", "original"]),
    default="compressed",
    show_default=True,
    help="Whose hidden states later layers are rounded on.",
)
@token_options
@tokens_option
@out_option("Folder of the quantized checkpoint.")
@compute_options
@force_option
@json_option
@quiet_option
def quantize(
    model: str,
    scheme: str | None,
    recipe: Path | None,
    budget: int | None,
    schemes: str,
    damage_folder: Path | None,
    damage_tokens: int,
    dry_run: bool,
    method: Literal["gptq", "rtn", "awq", "autoround"],
    layout: Literal["compressed-tensors", "auto-round", "gptq", "modelopt"],
    group_size: int | None,
    asymmetric: bool,
    propagate: Literal["compressed", "original"],
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
    """Write MODEL as a compressed-tensors checkpoint, rounded layer by layer, and verify it.

    Run again with the same arguments after an interruption, it continues and ends with the same
    bytes. Formats FP8_BLOCK, FP8_DYNAMIC and NVFP4A16 by rtn need no tokens.
    """
    from models.processes import joined

    with (
        stdout_kept(),
        joined(device) as processes,
        shown(quiet or not processes.is_first) as progress,
    ):
        from models.opening import open_model
        from quant.quantize import quantize as quantize_model
        from quant.quantize_plan import QuantizeSettings, meet
        from quant.verify import verify_checkpoint
        from quant.whole_model import quantize_whole

        asked = asked_bits(
            scheme, recipe, budget, schemes, damage_folder, damage_tokens, group_size, asymmetric
        )
        budgeted = isinstance(asked, Budget)
        whole = method == "awq" or method == "autoround"
        if whole and (layout != "compressed-tensors" or propagate != "compressed" or budgeted):
            raise InputError(f"--method {method} takes neither --format, --propagate nor --budget")
        if whole and processes.size > 1:
            raise InputError(f"--method {method} works in one process; start it alone")
        if dry_run and not budgeted:
            raise InputError("--dry-run shows what --budget chooses; give --budget SIZE")
        opened = open_model(model)
        settings = QuantizeSettings(
            method="rtn" if method == "rtn" else "gptq",
            propagate=propagate,
            device=device,
            dtype=dtype,
            memory=memory,
            batch_tokens=batch_tokens,
            layout=layout,
        )
        menu = None
        if isinstance(asked, Budget):
            menu = checked_menu(opened, asked, settings, processes)
        else:
            meet(opened, asked)
        used = None
        if tokens is not None or mix is not None:
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
        inputs = {} if used is None else token_facts(used)
        facts: dict[str, Any] = {"out": str(out)}
        if isinstance(asked, Budget):
            assert menu is not None
            chosen, facts["budget"] = budget_recipe(
                asked, menu, opened, used, out, settings, force, progress
            )
            inputs["budget"] = facts["budget"]
        else:
            chosen = asked
        if method == "awq" or method == "autoround":
            manifest = quantize_whole(
                opened, chosen, out, method, tokens=used, inputs=inputs, force=force
            )
        elif not dry_run:
            manifest = quantize_model(
                opened,
                chosen,
                out,
                settings,
                tokens=used,
                inputs=inputs,
                force=force,
                progress=progress,
                processes=processes,
            )
    if not processes.is_first:
        return
    if not dry_run:
        with stdout_kept(), shown(quiet) as progress:
            # AWQ moves factors between norms and matrices: no tensor is to be the source's
            source = None if method == "awq" else model
            report = verify_checkpoint(out, source, progress=progress, device=device)
            facts |= {**summary(manifest), "verified": report.ok}
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))
    if not dry_run:
        report.demand()


def asked_bits(
    scheme: str | None,
    recipe: Path | None,
    budget: int | None,
    schemes: str,
    damage_folder: Path | None,
    damage_tokens: int,
    group_size: int | None,
    asymmetric: bool,
) -> Recipe | Budget:
    """What exactly one of --scheme, --recipe and --budget asks for."""
    from quant.recipe_files import load_recipe
    from quant.recipes import uniform
    from quant.schemes import scheme_with

    if sum(one is not None for one in (scheme, recipe, budget)) != 1:
        raise InputError(
            "say once what to write: with --scheme S, with --recipe FILE, or with --budget SIZE"
        )
    if budget is not None:
        return budget_of(budget, schemes, damage_folder, damage_tokens, group_size, asymmetric)
    if recipe is not None:
        if group_size is not None or asymmetric:
            raise InputError("--group-size and --asymmetric belong to --scheme; edit the recipe")
        return load_recipe(recipe)
    assert scheme is not None
    return uniform(
        scheme_with(scheme, group_size=group_size, symmetric=False if asymmetric else None)
    )


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What was rounded, from the manifest."""
    units = manifest["rounding"].values()
    return {
        "bytes": manifest["total_size"],
        "matrices": sum(unit["matrices"] for unit in units),
        "experts_without_tokens": sum(unit["without_tokens"] for unit in units),
        "experts_with_few_tokens": sum(unit["few_tokens"] for unit in units),
        "fell_back": [name for unit in units for name in unit["fell_back"]],
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    text = budget_lines(facts["budget"]) if "budget" in facts else []
    if "verified" not in facts:
        return text
    text.append(f"{facts['out']}: {facts['matrices']:,} matrices, {facts['bytes'] / 1e9:,.3f} GB")
    if facts["experts_without_tokens"] or facts["experts_with_few_tokens"]:
        text.append(
            f"{facts['experts_without_tokens']} experts saw no token and "
            f"{facts['experts_with_few_tokens']} few; they lean on their layer's pooled inputs"
        )
    if facts["fell_back"]:
        text.append(
            f"{len(facts['fell_back'])} matrices were rounded to nearest because their Hessian "
            f"could not be factorised (first: {facts['fell_back'][0]})"
        )
    return [*text, "verified" if facts["verified"] else "VERIFICATION FAILED"]
