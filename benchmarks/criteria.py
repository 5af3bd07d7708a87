"""Every criterion's pruned model against the original: docs/results-criteria.md.

    python -m benchmarks.criteria MODEL OUT [--seeds 3]
    python -m benchmarks.criteria MODEL OUT --scheme W3A16 [--criteria reap,output-error]
    python -m benchmarks.criteria MODEL OUT --repairs scales,down,scales+down [--shares 0.5]

For each seed a calibration sample of the offline mix (20 samples of each domain, up to 512 tokens,
as `thresher demo`), one scoring pass with damage statistics, and for 25 % and 50 % of the experts
removed the plan of every criterion. Pruned models are judged unwritten, on 12 held-out samples of
each domain: perplexity and KL by domain. `auto` judges on 4 other samples of each domain. The
table gives the mean over seeds and the half-width of its 95 % interval (t, n - 1 degrees).

With --scheme the named criteria's models are also written and quantized by GPTQ, and the KL is
split: what pruning lost, and what rounding added. With --repairs the models of `output-error` are
also written repaired, by the tokens they were scored on, and judged beside `reap`'s. Each step
resumes by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from calibration.tokens import TokenSet
from cli.token_sets import token_set
from evals.fidelity import EvalSettings, evaluate_all
from models.opening import OpenModel, open_model
from quant.quantize import QuantizeSettings, quantize
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


def plans_of(opened: OpenModel, folder: Path, share: float) -> dict[str, PrunePlan]:
    from reap.stats import SaliencyStats

    stats, damage = SaliencyStats.load(folder), DamageStats.load(folder)
    return {
        name: make_plan(stats, opened.spec, ratio=share, criterion=name, damage=damage)
        for name in (*CRITERIA, OUTPUT_ERROR)
    }


def judge(
    opened: OpenModel, plans: dict[str, PrunePlan], tokens: TokenSet, out: Path
) -> dict[str, dict[str, Any]]:
    return evaluate_all(
        {name: pruned_view(opened, plan) for name, plan in plans.items()},
        tokens,
        EvalSettings(batch_tokens=BATCH_TOKENS),
        reference=opened.checkpoint.root,
        identity={name: plan.to_json()["layers"] for name, plan in plans.items()},
        out=out,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    opened = open_model(args.model)
    heldout = sample(args.model, "heldout", 12, 0)
    other = sample(args.model, "heldout", 4, 1)
    found: dict[str, Any] = {}
    for seed in range(args.seeds):
        folder = args.out / f"scores-{seed}"
        settings = ScoreSettings(batch_tokens=BATCH_TOKENS, damage_tokens=SAMPLED_TOKENS)
        score(args.model, sample(args.model, "train", 20, seed), folder, settings)
        for share in SHARES:
            began = time.monotonic()
            plans = plans_of(opened, folder, share)
            searched = time.monotonic() - began
            results = judge(opened, plans, heldout, args.out / f"judged-{seed}-{share}")
            candidates = {name: plan for name, plan in plans.items() if name != "random"}
            chosen = judge(opened, candidates, other, args.out / f"auto-{seed}-{share}")
            best = min(chosen, key=lambda name: chosen[name]["kl"])
            results[AUTO] = {**results[best], "chosen": best}
            found[f"{seed} {share}"] = results
            line = {name: round(result["kl"], 4) for name, result in results.items()}
            print(seed, share, f"plans {searched:.0f} s, auto: {best}", line, flush=True)
    return found


def mean_and_width(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {T_95[len(values)] * deviation / math.sqrt(len(values)):.3f}"


def table(found: dict[str, Any], seeds: int) -> str:
    lines = []
    for share in SHARES:
        runs = [found[f"{seed} {share}"] for seed in range(seeds)]
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


def quantized(args: argparse.Namespace) -> str:
    """KL of pruned, pruned and rounded, and rounded alone (seed 0)."""
    opened, heldout = open_model(args.model), sample(args.model, "heldout", 12, 0)
    tokens = sample(args.model, "train", 20, 0)
    models: dict[str, Any] = {}
    rounded_to(args, args.model, args.out / f"whole-{args.scheme}", tokens)
    models["nothing pruned"] = args.out / f"whole-{args.scheme}"
    for share in SHARES:
        plans = plans_of(opened, args.out / "scores-0", share)
        for name in args.criteria.split(","):
            folder = args.out / f"{name}-{share}"
            prune_checkpoint(opened.source, plans[name], folder)
            rounded = args.out / f"{name}-{share}-{args.scheme}"
            rounded_to(args, folder, rounded, tokens)
            models |= {f"{name} {share:.0%}": folder, f"{name} {share:.0%} rounded": rounded}
    found = evaluate_all(
        models,
        heldout,
        EvalSettings(batch_tokens=BATCH_TOKENS),
        reference=args.model,
        out=args.out / f"judged-{args.scheme}",
    )
    alone = found["nothing pruned"]["kl"]
    lines = [
        f"\n{args.scheme} on top (seed 0); rounding alone, nothing pruned: KL {alone:.3f}\n",
        "| pruned | KL pruned | KL pruned and rounded | pruning's share | rounding's share |",
        "|---|---|---|---|---|",
    ]
    for name in (n for n in found if n.endswith("%")):
        pruned, both = found[name]["kl"], found[f"{name} rounded"]["kl"]
        lines.append(
            f"| {name} | {pruned:.3f} | {both:.3f} "
            f"| {pruned / both:.0%} | {1 - pruned / both:.0%} |"
        )
    return "\n".join(lines)


def repaired(args: argparse.Namespace) -> str:
    """KL of `reap`, `output-error` and the latter repaired, over the seeds."""
    opened, heldout = open_model(args.model), sample(args.model, "heldout", 12, 0)
    lines = []
    for share in (float(share) for share in args.shares.split(",")):
        found: dict[str, list[float]] = {}
        for seed in range(args.seeds):
            tokens, folder = sample(args.model, "train", 20, seed), args.out / f"scores-{seed}"
            settings = ScoreSettings(batch_tokens=BATCH_TOKENS, damage_tokens=SAMPLED_TOKENS)
            score(args.model, tokens, folder, settings)
            plans = plans_of(opened, folder, share)
            models: dict[str, Any] = {
                name: pruned_view(opened, plans[name]) for name in ("reap", OUTPUT_ERROR)
            }
            for kinds in args.repairs.split(","):
                how = RepairSettings(
                    kinds=repair_kinds(kinds.replace("+", ",")),
                    tokens=tokens,
                    batch_tokens=BATCH_TOKENS,
                )
                out = args.out / f"repaired-{seed}-{share}-{kinds}"
                plan = plans[OUTPUT_ERROR]
                prune_checkpoint(opened.source, plan, out, repair=Repair(opened, plan, how))
                models[f"{OUTPUT_ERROR}, {kinds}"] = out
            results = evaluate_all(
                models,
                heldout,
                EvalSettings(batch_tokens=BATCH_TOKENS),
                reference=args.model,
                identity={name: [share, seed, name] for name in models},
                out=args.out / f"judged-repairs-{seed}-{share}",
            )
            for name, result in results.items():
                found.setdefault(name, []).append(result["kl"])
            print(seed, share, {n: round(r["kl"], 4) for n, r in results.items()}, flush=True)
        lines += [
            f"\n{share:.0%} removed\n",
            "| kept by, repair | KL | against reap |",
            "|---|---|---|",
        ]
        mean = {name: sum(values) / len(values) for name, values in found.items()}
        for name, values in found.items():
            against = mean[name] / mean["reap"] - 1
            lines.append(f"| {name} | {mean_and_width(values)} | {against:+.0%} |")
    return "\n".join(lines)


def rounded_to(args: argparse.Namespace, model: Path, out: Path, tokens: TokenSet) -> None:
    scheme = scheme_with(args.scheme, group_size=args.group_size)
    quantize(
        open_model(model),
        uniform(scheme),
        out,
        QuantizeSettings(method="gptq", batch_tokens=BATCH_TOKENS),
        tokens=tokens,
    )
    verify_checkpoint(out, model).demand()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scheme")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--criteria", default="reap,output-error")
    parser.add_argument("--repairs")
    parser.add_argument("--shares", default=",".join(str(share) for share in SHARES))
    args = parser.parse_args()
    if args.repairs:
        print(repaired(args))
        return
    if args.scheme:
        print(quantized(args))
        return
    found = run(args)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    print(table(found, args.seeds))


if __name__ == "__main__":
    main()
