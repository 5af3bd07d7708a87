"""`thresher tokens`: build a token set, and one to judge on that shares nothing with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import (
    force_option,
    json_option,
    model_argument,
    out_option,
    quiet_option,
    stdout_kept,
    token_options,
)
from cli.progress import shown
from cli.token_sets import built_from_mix
from models.errors import InputError

if TYPE_CHECKING:
    from calibration.token_report import SetReport
    from calibration.tokens import TokenSet

BLOCKS = " ▁▂▃▄▅▆▇█"
TERMINAL_CHARACTERS = 600  # of a sample


@click.command()
@model_argument
@token_options
@click.option(
    "--balance",
    type=click.Choice(["rows", "tokens", "domains"]),
    help="What the mix's numbers are shares of: rows (the usual), tokens, or tokens with the same "
    "share for every domain.",
)
@click.option(
    "--truncate",
    type=click.Choice(["tail", "middle", "cut"]),
    help="What goes where a sample is too long: whole messages at the end (the usual) or in the "
    "middle, or all ids past the limit.",
)
@click.option(
    "--holdout",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also write N samples to judge on, of instances that are not in the first set, to "
    "NAME.heldout.safetensors beside it.",
)
@click.option(
    "--report",
    is_flag=True,
    help="Print shares, lengths, truncation, vocabulary and samples, and write them beside the "
    "token set as .html and .png.",
)
@out_option("The token set to write (*.safetensors).", file=True)
@force_option
@json_option
@quiet_option
def tokens(
    model: str,
    mix: str | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    balance: str | None,
    truncate: str | None,
    holdout: int | None,
    report: bool,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build a token set from a mix with the tokenizer of MODEL."""
    if mix is None:
        raise InputError("--mix is missing; name a mix, for example --mix offline")
    files = beside(out)
    wanted = [out, *([files["heldout"]] if holdout else [])]
    wanted += [files["html"], files["png"]] if report else []
    if out in wanted[1:]:
        raise InputError(f"{out} is the name of a page of --report; end -o in .safetensors")
    for file in wanted:
        if file.exists() and not force:
            raise InputError(f"{file} exists; choose another name, or use --force to replace it")
    with stdout_kept(), shown(quiet) as progress:
        from calibration.tokens import Drawing

        drawing = Drawing(
            samples=samples,
            max_length=max_length,
            seed=seed,
            balance=balance,  # type: ignore[arg-type]  # click.Choice gives its values alone
            truncate=truncate,  # type: ignore[arg-type]
            holdout=holdout,
        )
        built, apart, tokenizer = built_from_mix(model, mix, drawing, progress)
        built.save(out)
        facts = {"file": str(out), **summary(built)}
        if apart is not None:
            apart.save(files["heldout"])
            facts["heldout"] = {"file": str(files["heldout"]), **summary(apart)}
        page: SetReport | None = None
        if report:
            from calibration.token_page import page as html_page
            from calibration.token_page import picture
            from calibration.token_report import describe

            page = describe(built, tokenizer)
            files["html"].write_text(html_page(page), encoding="utf-8")
            files["png"].write_bytes(picture(page))
            facts["pages"] = [str(files["html"]), str(files["png"])]
    click.echo(json.dumps(facts) if as_json else "\n".join([*lines(facts), *report_lines(page)]))


def beside(out: Path) -> dict[str, Path]:
    """Where what accompanies a token set goes."""
    return {
        "heldout": out.with_name(f"{out.stem}.heldout.safetensors"),
        "html": out.with_suffix(".html"),
        "png": out.with_suffix(".png"),
    }


def summary(built: TokenSet) -> dict[str, Any]:
    """What a token set holds, and what became of the rows read."""
    total = sum(built.lengths())
    counts = {
        name: {
            **domain,
            "share_of_samples": round(domain["samples"] / len(built), 4),
            "share_of_tokens": round(domain["tokens"] / total, 4),
        }
        for name, domain in built.counts().items()
    }
    return {
        "tokens": total,
        "samples": len(built),
        "by_domain": counts,
        "report": built.report(),
        "digest": built.digest(),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    text = [f"{facts['file']}: {facts['tokens']:,} tokens in {facts['samples']:,} samples"]
    for name, counts in facts["by_domain"].items():
        text.append(
            f"  {name:<16}{counts['samples']:>10,} samples{counts['share_of_samples']:>8.1%}"
            f"{counts['tokens']:>14,} tokens{counts['share_of_tokens']:>8.1%}"
        )
    for part in facts["report"]:
        if part["truncated"]:
            text.append(
                f"  {part['truncated']:,} {part['domain']} samples were cut to length "
                f"({part['tokens'] / part['tokens_before_truncation']:.0%} of the domain's tokens "
                "are left)"
            )
        text += [
            f"  {count:,} {part['domain']} rows of {part['source']} left out: {reason}"
            for reason, count in part["rejected"].items()
        ]
    return text + (lines(facts["heldout"]) if "heldout" in facts else [])


def report_lines(report: SetReport | None) -> list[str]:
    """The report as text: lengths, vocabulary and a sample of each domain."""
    if report is None:
        return []
    text = [
        "",
        f"lengths, in bins from {report.edges[0]} to {report.edges[-1]:,} tokens:",
        *(
            f"  {d.name:<16}{bars(d.histogram)}  median {d.median:,}, 90 % below {d.p90:,}, "
            f"longest {d.longest:,}"
            for d in report.domains
        ),
        f"vocabulary: {report.vocabulary:,} of {report.vocabulary_size:,} ids occur",
        *(
            f"  {d.name:<16}{d.vocabulary:>10,} ids, {d.own_vocabulary:,} in no other domain"
            for d in report.domains
        ),
    ]
    for domain in report.domains:
        for sample in domain.shown[:1]:
            more = "…" if len(sample) > TERMINAL_CHARACTERS else ""
            text += [
                "",
                f"--- {domain.name}, as the model sees it",
                sample[:TERMINAL_CHARACTERS] + more,
            ]
    return text


def bars(histogram: tuple[int, ...]) -> str:
    """A histogram as one line of blocks; what is not empty is never shown empty."""
    most = max(histogram) or 1
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // most)] for count in histogram)
