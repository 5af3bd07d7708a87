"""`thresher eval`: perplexity, and KL and top-1 agreement to a reference checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.eval_tasks import TaskOptions, run_tasks, task_names
from cli.options import (
    compute_options,
    force_option,
    json_option,
    quiet_option,
    stdout_kept,
    token_options,
)
from cli.progress import shown
from cli.token_sets import token_set
from models.errors import InputError

if TYPE_CHECKING:
    from calibration.mixes import Mix


@click.command("eval")
@click.argument("ckpt", metavar="CKPT")
@click.option("--reference", metavar="MODEL", help="The checkpoint to compare with.")
@click.option(
    "--tokens", type=click.Path(path_type=Path), metavar="FILE", help="A token set to evaluate on."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Rows to evaluate on, tokenized with CKPT's tokenizer.",
)
@click.option(
    "--by-layer",
    is_flag=True,
    help="Also the KL of each layer alone: N layers cost N (N + 1) / 2 layer passes.",
)
@click.option(
    "--tasks",
    metavar="LIST",
    help="humaneval, mbpp, bfcl, looping, wikitext, lm_eval:NAME; separated by commas.",
)
@click.option(
    "--endpoint",
    metavar="URL",
    help="OpenAI-compatible server that answers the tasks; without one CKPT is loaded here.",
)
@click.option(
    "--endpoint-model", metavar="NAME", help="Its model; the first it lists if not given."
)
@click.option(
    "--task-data",
    multiple=True,
    metavar="TASK=FILE",
    help="A task's data from here instead of the hub; may be given several times.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Items of a task, drawn by --seed."
)
@click.option("--completions", is_flag=True, help="Ask without a chat template (base models).")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of an answer at most.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Items asked at a time.",
)
@token_options
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for evaluation.json and tasks/; with it the job can resume.",
)
@compute_options
@force_option
@json_option
@quiet_option
def evaluate(
    ckpt: str,
    reference: str | None,
    tokens: Path | None,
    text: Path | None,
    by_layer: bool,
    tasks: str | None,
    endpoint: str | None,
    endpoint_model: str | None,
    task_data: tuple[str, ...],
    limit: int | None,
    completions: bool,
    max_tokens: int,
    workers: int,
    mix: str | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    out: Path | None,
    device: str,
    dtype: str,
    memory: int | None,
    batch_tokens: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Perplexity of CKPT and its distance to a reference, one layer in memory; and tasks.

    Give the tokens as --tokens, --text or --mix. Every token of a sample but its first is
    predicted; kl is KL(reference || CKPT) in nats a token. Tasks are asked of CKPT, loaded as it is
    packed, or of --endpoint; code that models write runs in a sandbox that is a guard, not a jail.
    """
    from models.processes import joined

    with (
        stdout_kept(),
        joined(device) as processes,
        shown(quiet or not processes.is_first) as progress,
    ):
        given = sum(one is not None for one in (tokens, text, mix))
        if given > 1 or (given == 0 and tasks is None):
            raise InputError(
                "give what to evaluate on once: --tokens FILE, --text FILE or --mix MIX; or --tasks"
            )
        if tasks is not None and out is None:
            raise InputError("--tasks needs -o DIR, where items and results are kept")
        if by_layer and (not given or reference is None or out is None):
            raise InputError("--by-layer needs tokens, --reference MODEL and -o DIR")
        names = [] if tasks is None else task_names(tasks)
        options = TaskOptions(
            endpoint=endpoint,
            model=endpoint_model,
            data=dict(pair.partition("=")[::2] for pair in task_data),
            limit=limit,
            completions=completions,
            max_tokens=max_tokens,
            workers=workers,
            seed=seed,
        )
        if text is not None and not text.is_file():
            raise InputError(f"--text: there is no file {text}; check the path")
        if processes.size > 1 and (names or by_layer or out is None):
            raise InputError(
                "several processes share the evaluation on tokens alone: give -o DIR, and run "
                "--tasks and --by-layer without a launcher"
            )
        from evals.fidelity import EvalSettings
        from evals.fidelity import evaluate as evaluate_fidelity

        settings = EvalSettings(
            device=device, dtype=dtype, memory=memory, batch_tokens=batch_tokens
        )
        result: dict[str, Any] = {}
        if given:
            used = processes.from_first(
                lambda: token_set(
                    ckpt,
                    tokens=tokens,
                    mix=mix if text is None else text_mix(text),
                    samples=samples,
                    max_length=max_length,
                    seed=seed,
                    progress=progress,
                )
            )
            result = evaluate_fidelity(
                ckpt,
                used,
                settings,
                reference=reference,
                out=out,
                force=force,
                progress=progress,
                processes=processes,
            )
        if not processes.is_first:
            return
        text_lines = lines(result) if given else []
        if by_layer:
            from evals.by_layer import damage_by_layer

            assert out is not None
            assert reference is not None
            damage = damage_by_layer(
                ckpt, reference, used, settings, out / "by-layer", force=force, progress=progress
            )
            result = {**result, "kl_by_layer": damage["kl"]}
            text_lines += [f"layer {n} alone: kl {kl:.4f}" for n, kl in damage["kl"].items()]
        if names:
            assert out is not None
            found = run_tasks(
                ckpt, reference, names, options, settings, out / "tasks", force, progress
            )
            result = {**result, "tasks": found}
            text_lines += [task_line(task) for task in found]
    click.echo(json.dumps(result) if as_json else "\n".join(text_lines))


def text_mix(text: Path) -> Mix:
    """The mix of one file; its path is no spec of a mix and may hold any character."""
    from calibration.datasets import LOCAL_SUFFIXES, is_local_file
    from calibration.mixes import Mix, components_of

    if not is_local_file(str(text)):
        raise InputError(f"--text: {text} is no row file; give {', '.join(LOCAL_SUFFIXES)}")
    return Mix(name=str(text), components=tuple(components_of(str(text), None, None, None)))


def task_line(task: dict[str, Any]) -> str:
    """One task's score."""
    share = task["unit"] == "share"
    shown = "{:.1%}" if share else "{:.4f}"
    interval = task.get("interval")
    spread = "" if interval is None else " [" + ", ".join(shown.format(v) for v in interval) + "]"
    return (
        f"{task['task']:<24}{task['metric']:<18}{shown.format(task['score'])}{spread}  "
        f"({task['items']:,} items, {task['model']})"
    )


def lines(result: dict[str, Any]) -> list[str]:
    """The evaluation as a small table."""
    compared = result["reference"] is not None
    head = f"{'':<16}{'tokens':>12}{'nll':>10}{'perplexity':>12}"
    if compared:
        head += f"{'reference':>12}{'kl':>10}{'top-1':>9}"
    rows = [row("all", result), *(row(name, part) for name, part in result["by_domain"].items())]
    text = [head, *rows]
    if compared:
        text.append(f"99 % of the tokens have a kl below {result['kl_p99']:.4f}")
    return text


def row(name: str, part: dict[str, Any]) -> str:
    """One line of the table."""
    text = f"{name:<16}{part['tokens']:>12,}{part['nll']:>10.4f}{part['perplexity']:>12.4f}"
    if part["reference"] is not None:
        text += (
            f"{part['reference']['perplexity']:>12.4f}{part['kl']:>10.4f}"
            f"{part['top1_agreement']:>9.2%}"
        )
    return text
