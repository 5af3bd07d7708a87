"""`thresher verify`: a written checkpoint, every tensor read and decoded twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from cli.options import Device, json_option, quiet_option, stdout_kept
from cli.progress import shown

if TYPE_CHECKING:
    from quant.verify import Report

FINDINGS_SHOWN = 20


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path())
@click.option(
    "--source",
    metavar="MODEL",
    help="The model it was made from: every tensor is compared with it.",
)
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also demand that N GPUs can share it (tensor parallelism).",
)
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where compressed-tensors decodes.",
)
@json_option
@quiet_option
def verify(
    checkpoint: str,
    source: str | None,
    tp: int | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the checkpoint CKPT with decoders that are not the ones that wrote it.

    Headers, index, digests of the manifest, expert counts, groups, targets and ignore list; every
    value finite, scales positive, fused partners alike. Exit code 3 when anything is wrong.
    """
    with stdout_kept(), shown(quiet) as progress:
        from quant.verify import verify_checkpoint

        report = verify_checkpoint(checkpoint, source, progress=progress, tp=tp, device=device)
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(lines(report)))
    report.demand()


def lines(report: Report) -> list[str]:
    """The report as text."""
    kinds = ", ".join(f"{count} in {name}" for name, count in sorted(report.quantized.items()))
    found = [
        f"{report.checkpoint}: {report.tensors:,} tensors, {report.nbytes / 1e9:,.2f} GB; "
        f"matrices quantized: {kinds or 'none'}"
    ]
    if report.files_hashed:
        found.append(f"{report.files_hashed} files checked against the manifest's sha256")
    if report.compared:
        found.append(f"{report.compared:,} tensors compared with the source; largest errors:")
        found += [f"  {error:.4f}  {scheme:12}  {name}" for name, scheme, error in report.worst]
    found += [f"wrong: {finding}" for finding in report.findings[:FINDINGS_SHOWN]]
    if len(report.findings) > FINDINGS_SHOWN:
        found.append(f"wrong: and {len(report.findings) - FINDINGS_SHOWN} more findings")
    found.append("all is well" if report.ok else f"{len(report.findings)} findings")
    return found
