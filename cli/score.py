"""`thresher score`: saliency of every routed expert, one layer in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import (
    compute_options,
    force_option,
    json_option,
    model_argument,
    out_option,
    quiet_option,
    stdout_kept,
    token_options,
    tokens_option,
)
from cli.progress import shown
from cli.token_sets import token_set

if TYPE_CHECKING:
    from reap.stats import SaliencyStats

TOKENS_FILE = "tokens.safetensors"


@click.command()
@model_argument
@token_options
@tokens_option
@click.option(
    "--pack",
    is_flag=True,
    help="Put samples into rows without padding, each attending to itself alone.",
)
@click.option(
    "--damage",
    is_flag=True,
    help="Also collect what prune --criterion output-error and auto need (damage.safetensors).",
)
@out_option("Folder for saliency.safetensors and saliency.json.")
@compute_options
@force_option
@json_option
@quiet_option
def score(
    model: str,
    mix: str | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    tokens: Path | None,
    pack: bool,
    damage: bool,
    out: Path,
    device: str,
    dtype: str,
    memory: int | None,
    batch_tokens: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Stream tokens through MODEL, one layer resident at a time, and write saliency.

    Run again with the same arguments after an interruption, it continues and ends with the same
    bytes. With --mix the token set is kept in the output folder as tokens.safetensors.
    """
    from models.processes import joined

    with (
        stdout_kept(),
        joined(device) as processes,
        shown(quiet or not processes.is_first) as progress,
    ):
        from reap.damage import SAMPLED_TOKENS
        from reap.score import ScoreSettings
        from reap.score import score as score_experts

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
        settings = ScoreSettings(
            device=device,
            dtype=dtype,
            memory=memory,
            batch_tokens=batch_tokens,
            pack=pack,
            damage_tokens=SAMPLED_TOKENS if damage else 0,
        )
        stats = score_experts(
            model, used, out, settings, force=force, progress=progress, processes=processes
        )
        if not processes.is_first:
            return
        kept = out / TOKENS_FILE  # a forced job leaves the former one's
        if mix is not None and not (kept.exists() and kept.read_bytes() == used.to_bytes()):
            used.save(kept)
        facts = {"out": str(out), **summary(stats)}
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


def summary(stats: SaliencyStats) -> dict[str, Any]:
    """What was scored; `dead` are experts that no token reached, by layer."""
    dead = {str(layer): len(stats.pooled(layer).dead) for layer in sorted(stats.layers)}
    return {
        "layers": sorted(stats.layers),
        "tokens": sum(stats.tokens.values()),
        "tokens_by_domain": dict(stats.tokens),
        "dead": {layer: count for layer, count in dead.items() if count},
        "sha256": stats.digest(),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    layers, dead = facts["layers"], facts["dead"]
    text = [
        f"{facts['out']}: {len(layers)} layers ({layers[0]} to {layers[-1]}) scored on "
        f"{facts['tokens']:,} tokens",
        *(f"  {name:<16}{count:>14,}" for name, count in facts["tokens_by_domain"].items()),
    ]
    if dead:
        worst = max(dead, key=lambda layer: dead[layer])
        text.append(
            f"no token reached {sum(dead.values())} experts in {len(dead)} layers "
            f"(most in layer {worst}: {dead[worst]}); more or other tokens may"
        )
    return [*text, f"saliency.safetensors sha256 {facts['sha256']}"]
