"""Confidence intervals by bootstrap over samples (documents, problems), never over tokens.

Tokens of one document are not independent, so whole samples are drawn with replacement, within
each stratum (domain) as many as it has: the mix of domains is a choice, not chance. The figure is a
ratio of sums, sum(values) / sum(weights), as the mean over tokens is. A *paired* interval draws
the same samples for both runs, which removes what the samples themselves vary by.

    lo, hi = 2.5 % and 97.5 % percentiles of the ratio over REPEATS draws

The percentile interval is plain and needs no normality; it is a little narrow for few samples
(under some 20), which is why none is given under MIN_SAMPLES: strata with fewer are drawn
together, for a stratum of one sample varies by nothing. Seeded: same data, same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

REPEATS = 2000
LEVEL = 0.95
MIN_SAMPLES = 5
SEED = 20250101

Array = np.ndarray
Interval = tuple[float, float]


def joined(strata_S: Sequence[int] | Array) -> Array | None:
    """Strata of at least MIN_SAMPLES: smaller ones made one, which joins the smallest of the
    others where it is still too small; None for fewer samples in all."""
    strata, sizes = np.unique(strata_S, return_inverse=True, return_counts=True)[1:]
    if len(strata) < MIN_SAMPLES:
        return None
    few_S = sizes[strata] < MIN_SAMPLES
    into = len(sizes)
    if few_S.sum() < MIN_SAMPLES and not few_S.all():
        into = int(strata[~few_S][np.argmin(sizes[strata[~few_S]])])
    return np.where(few_S, into, strata)


def draws(strata_S: Sequence[int] | Array, repeats: int = REPEATS) -> Iterator[Array]:
    """Blocks [repeats of a block, S] of how often each sample is drawn."""
    strata = np.asarray(strata_S)
    generator = np.random.default_rng(SEED)
    block = max(1, min(repeats, 4_000_000 // max(1, len(strata))))
    for start in range(0, repeats, block):
        size = min(block, repeats - start)
        counts = np.zeros((size, len(strata)))
        for stratum in np.unique(strata):
            mine = np.flatnonzero(strata == stratum)
            counts[:, mine] = generator.multinomial(
                len(mine), np.full(len(mine), 1 / len(mine)), size
            )
        yield counts


def percentiles(values: Array) -> Interval:
    """The central LEVEL of the values."""
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def ratio_intervals(
    columns: dict[str, Array],
    weights_S: Array,
    strata_S: Sequence[int] | Array,
    shapes: dict[str, Callable[[Array], Array]] | None = None,
) -> dict[str, Interval] | None:
    """Interval of sum(column) / sum(weights) for each column [S]; None for too few samples.

    `shapes` maps a column's ratio to what is reported (np.exp for perplexity); it must not fall.
    """
    used = np.asarray(weights_S) > 0
    weights, strata = np.asarray(weights_S, dtype=float)[used], joined(np.asarray(strata_S)[used])
    if strata is None:
        return None
    found: dict[str, list[Array]] = {name: [] for name in columns}
    for counts in draws(strata):
        totals = counts @ weights
        for name, column in columns.items():
            found[name].append(counts @ np.asarray(column, dtype=float)[used] / totals)
    shapes = shapes or {}
    return {
        name: percentiles(shapes.get(name, np.asarray)(np.concatenate(parts)))
        for name, parts in found.items()
    }


def paired_interval(
    first_S: Array,
    second_S: Array,
    first_weights_S: Array,
    second_weights_S: Array,
    strata_S: Sequence[int] | Array,
    shape: Callable[[Array], Array] = np.asarray,
) -> tuple[float, Interval | None]:
    """shape(ratio of the second run) - shape(ratio of the first), and its interval."""
    first, second = np.asarray(first_S, dtype=float), np.asarray(second_S, dtype=float)
    weights = np.asarray(first_weights_S, dtype=float), np.asarray(second_weights_S, dtype=float)
    ratio = [
        np.asarray(own.sum() / w.sum()) for own, w in zip((first, second), weights, strict=True)
    ]
    found = interval_of(
        lambda counts: (
            shape(counts @ second / (counts @ weights[1]))
            - shape(counts @ first / (counts @ weights[0]))
        ),
        strata_S,
    )
    return float(shape(ratio[1]) - shape(ratio[0])), found


def interval_of(
    figure: Callable[[Array], Array], strata_S: Sequence[int] | Array
) -> Interval | None:
    """Interval of what `figure` makes of draws [repeats, S]; None for too few samples."""
    strata = joined(strata_S)
    if strata is None:
        return None
    return percentiles(np.concatenate([figure(counts) for counts in draws(strata)]))
