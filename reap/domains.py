"""What single domains may ask of a plan, after the expensive pass: weights and protection.

Saliency sums are kept by domain, so another mixture needs no other run:

    weights   sum_d weight_d * sums_d instead of sum_d sums_d: each token of domain d counts
              weight_d times. A domain that is not named counts once, 0 leaves it out.
    protect   for every domain named, its own best experts stay whatever the pooled scores say:
              the q best (q a share of the layer's experts if below 1, else a number), by the same
              criterion over that domain's sums alone; with group-limited routing the same number
              from every group, as all that is kept. The rest of the quota goes by pooled score.

Weighting moves a compromise, protection bounds it: an expert that one domain lives on and the
others never call is lost under any mild weight. An expert that saw no token of a domain is never
protected for it. Refused: dropping part of what was asked when the protected ones of several
domains do not fit the quota of a layer or group; that is an error which says how many they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from calibration.mixes import ALL
from models.errors import InputError
from reap.criteria import score_experts
from reap.ranking import best_experts
from reap.stats import SaliencyStats


def all_weights(domains: tuple[str, ...], asked: Mapping[str, float]) -> dict[str, float]:
    """The weight of every domain, in their order; empty when none was asked. InputError for an
    unknown domain or a weight that is none."""
    check_known(domains, asked, "--weights")
    for name, weight in asked.items():
        if not 0 <= weight < float("inf"):
            raise InputError(f"--weights {name}={weight}: give a number from 0 up")
    if not asked:
        return {}
    weights = {name: float(asked.get(name, asked.get(ALL, 1.0))) for name in domains}
    if not any(weights.values()):
        raise InputError("--weights leaves every domain out; give one of them a weight above 0")
    return weights


def protected_counts(
    domains: tuple[str, ...], asked: Mapping[str, float], num_experts: int, num_groups: int
) -> dict[str, float]:
    """How many experts a layer each domain protects, for the domains that protect any; a multiple
    of the groups. InputError for what is no share and no number."""
    check_known(domains, asked, "--protect")
    counts = {}
    for name in domains:
        share = asked.get(name, asked.get(ALL, 0.0))
        if share == 0:
            continue
        size = num_experts // num_groups
        count = round(share * size) * num_groups if share < 1 else share
        if count < 1 or count > num_experts or count % num_groups:
            step = f", in steps of {num_groups} (groups)" if num_groups > 1 else ""
            raise InputError(
                f"--protect {name}:{share:g}: give a share of the {num_experts} experts below 1 "
                f"that comes to one of {size} at least, or a whole number of them{step}"
            )
        counts[name] = float(count)
    return counts


def check_known(domains: tuple[str, ...], asked: Mapping[str, float], option: str) -> None:
    """InputError for a domain that was not scored."""
    unknown = [name for name in asked if name not in (*domains, ALL)]
    if unknown:
        raise InputError(
            f"{option}: no domain {unknown[0]!r} was scored; the domains are {', '.join(domains)} "
            f"({ALL} stands for every one)"
        )


def protected_experts(
    stats: SaliencyStats,
    criterion: str,
    layer: int,
    counts: Mapping[str, float],
    num_groups: int,
    seed: int,
) -> set[int]:
    """The experts of a layer that must stay, by what each domain asks for."""
    found: set[int] = set()
    for domain, count in counts.items():
        sums = stats.pooled(layer, {domain: 1.0})
        scores_E = score_experts(criterion, sums, layer=layer, seed=seed)
        best = best_experts(scores_E, int(count), num_groups)
        found |= set(best) - set(sums.dead)
    return found


def check_protected(
    safe: Set[int], layer: int, keep: int, num_groups: int, num_experts: int
) -> None:
    """InputError unless the protected experts fit the quota of every group."""
    size, quota = num_experts // num_groups, keep // num_groups
    for group in range(num_groups):
        inside = [expert for expert in safe if expert // size == group]
        if len(inside) > quota:
            where = f"layer {layer}" + (f", group {group}" if num_groups > 1 else "")
            raise InputError(
                f"--protect asks for {len(inside)} experts of {where} and {quota} are kept there; "
                "protect fewer or keep more"
            )
