"""The tables of the model card: at a glance, fidelity, variants, tasks, calibration.

Each is Markdown made of `Evidence`; brackets are 95 % confidence intervals. What no file holds is
"not measured".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.evidence import Evidence, Facts, Judged, facts_of

NOT_MEASURED = "not measured"


def schemes(evidence: Evidence) -> list[str]:
    """Names of the number formats the recipe writes."""
    return list(dict.fromkeys(rule["scheme"] for rule in evidence.recipe or ()))


def form(evidence: Evidence) -> str:
    """The number format in words."""
    if evidence.recipe is None:
        corrected = " but for corrected experts" if evidence.repair else ""
        return f"{evidence.facts.precision}, the source's own bytes{corrected}"
    layout = evidence.manifest.get("job", {}).get("format") or "compressed-tensors"
    return f"{', '.join(schemes(evidence))} ({layout})"


def glance(evidence: Evidence) -> str:
    """Format, parameters, experts, layers, sizes."""
    facts, base, plan = evidence.facts, evidence.base, evidence.plan

    def against(now: str, before: Facts | None, what: str) -> str:
        return now if before is None or what == now else f"{now} (base {what})"

    experts = str(facts.experts)
    if plan is not None:
        experts += f" of {plan.num_experts}"
    rows = [
        ("Format", form(evidence)),
        ("Family", facts.family),
        ("Parameters", against(count(facts.total), base, count(base.total) if base else "")),
        ("Active a token", against(count(facts.active), base, count(base.active) if base else "")),
        ("Experts a layer", f"{experts}, {facts.top_k} a token"),
        ("Layers", f"{facts.layers}, {facts.moe_layers} with experts"),
        ("Hidden size", f"{facts.hidden_size:,}"),
        ("Context", f"{facts.context:,} tokens" if facts.context else "not stated in config.json"),
        ("Size of the weights", against(
            size(facts.num_bytes), base, size(base.num_bytes) if base else "")),
        ("Bits a parameter", f"{8 * facts.counted_bytes / facts.total:.2f}"),
    ]  # fmt: skip
    return table(["", ""], rows)


def tokens_in_words(evidence: Evidence, one: Judged) -> str:
    """Which tokens it was judged on, as far as that is on record."""
    known = {True: "held-out tokens", False: "tokens that it was calibrated on (not held out)"}
    held_out = evidence.held_out(one)
    return "tokens" if held_out is None else known[held_out]


def fidelity(evidence: Evidence) -> str:
    """Perplexity, KL and agreement by domain with intervals; KL by context length."""
    own = evidence.fidelity
    if own is None:
        return f"Perplexity, KL divergence and agreement with the base model: {NOT_MEASURED}."
    result, other = own.result, evidence.other_reference(own)
    tokens = tokens_in_words(evidence, own)
    base = "base" if other is None else "reference"
    groups = [("**all**", result), *result["by_domain"].items()]
    rows = [
        (
            name, f"{part['tokens']:,}", with_interval(part, "perplexity", 2),
            f"{part['reference']['perplexity']:.2f}" if part["reference"] else NOT_MEASURED,
            with_interval(part, "kl", 3), with_interval(part, "top1_agreement", 1, percent=True),
        )
        for name, part in groups
    ]  # fmt: skip
    text = [
        f"{tokens[0].upper()}{tokens[1:]}: `{own.tokens.get('mix') or own.path}`. Brackets are "
        f"95 % confidence intervals (bootstrap over documents). KL is KL({base} ‖ this), nats a "
        "token." + (f" The reference is {other}, not the base model." if other else ""),
        table(["domain", "tokens", "perplexity", base, "KL", "same top token"], rows),
    ]
    if result.get("kl_p99") is not None:
        text.append(f"99 % of the tokens have a KL below {result['kl_p99']:.2f}.")
    positions = [row for row in result.get("by_position") or () if row["kl"] is not None]
    if positions:
        lines = [
            (f"{r['context'][0]:,} to {r['context'][1]:,}", f"{r['tokens']:,}", f"{r['kl']:.3f}")
            for r in positions
        ]
        text += [
            "By how many tokens the model had seen:",
            table(["context", "tokens", "KL"], lines),
        ]
    return "\n\n".join(text)


def variants(evidence: Evidence, links: Mapping[str, str]) -> str:
    """All checkpoints judged on the same tokens against the same model, with links if given."""
    own = evidence.fidelity
    alike = [
        one for one in evidence.judged
        if own is not None and one.like(own) and one.result["kl"] is not None
    ]  # fmt: skip
    if own is None or len(alike) < 2:
        return ""
    rows = []
    for one in alike:
        name = f"**{one.name}**" if one.own else one.name
        if one.name in links:
            name = f"[{one.name}](https://huggingface.co/{links[one.name]})"
        rows.append(
            (
                name, variant_size(one), with_interval(one.result, "perplexity", 2),
                with_interval(one.result, "kl", 3),
                with_interval(one.result, "top1_agreement", 1, percent=True),
            )
        )  # fmt: skip
    return "### Variants\n\n" + table(
        ["variant", "weights", "perplexity", "KL", "same top token"], rows
    )


def variant_size(one: Judged) -> str:
    """Size of a variant's weights, where it still lies where it was judged."""
    path = Path(one.path)
    return size(facts_of(path).num_bytes) if (path / "config.json").is_file() else NOT_MEASURED


