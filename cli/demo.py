"""`thresher demo`: the whole chain on the bundled model, and what was lost by which criterion."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.options import json_option, quiet_option, stdout_kept
from cli.progress import shown
from cli.token_sets import token_set
from models.errors import InputError
from models.progress import Progress

if TYPE_CHECKING:
    from calibration.tokens import TokenSet

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
CRITERIA = ("reap", "frequency", "random")
# What the checkpoint pruned by the first criterion is written as, and how it is rounded.
FORMATS: Mapping[str, Literal["gptq", "rtn"]] = {
    "W3A16": "gptq",
    "NVFP4": "gptq",
    "FP8_BLOCK": "rtn",
}
DOMAINS = ("code", "tools", "swe")
SAMPLES = {"train": 20, "heldout": 12}  # of each domain: some 25,000 and 15,000 tokens
MAX_LENGTH = 512  # twice the model's index_topk, so that its attention is really sparse
# One sample a batch: larger attention scores are fresh pages each time, which cost the kernel as
# much time as the arithmetic (70 s of 140 with 4,096 tokens, 7 s of 75 so).
BATCH_TOKENS = 512


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep scores and checkpoints here, and resume; else a temporary folder.",
)
@json_option
@quiet_option
def demo(out: Path | None, as_json: bool, quiet: bool) -> None:
    """Score, prune, quantize, verify and judge the bundled model: half of its 64 experts go.

    Calibration and held-out text are generated on this machine; nothing is downloaded. Ends with a
    model card and an HTML report.
    """
    if not (MODEL / "config.json").is_file():
        raise InputError(f"the bundled model is not at {MODEL}; run from a complete checkout")
    with ExitStack() as stack:
        stack.enter_context(stdout_kept())
        progress = stack.enter_context(shown(quiet))
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thresher-")))
        results = chain(MODEL, folder, progress)
        kept = describe(folder)
    if as_json:
        click.echo(json.dumps({**results, **(kept if out is not None else {})}))
        return
    table(results)
    if out is None:
        click.echo("the model card and the HTML report are kept with -o DIR")
    else:
        click.echo(f"model card: {kept['card']}\nreport: {kept['report']}")


def chain(
    model: Path,
    folder: Path,
    progress: Progress,
    *,
    samples: Mapping[str, int] = SAMPLES,
    max_length: int = MAX_LENGTH,
    formats: Mapping[str, Literal["gptq", "rtn"]] = FORMATS,
) -> dict[str, Any]:
    """Tokens, score; for each criterion prune; quantize and verify the first; judge them all.

    Every step resumes by itself.
    """
    from evals.by_layer import damage_by_layer
    from evals.fidelity import EvalSettings, evaluate_all
    from models.opening import open_model
    from reap.plan import make_plan
    from reap.prune import prune_checkpoint
    from reap.score import ScoreSettings, score

    calibration, heldout = (
        part_tokens(model, part, samples[part], max_length) for part in ("train", "heldout")
    )
    stats = score(
        model,
        calibration,
        folder / "scores",
        ScoreSettings(batch_tokens=BATCH_TOKENS),
        progress=progress,
    )
    opened = open_model(model)
    keep = opened.spec.num_experts // 2
    results: dict[str, Any] = {"experts": opened.spec.num_experts, "keep": keep}
    for criterion in CRITERIA:
        plan = make_plan(stats, opened.spec, keep=keep, criterion=criterion)
        inputs = {
            "scores": str((folder / "scores").resolve()),
            "saliency_sha256": plan.saliency_sha256,
        }
        prune_checkpoint(opened.source, plan, folder / criterion, inputs=inputs, progress=progress)
    names = list(CRITERIA)
    for scheme, method in formats.items():
        names.append(f"{CRITERIA[0]}-{scheme}")
        quantize_one(
            folder / CRITERIA[0], folder / names[-1], scheme, method, calibration, progress
        )
    judged = evaluate_all(
        {name: folder / name for name in names},
        heldout,
        EvalSettings(batch_tokens=BATCH_TOKENS),
        reference=model,
        out=folder / "evaluation",
        progress=progress,
    )
    results["kl_by_layer"] = damage_by_layer(
        folder / described(formats),
        model,
        heldout,
        EvalSettings(batch_tokens=BATCH_TOKENS),
        folder / "evaluation" / "by-layer",
        progress=progress,
    )["kl"]
    results["bytes"] = {"original": weight_bytes(model)}
    results["bytes"] |= {name: weight_bytes(folder / name) for name in names}
    results |= judged
    return results


def described(formats: Mapping[str, Literal["gptq", "rtn"]]) -> str:
    """The checkpoint that card and report are about: the first criterion in the first format."""
    return f"{CRITERIA[0]}-{next(iter(formats))}"


def describe(
    folder: Path,
    *,
    formats: Mapping[str, Literal["gptq", "rtn"]] = FORMATS,
) -> dict[str, str]:
    """Write the model card and the report; their paths."""
    from cli.card import write_card
    from evals.card import CardSettings
    from evals.evidence import gather
    from evals.report import report
    from models.journal import write_atomically

    evidence = gather(folder / described(formats), evaluations=[folder / "evaluation"])
    write_card(evidence, CardSettings(license="apache-2.0"), pictures=True)
    write_atomically(folder / "report.html", report(evidence).encode())
    card = evidence.folder / "README.md"
    return {"card": str(card), "report": str(folder / "report.html")}


def quantize_one(
    pruned: Path,
    out: Path,
    scheme: str,
    method: Literal["gptq", "rtn"],
    tokens: TokenSet,
    progress: Progress,
) -> None:
    """Write a pruned checkpoint in a format and verify it. VerificationError when it is wrong."""
    from models.opening import open_model
    from quant.quantize import quantize
    from quant.quantize_plan import QuantizeSettings
    from quant.recipes import uniform
    from quant.schemes import SCHEMES
    from quant.verify import verify_checkpoint

    settings = QuantizeSettings(method=method, batch_tokens=BATCH_TOKENS)
    inputs = {
        "mix": tokens.mix,
        "seed": tokens.seed,
        "tokens": tokens.counts(),
        "report": tokens.report(),
    }
    quantize(
        open_model(pruned), uniform(SCHEMES[scheme]), out, settings, tokens=tokens, inputs=inputs,
        progress=progress,
    )  # fmt: skip
    verify_checkpoint(out, pruned).demand()


def weight_bytes(checkpoint: Path) -> int:
    """Size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def part_tokens(model: Path, part: str, samples: int, max_length: int) -> TokenSet:
    """Tokens of the offline mix: `train` to calibrate, `heldout` to judge."""
    mix = ",".join(f"offline[{domain}]({part}):{samples}" for domain in DOMAINS)
    return token_set(
        str(model),
        tokens=None,
        mix=mix,
        samples=None,
        max_length=max_length,
        seed=0,
        truncate="cut",  # every sample the full length: the demo is short
    )


