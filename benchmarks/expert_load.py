"""How unevenly a scored model's experts are used: by layer, from `thresher score`'s folder.

    python -m benchmarks.expert_load SCORES [--share 0.5]

Experts that saw no token, the busiest one's load in mean loads, the largest mean output in medians
(living experts), and which share of the routed pairs the experts served that `reap` keeps when
--share of them go, and the busiest as many. benchmarks/criteria.py leaves such folders as
OUT/scores-SEED. Two cores and a second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reap.criteria import score_experts
from reap.stats import SaliencyStats


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args()
    stats = SaliencyStats.load(args.scores)
    print("| layer | dead | busiest / mean | loudest / median | served: reap's | busiest |")
    print("|---|--:|--:|--:|--:|--:|")
    for layer in sorted(stats.layers):
        sums = stats.pooled(layer)
        count_E = sums.count.double()
        keep = round(len(count_E) * (1 - args.share))
        living = count_E > 0
        norm_E = (sums.norm_sum / count_E)[living]
        kept = score_experts("reap", sums, layer=layer).topk(keep).indices
        served = float(count_E[kept].sum() / count_E.sum())
        most = float(count_E.topk(keep).values.sum() / count_E.sum())
        print(
            f"| {layer} | {int((~living).sum())} | {float(count_E.max() / count_E.mean()):.1f} "
            f"| {float(norm_E.max() / norm_E.median()):.1f} | {served:.0%} | {most:.0%} |"
        )


if __name__ == "__main__":
    main()
