"""The model card: README.md with the hub's metadata, made of stored results and nothing else.

Every figure comes from `Evidence`; what no file holds is "not measured" or "not recorded". Nothing
is typed by hand but the names that no file can know (`CardSettings`). `base_model_relation` is
"quantized" for pruned checkpoints too: of the hub's four relations it is the one for a smaller form
of the same model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from calibration.datasets import is_local_file
from calibration.hub import SOURCES
from calibration.mixes import HUB_ID
from evals import engines
from evals.card_tables import (
    NOT_MEASURED,
    calibration,
    fidelity,
    glance,
    schemes,
    size,
    table,
    tasks,
    tokens_in_words,
    variants,
)
from evals.evidence import Evidence
from evals.licences import CONDITIONS

CITATION = """@misc{lasby2025reap,
  title         = {REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression},
  author        = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and
                   Ioannou, Yani and Thangarasa, Vithursan},
  year          = {2025},
  eprint        = {2510.13999},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSettings:
    """What no file knows: names on the hub and the licence. `links`: variant -> hub id."""

    base_model: str | None = None
    repo: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[str] = ()


def base_name(evidence: Evidence, settings: CardSettings) -> str:
    """The base model's hub id where one is known, else the name of its folder."""
    return settings.base_model or hub_id_of(evidence.base_path) or Path(evidence.base_path).name


def hub_id_of(path: str) -> str | None:
    """owner/name of a folder in the hub's cache."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    return f"{found[1]}/{found[2]}" if found else None


def card(evidence: Evidence, settings: CardSettings) -> str:
    """The whole README.md."""
    title = (settings.repo or evidence.folder.resolve().name).rpartition("/")[2]
    sections = [
        f"# {title}",
        introduction(evidence, settings),
        *(f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in settings.pictures[:1]),
        "## At a glance",
        glance(evidence),
        "## How much was lost",
        fidelity(evidence),
        variants(evidence, settings.links),
        tasks(evidence),
        "## Calibration",
        calibration(evidence),
        "## Method",
        method(evidence),
        *(f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in settings.pictures[1:]),
        "## How to run it",
        running(evidence, settings),
        "## Plan and provenance",
        provenance(evidence),
        "## Limits",
        limits(evidence, settings),
        "## Citation",
        citation(base_name(evidence, settings)),
    ]
    head = yaml.safe_dump(metadata(evidence, settings), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def metadata(evidence: Evidence, settings: CardSettings) -> dict[str, Any]:
    """The card's YAML head."""
    base = base_name(evidence, settings)
    head: dict[str, Any] = {}
    if HUB_ID.fullmatch(base):
        head |= {"base_model": base, "base_model_relation": "quantized"}
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if settings.license:
        head["license"] = settings.license
    if settings.license_name:
        head["license_name"] = settings.license_name
    if settings.license_link:
        head["license_link"] = settings.license_link
    tags = ["moe", "thresher"]
    if evidence.plan is not None:
        tags += ["pruned", "expert-pruning", evidence.plan.criterion.replace("_", "-")]
    if evidence.recipe is not None:
        tags += ["compressed-tensors", *(name.lower() for name in schemes(evidence))]
    head["tags"] = tags
    sets = hub_datasets(evidence)
    if sets:
        head["datasets"] = sets
    return head


def hub_datasets(evidence: Evidence) -> list[str]:
    """Hub ids of the calibration sources; files have none, whatever their paths look like."""
    rows = (evidence.calibration or {}).get("report") or []
    names = [name for row in rows if not is_local_file(name := str(row.get("source")))]
    ids = [SOURCES[name].hub_id if name in SOURCES else name for name in names]
    return list(dict.fromkeys(one for one in ids if HUB_ID.fullmatch(one)))


def introduction(evidence: Evidence, settings: CardSettings) -> str:
    """One paragraph: what this is, of what, and how much was lost."""
    base, facts, plan = base_name(evidence, settings), evidence.facts, evidence.plan
    shown = f"[{base}](https://huggingface.co/{base})" if HUB_ID.fullmatch(base) else base
    parts = [f"{shown}, made smaller by Thresher"]
    if plan is not None:
        parts.append(
            f": {plan.keep} of {plan.num_experts} routed experts kept in each of "
            f"{len(plan.layers)} layers by `{plan.criterion}`"
        )
    if evidence.recipe is not None:
        parts.append(f"{';' if plan else ':'} weights in {', '.join(schemes(evidence))}")
    text = "".join(parts) + f". {size(facts.num_bytes)} on disk"
    if evidence.base is not None:
        text += f" instead of {size(evidence.base.num_bytes)}"
    own = evidence.fidelity
    if own is None:
        return text + f". What that cost was {NOT_MEASURED}."
    result = own.result
    text += (
        f". On {result['tokens']:,} {tokens_in_words(evidence, own)} its perplexity is "
        f"{result['perplexity']:.2f}"
    )
    if result["reference"] is not None:
        other = evidence.other_reference(own)
        text += (
            f" ({other or 'base model'} {result['reference']['perplexity']:.2f}) and its KL "
            f"divergence from {other or 'the base model'} {result['kl']:.3f} nats a token"
        )
    return text + "."


