"""`thresher compare`: two evaluations over the same samples, and how sure their differences are."""

from __future__ import annotations

import json
from typing import Any

import click

from cli.options import json_option, stdout_kept


@click.command()
@click.argument("first", metavar="FIRST", type=click.Path())
@click.argument("second", metavar="SECOND", type=click.Path())
@click.option(
    "--shares",
    is_flag=True,
    help="SECOND is FIRST changed once more (pruned, then rounded too): also say which share of "
    "the KL to the original either step has.",
)
@json_option
def compare(first: str, second: str, shares: bool, as_json: bool) -> None:
    """Differences SECOND - FIRST with 95 % intervals (paired bootstrap over samples).

    FIRST and SECOND are what `thresher eval -o` wrote: a folder, or one of its samples*.jsonl or
    items.jsonl files.
    """
    with stdout_kept():
        from evals.comparison import compare_runs, read_run, shares_of_loss

        runs = read_run(first), read_run(second)
        found = compare_runs(*runs)
        if shares:
            found["shares"] = shares_of_loss(*runs)
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


def lines(found: dict[str, Any]) -> list[str]:
    """The differences as a table; a star where the interval leaves zero out."""
    text = [f"{'':<16}{'':<16}{'first':>12}{'second':>12}{'difference':>12}   95 % interval"]
    for group, figures in found["groups"].items():
        for figure, own in figures.items():
            interval = own["interval"]
            shown = "too few samples"
            if interval is not None:
                sure = "" if interval[0] <= 0 <= interval[1] else " *"
                shown = f"{interval[0]:+.4f} to {interval[1]:+.4f}{sure}"
            text.append(
                f"{group:<16}{figure:<16}{own['first']:>12.4f}{own['second']:>12.4f}"
                f"{own['difference']:>+12.4f}   {shown}"
            )
    for group, own in found.get("shares", {}).items():
        interval = own["interval"]
        shown = "" if interval is None else f" ({interval[0]:+.0%} to {interval[1]:+.0%})"
        text.append(
            f"{group:<16}of a KL of {own['kl']:.4f} the first step has {own['first']:.0%}, "
            f"the second {own['second']:.0%}{shown}"
        )
    if found["left_out"]:
        text.append(f"no {' and '.join(found['left_out'])}: the runs have different references")
    return [*text, f"{found['samples']} samples; * zero lies outside the interval"]
