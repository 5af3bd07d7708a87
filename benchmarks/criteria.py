"""Every criterion's pruned model against the original: docs/results-criteria.md.

    python -m benchmarks.criteria MODEL OUT [--seeds 3] [--samples 20]
    python -m benchmarks.criteria MODEL OUT --scheme W3A16 [--criteria reap,output-error:down+up]
    python -m benchmarks.criteria MODEL OUT --repairs scales,down,scales+down [--shares 0.5]
                                            [--repair-samples 20] [--draws 0,1,2]

For each seed a calibration sample of the offline mix (20 samples of each domain, up to 512 tokens,
as `thresher demo`; --samples), one scoring pass with damage statistics, and for 25 % and 50 % of
the experts removed the plan of every criterion. Pruned models are judged unwritten, on 12 held-out
samples of each domain: perplexity and KL by domain; `auto` judges on 4 other samples of each.
The table gives the mean over seeds and the half-width of its 95 % interval (t, n - 1 degrees).

With --scheme the named criteria's models are also written and quantized by GPTQ, and the KL is
split: what pruning lost, and what rounding added. With --repairs the models of `output-error` are
also written repaired, by the tokens they were scored on (--repair-samples: by so many samples of
each domain of the same seed), and judged beside `reap`'s. Each step resumes by itself, and --draws
makes some of the draws only, so that several machines or processes can share the work. On a CPU
without bfloat16 instructions --dtype float32 is many times faster.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.tokens import TokenSet
from cli.token_sets import token_set
from evals.fidelity import EvalSettings, evaluate_all
from models.opening import OpenModel, open_model
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import scheme_with
from quant.verify import verify_checkpoint
from reap.criteria import AUTO, CRITERIA, OUTPUT_ERROR
from reap.damage import SAMPLED_TOKENS
from reap.damage_file import DamageStats
from reap.plan import PrunePlan, make_plan
from reap.prune import prune_checkpoint
from reap.pruned_source import pruned_view
from reap.repair import Repair, RepairSettings
from reap.repair_fit import repair_kinds
from reap.score import ScoreSettings, score

SHARES = (0.5, 0.25)
DOMAINS = ("code", "tools", "swe")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # by number of seeds
BATCH_TOKENS = 512


def sample(model: Path, part: str, count: int, seed: int) -> TokenSet:
    mix = ",".join(f"offline[{domain}]({part}):{count}" for domain in DOMAINS)
    return token_set(str(model), tokens=None, mix=mix, samples=None, max_length=512, seed=seed)


def plans_of(
    opened: OpenModel,
    folder: Path,
    share: float,
    names: Sequence[str] = (*CRITERIA, OUTPUT_ERROR),
) -> dict[str, PrunePlan]:
    from reap.stats import SaliencyStats

    stats, damage = SaliencyStats.load(folder), DamageStats.load(folder)
    return {
        name: make_plan(stats, opened.spec, ratio=share, criterion=name, damage=damage)
        for name in names
    }


def judge(
    args: argparse.Namespace,
    opened: OpenModel,
    plans: dict[str, PrunePlan],
    tokens: TokenSet,
    out: Path,
) -> dict[str, dict[str, Any]]:
    return evaluate_all(
        {name: pruned_view(opened, plan) for name, plan in plans.items()},
        tokens,
        EvalSettings(batch_tokens=BATCH_TOKENS, dtype=args.dtype),
        reference=opened.checkpoint.root,
        identity={name: plan.to_json()["layers"] for name, plan in plans.items()},
        out=out,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    opened = open_model(args.model)
    heldout = sample(args.model, "heldout", 12, 0)
    other = sample(args.model, "heldout", 4, 1)
    found: dict[str, Any] = {}
    for seed in args.draws:
        folder = scored(args, seed)
        for share in SHARES:
            began = time.monotonic()
            plans = plans_of(opened, folder, share)
            searched = time.monotonic() - began
            results = judge(args, opened, plans, heldout, args.out / f"judged-{seed}-{share}")
            candidates = {name: plan for name, plan in plans.items() if name != "random"}
            chosen = judge(args, opened, candidates, other, args.out / f"auto-{seed}-{share}")
            best = min(chosen, key=lambda name: chosen[name]["kl"])
            results[AUTO] = {**results[best], "chosen": best}
            found[f"{seed} {share}"] = results
            line = {name: round(result["kl"], 4) for name, result in results.items()}
            print(seed, share, f"plans {searched:.0f} s, auto: {best}", line, flush=True)
    return found


def mean_and_width(values: list[float], digits: int = 3) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    width = T_95[len(values)] * deviation / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {width:.{digits}f}"


def table(found: dict[str, Any], draws: list[int]) -> str:
    lines = []
    for share in SHARES:
        runs = [found[f"{seed} {share}"] for seed in draws]
        reference = runs[0]["reap"]
        first = ", ".join(
            f"{d} {reference['by_domain'][d]['reference']['perplexity']:.2f}" for d in DOMAINS
        )
        whole = reference["reference"]["perplexity"]
        lines += [
            f"\n{share:.0%} removed; perplexity of the original: {whole:.2f} ({first})\n",
            "| criterion | KL | " + " | ".join(f"KL {d}" for d in DOMAINS) + " | perplexity | "
            + " | ".join(f"ppl {d}" for d in DOMAINS) + " |",
            "|---" * (3 + 2 * len(DOMAINS)) + "|",
        ]  # fmt: skip
        mean_kl = {name: sum(r[name]["kl"] for r in runs) for name in runs[0]}
        for name in sorted(mean_kl, key=lambda n: mean_kl[n]):
            parts = [[r[name]["by_domain"][d] for r in runs] for d in DOMAINS]
            cells = [
                mean_and_width([r[name]["kl"] for r in runs]),
                *(mean_and_width([p["kl"] for p in part]) for part in parts),
                mean_and_width([r[name]["perplexity"] for r in runs]),
                *(mean_and_width([p["perplexity"] for p in part]) for part in parts),
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scored(args: argparse.Namespace, seed: int) -> Path:
    folder: Path = args.out / f"scores-{seed}"
    settings = ScoreSettings(
        batch_tokens=BATCH_TOKENS, damage_tokens=SAMPLED_TOKENS, dtype=args.dtype
    )
    score(args.model, sample(args.model, "train", args.samples, seed), folder, settings)
    return folder


def repaired_model(
    args: argparse.Namespace, opened: OpenModel, plan: PrunePlan, kinds: str, where: str, seed: int
) -> Path:
    """`plan` carried out and repaired; seconds go to stdout."""
    count = args.repair_samples
    how = RepairSettings(
        kinds=repair_kinds(kinds.replace("+", ",")),
        tokens=sample(args.model, "train", count, seed),
        batch_tokens=BATCH_TOKENS,
        dtype=args.dtype,
    )
    many = "" if count == 20 else f"-{count}"
    out: Path = args.out / f"repaired-{where}-{kinds}{many}"
    began = time.monotonic()
    prune_checkpoint(opened.source, plan, out, repair=Repair(opened, plan, how))
    print(out.name, f"{time.monotonic() - began:.0f} s", flush=True)
    return out


def quantized(args: argparse.Namespace) -> str:
    """KL of pruned, pruned and rounded, and rounded alone, over the draws."""
    draws = [quantized_draw(args, seed) for seed in args.draws]
    alone = mean_and_width([found["nothing pruned"] for found in draws])
    lines = [
        f"\n{args.scheme} on top; rounding alone, nothing pruned: KL {alone}\n",
        "| pruned | KL pruned | KL pruned and rounded | pruning's share | rounding's share, % |",
        "|---|---|---|---|---|",
    ]
    for name in (n for n in draws[0] if n.endswith("%")):
        pruned = [found[name] for found in draws]
        both = [found[f"{name} rounded"] for found in draws]
        rounding = [100 * (1 - one / two) for one, two in zip(pruned, both, strict=True)]
        share = mean_and_width(rounding, digits=1)
        lines.append(
            f"| {name} | {mean_and_width(pruned)} | {mean_and_width(both)} "
            f"| {1 - sum(rounding) / len(rounding) / 100:.0%} | {share} |"
        )
    return "\n".join(lines)


def quantized_draw(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """KL by model of one draw. A name is a criterion, or one and its repairs: CRITERION:KINDS."""
    opened, heldout = open_model(args.model), sample(args.model, "heldout", 12, 0)
    tokens, folder = sample(args.model, "train", args.samples, seed), scored(args, seed)
    whole = args.out / f"whole-{seed}-{args.scheme}"
    rounded_to(args, args.model, whole, tokens)
    models: dict[str, Any] = {"nothing pruned": whole}
    for share in (float(share) for share in args.shares.split(",")):
        plans = plans_of(opened, folder, share)
        for name in args.criteria.split(","):
            criterion, _, kinds = name.partition(":")
            if kinds:
                where = f"{seed}-{share}"
                made = repaired_model(args, opened, plans[criterion], kinds, where, seed)
            else:
                made = args.out / f"{name}-{seed}-{share}"
                prune_checkpoint(opened.source, plans[name], made)
            rounded = made.with_name(f"{made.name}-{args.scheme}")
            rounded_to(args, made, rounded, tokens)
            models |= {f"{name} {share:.0%}": made, f"{name} {share:.0%} rounded": rounded}
    results = evaluate_all(
        models,
        heldout,
        EvalSettings(batch_tokens=BATCH_TOKENS, dtype=args.dtype),
        reference=args.model,
        out=args.out / f"judged-{seed}-{args.scheme}-{args.repair_samples}",
    )
    found = {name: float(result["kl"]) for name, result in results.items()}
    print(seed, args.scheme, {name: round(kl, 4) for name, kl in found.items()}, flush=True)
    return found


def repaired(args: argparse.Namespace) -> str:
    """KL of `reap`, `output-error` and the latter repaired, over the draws."""
    lines = []
    for share in (float(share) for share in args.shares.split(",")):
        found: dict[str, list[float]] = {}
        for seed in args.draws:
            for name, result in repaired_draw(args, share, seed).items():
                found.setdefault(name, []).append(result["kl"])
        lines += [
            f"\n{share:.0%} removed, repaired by {args.repair_samples} samples of each domain\n",
            "| kept by, repair | KL | against reap | each draw |",
            "|---|---|---|---|",
        ]
        for name, values in found.items():
            pairs = zip(values, found["reap"], strict=True)
            each = ", ".join(f"{kl:.3f} ({kl / reap - 1:+.1%})" for kl, reap in pairs)
            against = sum(values) / sum(found["reap"]) - 1
            lines.append(f"| {name} | {mean_and_width(values)} | {against:+.1%} | {each} |")
    return "\n".join(lines)


def repaired_draw(args: argparse.Namespace, share: float, seed: int) -> dict[str, dict[str, Any]]:
    """The judged results of one draw, by model."""
    opened, heldout = open_model(args.model), sample(args.model, "heldout", 12, 0)
    plans = plans_of(opened, scored(args, seed), share, ("reap", OUTPUT_ERROR))
    models: dict[str, Any] = {
        name: pruned_view(opened, plans[name]) for name in ("reap", OUTPUT_ERROR)
    }
    for kinds in args.repairs.split(","):
        plan = plans[OUTPUT_ERROR]
        where = f"{seed}-{share}"
        out = repaired_model(args, opened, plan, kinds, where, seed)
        models[f"{OUTPUT_ERROR}, {kinds}"] = out
    results = evaluate_all(
        models,
        heldout,
        EvalSettings(batch_tokens=BATCH_TOKENS, dtype=args.dtype),
        reference=args.model,
        identity={name: [share, seed, name] for name in models},
        out=args.out / f"judged-repairs-{seed}-{share}-{args.repairs}-{args.repair_samples}",
    )
    for name, result in results.items():
        by_domain = {domain: round(result["by_domain"][domain]["kl"], 4) for domain in DOMAINS}
        print(seed, share, name, round(result["kl"], 4), by_domain, flush=True)
    return results


def rounded_to(args: argparse.Namespace, model: Path, out: Path, tokens: TokenSet) -> None:
    scheme = scheme_with(args.scheme, group_size=args.group_size)
    quantize(
        open_model(model),
        uniform(scheme),
        out,
        QuantizeSettings(method="gptq", batch_tokens=BATCH_TOKENS, dtype=args.dtype),
        tokens=tokens,
    )
    verify_checkpoint(out, model).demand()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--scheme")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--criteria", default="reap,output-error")
    parser.add_argument("--repairs")
    parser.add_argument("--shares", default=",".join(str(share) for share in SHARES))
    parser.add_argument("--repair-samples", type=int, default=20)
    parser.add_argument("--draws")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    args.draws = [int(d) for d in args.draws.split(",")] if args.draws else list(range(args.seeds))
    if args.repairs:
        print(repaired(args))
        return
    if args.scheme:
        print(quantized(args))
        return
    found = run(args)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    print(table(found, args.draws))


if __name__ == "__main__":
    main()