def tasks(evidence: Evidence) -> str:
    """Scores of tasks."""
    if not evidence.tasks:
        return f"### Tasks\n\nCode, function calling and repetition: {NOT_MEASURED}."
    rows = [
        (
            task["task"], task["model"], f"{task['items']:,}", task["metric"],
            f"{task['score']:.1%}" if task["unit"] == "share" else f"{task['score']:.3f}",
            bracket(task.get("interval"), 1 if task["unit"] == "share" else 3,
                    task["unit"] == "share"),
        )
        for task in evidence.tasks
    ]  # fmt: skip
    return "### Tasks\n\n" + table(["task", "model", "items", "metric", "score", "95 %"], rows)


def calibration(evidence: Evidence) -> str:
    """Domains with real counts and token shares."""
    found = evidence.calibration
    if not found:
        return "No calibration tokens are on record."
    domains = found["by_domain"]
    total = sum(own["tokens"] for own in domains.values()) or 1
    rows = [
        (name, f"{own['samples']:,}", f"{own['tokens']:,}", f"{own['tokens'] / total:.1%}")
        for name, own in domains.items()
    ]
    samples = sum(own["samples"] for own in domains.values())
    rows.append(("**all**", f"{samples:,}", f"{total:,}", "100.0%"))
    text = f"Mix `{found.get('mix')}`, seed {found.get('seed')}.\n\n" + table(
        ["domain", "samples", "tokens", "share of tokens"], rows
    )
    sources = [
        (row["source"] + (f" ({row['subset']})" if row.get("subset") else ""),
         str(row.get("split") or ""), f"{row['used']:,} of {row['read']:,}",
         f"{row['truncated']:,}")
        for row in found.get("report") or ()
    ]  # fmt: skip
    if sources:
        text += "\n\n" + table(["source", "split", "rows used of read", "cut at length"], sources)
    return text


# ---- words for numbers ---------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; in wide ones all columns but the first are numbers."""
    rule = ["---", *("---" if len(head) == 2 else "--:" for _ in head[1:])]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(part: Mapping[str, Any], name: str, digits: int, percent: bool = False) -> str:
    """A figure and its interval: `11.62 [10.80, 12.41]`."""
    value = part[name]
    if value is None:
        return NOT_MEASURED
    shown = f"{value:.{digits}%}" if percent else f"{value:.{digits}f}"
    interval = (part.get("intervals") or {}).get(name)
    return f"{shown} {bracket(interval, digits, percent)}".strip()


def bracket(interval: Sequence[float] | None, digits: int, percent: bool = False) -> str:
    """`[10.80, 12.41]`; nothing where there is no interval."""
    if interval is None:
        return ""
    kind = "%" if percent else "f"
    return f"[{interval[0]:.{digits}{kind}}, {interval[1]:.{digits}{kind}}]"


def count(number: int) -> str:
    """671.0B, 12.3M."""
    return f"{number / 1e9:,.1f}B" if number >= 1e9 else f"{number / 1e6:,.1f}M"


def size(num_bytes: int) -> str:
    """138.2 GB, 10.1 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes / 1e3:,.1f} kB"
