"""Would `--criterion auto` gain by choosing layer by layer? docs/log.md: no.

    python -m benchmarks.auto_by_layer MODEL OUT [--seeds 2]

As benchmarks.criteria: for each seed a calibration sample, its scores and every criterion's plan at
50 % and 25 % removed. A second scoring pass over 4 *other* held-out samples of each domain gives
the damage e(S) that each criterion's experts of each layer do there; each layer takes the
criterion of least e(S), and that plan is judged on the held-out text beside `output-error` and
`router_weight` (the best single score on the uneven model).
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benchmarks.criteria import BATCH_TOKENS, SHARES, judge, plans_of, sample
from models.opening import open_model
from reap.criteria import OUTPUT_ERROR
from reap.damage import SAMPLED_TOKENS
from reap.damage_file import DamageStats
from reap.elimination import kept_error
from reap.score import ScoreSettings, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    opened = open_model(args.model)
    assert opened.spec.num_groups == 1, "quotas of groups are not followed here"
    settings = ScoreSettings(batch_tokens=BATCH_TOKENS, damage_tokens=SAMPLED_TOKENS)
    score(args.model, sample(args.model, "heldout", 4, 1), args.out / "other", settings)
    other = DamageStats.load(args.out / "other")
    heldout = sample(args.model, "heldout", 12, 0)
    for seed in range(args.seeds):
        folder = args.out / f"scores-{seed}"
        score(args.model, sample(args.model, "train", 20, seed), folder, settings)
        for share in SHARES:
            plans = plans_of(opened, folder, share)
            del plans["random"]
            best = {
                layer: min(
                    plans,
                    key=lambda name: kept_error(
                        other.layers[layer],
                        plans[name].layers[layer],
                        1,
                    ),
                )
                for layer in plans[OUTPUT_ERROR].layers
            }
            mixed = {layer: plans[name].layers[layer] for layer, name in best.items()}
            judged = {
                "by layer": replace(plans[OUTPUT_ERROR], layers=mixed),
                OUTPUT_ERROR: plans[OUTPUT_ERROR],
                "router_weight": plans["router_weight"],
            }
            found = judge(opened, judged, heldout, args.out / f"judged-{seed}-{share}")
            kl = {name: round(result["kl"], 4) for name, result in found.items()}
            print(f"seed {seed}, {share:.0%} removed: {kl}, {dict(Counter(best.values()))}")


if __name__ == "__main__":
    main()
