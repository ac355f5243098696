"""Interval: how far a number measured on a few rows may be off by chance.

Reads    numbers of rows, and which rows are of one fact
Gives    ratio_interval, mean_interval, auc_interval
Source   percentile bootstrap, Efron 1979, by scipy.stats.bootstrap; facts are resampled whole, since their rows agree
Symbols  f facts, m members and o others, s resamples
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from loraprune.records import Interval

CONFIDENCE, RESAMPLES = 0.95, 1000
NUMBERS_AT_ONCE = 10_000_000  # drawn facts held in memory together


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], facts: Sequence[int]) -> Interval | None:
    """Return the 95% bootstrap interval of sum(numerators) / sum(denominators), one of each a row.

    `facts`: rows with the same number are drawn together. With denominators of ones it is the interval of the mean.
    None where it cannot be had: fewer than two facts, or a number that is not finite. The same rows give the same
    interval.
    """
    names, where = np.unique(np.asarray(facts), return_inverse=True)
    sums = [np.bincount(where, weights=np.asarray(one, dtype=np.float64)) for one in (numerators, denominators)]
    if len(names) < 2 or not all(np.isfinite(one).all() for one in sums):
        return None
    return resampled_interval(sums, lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis), paired=True)


def resampled_interval(samples: Sequence[Any], statistic: Callable[..., Any], *, paired: bool = False) -> Interval:
    """Return the 95% bootstrap interval of a statistic of samples, (n,) each; `paired` ones are drawn together."""
    drawn = len(samples[0]) if paired else sum(map(len, samples))
    found = bootstrap(
        tuple(samples),
        statistic,
        paired=paired,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // drawn),
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float], facts: Sequence[int]) -> Interval | None:
    """Return the 95% bootstrap interval of the mean of one number a row; None as in `ratio_interval`."""
    return ratio_interval(values, [1.0] * len(values), facts)


Scores = Sequence[float]
Array = NDArray[np.float64]


def auc_interval(
    attacks: Sequence[tuple[Scores, Scores]],
    member_facts: Sequence[int],
    other_facts: Sequence[int],
    of: Callable[..., Any] = lambda auc: auc,
) -> Interval | None:
    """Return the 95% bootstrap interval of `of(auc, ...)`, one AUC for each attack.

    An attack is the members' and the others' scores, low for members. Facts of either side are drawn whole, the sides
    apart, the same draw for all attacks: two models' AUCs over the same rows stay paired. None as in `ratio_interval`.
    """
    sides = [np.unique(np.asarray(facts), return_inverse=True) for facts in (member_facts, other_facts)]
    sizes = [len(names) for names, _ in sides]
    if min(sizes) < 2 or not all(np.isfinite(scores).all() for pair in attacks for scores in pair):
        return None
    counts = [np.bincount(where).astype(np.float64) for _, where in sides]
    wins = [_wins_by_fact(members, others, sides[0][1], sides[1][1]) for members, others in attacks]

    def statistic(members: NDArray[np.int64], others: NDArray[np.int64], axis: int = -1) -> Any:
        drawn = [_times_drawn(one, size) for one, size in zip((members, others), sizes, strict=True)]  # (s, f)
        pairs = (drawn[0] @ counts[0]) * (drawn[1] @ counts[1])
        return of(*(((drawn[0] @ won) * drawn[1]).sum(-1) / pairs for won in wins))

    return resampled_interval([np.arange(size) for size in sizes], statistic)


def _wins_by_fact(members: Scores, others: Scores, member_of: Any, other_of: Any) -> Array:
    """Return how many pairs of rows of two facts the attack tells right, a tie being half, (f of m, f of o)."""
    low, high = np.asarray(members, dtype=np.float64)[:, None], np.asarray(others, dtype=np.float64)
    won = (low < high) + 0.5 * (low == high)
    rows, columns = np.argsort(member_of, kind="stable"), np.argsort(other_of, kind="stable")
    starts = [np.flatnonzero(np.diff(one, prepend=-1)) for one in (member_of[rows], other_of[columns])]
    by_member = np.add.reduceat(won[rows], starts[0], axis=0)
    return np.add.reduceat(by_member[:, columns], starts[1], axis=1)


def _times_drawn(facts: NDArray[np.int64], size: int) -> Array:
    """Return how often each of `size` facts was drawn in every resample, (s, f)."""
    resamples = np.arange(len(facts))[:, None]
    flat = np.bincount((facts + resamples * size).ravel(), minlength=len(facts) * size)
    return flat.reshape(len(facts), size).astype(np.float64)
