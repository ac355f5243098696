"""Interval: how far a number measured on a few rows may be off by chance.

Reads    two numbers a row, and which rows are of one fact
Gives    ratio_interval
Source   percentile bootstrap, Efron 1979, by scipy.stats.bootstrap; facts are resampled whole, since their rows agree
Symbols  f facts
"""

from collections.abc import Sequence

import numpy as np
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
    found = bootstrap(
        tuple(sums),
        lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // len(names)),
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