def table(results: dict[str, Any]) -> None:
    """The results side by side on stdout."""
    from rich.console import Console
    from rich.table import Table

    first = results[CRITERIA[0]]
    domains = list(first["by_domain"])
    drawn = Table(title=f"perplexity on {first['tokens']:,} held-out tokens, by criterion")
    for column in ("kept by", "experts", "MB", *domains, "all", "KL", "top-1"):
        drawn.add_column(column, justify="left" if column == "kept by" else "right")
    drawn.add_row(
        "(original)",
        str(results["experts"]),
        f"{results['bytes']['original'] / 1e6:.1f}",
        *(f"{first['by_domain'][d]['reference']['perplexity']:.2f}" for d in domains),
        f"{first['reference']['perplexity']:.2f}",
        "0",
        "100 %",
    )
    for name in (name for name in results["bytes"] if name != "original"):
        result = results[name]
        drawn.add_row(
            name.replace("-", " "),
            str(results["keep"]),
            f"{results['bytes'][name] / 1e6:.1f}",
            *(f"{result['by_domain'][d]['perplexity']:.2f}" for d in domains),
            f"{result['perplexity']:.2f}",
            f"{result['kl']:.3f}",
            f"{result['top1_agreement']:.1%}",
        )
    Console().print(drawn)