def method(evidence: Evidence) -> str:
    """How it was made, step by step, oldest first."""
    return "\n".join(f"{n}. {words}" for n, words in enumerate(steps(evidence), start=1))


def steps(evidence: Evidence) -> Iterator[str]:
    """One sentence a step."""
    plan = evidence.plan
    if plan is not None:
        seen = f" on {tokens_of(evidence):,} tokens" if tokens_of(evidence) else ""
        yield (
            f"Every routed expert was scored{seen} from the values that the forward pass itself "
            f"used, layer by layer, by `{plan.criterion}`."
        )
        yield (
            f"The {plan.num_experts - plan.keep} lowest of {plan.num_experts} experts were removed "
            f"in each of {len(plan.layers)} layers, router rows with them"
            + (", the same number in every routing group" if plan.groups == "keep" else "")
            + (f"; MTP layers: {plan.mtp}" if plan.mtp else "")
            + f". Experts that saw no token: {plan.num_dead}, {plan.num_dead_kept} of them kept."
        )
    if evidence.repair is not None:
        layers = evidence.repair["layers"].values()
        left = sum(layer["error_left"] for layer in layers) / max(1, len(layers))
        yield (
            f"{sum(layer['experts'] for layer in layers):,} kept experts were corrected toward the "
            f"original's output (`{', '.join(evidence.repair['repairs'])}`), which left {left:.0%} "
            "of their layers' error on the tokens of the repair."
        )
    for rule in evidence.recipe or []:
        how = rule.get("method") or evidence.manifest.get("job", {}).get("method") or "rounding"
        yield f"`{', '.join(rule['targets'])}` were written as {rule['scheme']} by {how}."
    if evidence.rounding:
        units = evidence.rounding.values()
        matrices = sum(unit["matrices"] for unit in units)
        fell = sum(len(unit["fell_back"]) for unit in units)
        yield (
            f"{matrices:,} matrices were rounded; {fell} fell back to rounding to nearest, "
            f"{sum(unit['without_tokens'] for unit in units)} experts had no token."
        )


def tokens_of(evidence: Evidence) -> int:
    """Calibration tokens in all; 0 where not known."""
    found = (evidence.calibration or {}).get("by_domain") or {}
    return sum(own["tokens"] for own in found.values())


def running(evidence: Evidence, settings: CardSettings) -> str:
    """Commands for each engine, with what is known of them."""
    repo = settings.repo or evidence.folder.resolve().name
    names = schemes(evidence)
    text = []
    vllm = engines.reading(engines.VLLM, names)
    text.append(f"**vLLM**: {vllm.note}.")
    if vllm.works:
        text.append(f"```\n{engines.vllm_command(repo)}\n```")
    hf = engines.reading(engines.TRANSFORMERS, names)
    text.append(f"**transformers**: {hf.note}.")
    if hf.works:
        text.append(f"```python\n{engines.transformers_code(repo)}\n```")
    text.append("**Thresher**:")
    text.append(f"```\n{engines.thresher_command(repo)}\n```")
    return "\n\n".join(text)


def provenance(evidence: Evidence) -> str:
    """Digests and versions of each step."""
    rows = [
        (
            str(step.get("command")),
            f"`{str((step.get('source') or {}).get('digest', ''))[:16]}`",
            f"{(step.get('versions') or {}).get('thresher', '?')}, "
            f"torch {(step.get('versions') or {}).get('torch', '?')}",
            f"{(step.get('timings') or {}).get('seconds', 0):,.0f} s",
            size(step.get("peak_memory_bytes") or 0),
        )
        for step in reversed(evidence.steps)
    ]
    text = table(["step", "source digest", "versions", "last run", "peak memory"], rows)
    more = "`thresher.json` holds every setting and the sha256 of every file."
    if evidence.plan is not None:
        more += (
            " `plan.json` lists the kept experts of each layer; saliency sha256 "
            f"`{evidence.plan.saliency_sha256[:16]}`."
        )
    return f"{text}\n\n{more}"


def limits(evidence: Evidence, settings: CardSettings) -> str:
    """What a user should know before relying on it."""
    said = [
        "Experts were chosen on the calibration domains above; other languages and subjects may "
        "have lost more than the tables show.",
    ]
    measured = {task["task"] for task in evidence.tasks}
    own = evidence.fidelity
    if own is None or evidence.held_out(own) is False:
        said.append("Nothing was measured on held-out text.")
    if "looping" not in measured:
        said.append(
            "Pruned models can fall into repetition in long answers; that was not measured here."
        )
    if not measured - {"looping"}:
        said.append("No task (code, function calling, knowledge) was run.")
    if settings.license in CONDITIONS:
        said.append(f"Licence {settings.license}: {CONDITIONS[settings.license]}.")
    return "\n".join(f"- {line}" for line in said)


def citation(base: str) -> str:
    """REAP and the base model."""
    key = re.sub(r"\W+", "-", base).strip("-").lower()
    where = f"https://huggingface.co/{base}" if HUB_ID.fullmatch(base) else base
    model = f"@misc{{{key},\n  title = {{{base}}},\n  howpublished = {{{where}}}\n}}"
    return f"```bibtex\n{CITATION}\n\n{model}\n```"
