"""An interval says how far a number measured on a few rows may be off; rows of one fact count as one."""

import random

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from loraprune.interval import auc_interval, mean_interval, ratio_interval


def sample(count, seed=0):
    draw = random.Random(seed)
    before = [draw.uniform(0.8, 1.0) for _ in range(count)]
    return [one * draw.uniform(0.6, 1.0) for one in before], before


def test_the_interval_holds_the_number_it_is_of_and_is_the_same_every_time():
    after, before = sample(40)
    low, high = ratio_interval(after, before, range(40))
    assert low < sum(after) / sum(before) < high
    assert ratio_interval(after, before, range(40)) == (low, high)


def test_nineteen_in_twenty_intervals_hold_the_true_number():
    """Retention of rows drawn from 0.6 to 1.0 of what was known is 0.8."""
    held = 0
    for seed in range(200):
        low, high = ratio_interval(*sample(40, seed), range(40))
        held += low <= 0.8 <= high
    assert 180 <= held <= 198


def test_more_rows_make_it_narrower_but_not_more_rows_of_the_same_facts():
    after, before = sample(20)
    low, high = ratio_interval(after, before, range(20))
    wide = ratio_interval(*sample(200), range(200))
    assert wide[1] - wide[0] < (high - low) / 2
    repeated = ratio_interval(after * 10, before * 10, list(range(20)) * 10)
    assert repeated == pytest.approx((low, high))


def test_with_ones_below_it_is_the_interval_of_the_mean():
    low, high = ratio_interval([0.5, 0.7, 0.9, 0.1], [1.0] * 4, range(4))
    assert 0.1 <= low < 0.55 < high <= 0.9
    assert mean_interval([0.5, 0.7, 0.9, 0.1], range(4)) == (low, high)


@pytest.mark.parametrize(
    ("after", "facts"), [([0.5], [0]), ([0.5, 0.7], [3, 3]), ([0.5, float("nan")], [0, 1]), ([], [])]
)
def test_where_it_cannot_be_had_there_is_none(after, facts):
    assert ratio_interval(after, [1.0] * len(after), facts) is None


def scores(count, shift, seed):
    draw = random.Random(seed)
    return [round(draw.gauss(shift, 1), 1) for _ in range(count)]  # rounded, so that some are equal


def slow_auc_interval(attacks, member_facts, other_facts, of):
    """The same bootstrap, one resample at a time, by scikit-learn's AUC over the rows of the drawn facts."""

    def drawn(values, facts, chosen):
        return [value for fact in chosen for value, mine in zip(values, facts, strict=True) if mine == fact]

    def statistic(members, others):
        aucs = []
        for low, high in attacks:
            one, other = drawn(low, member_facts, members), drawn(high, other_facts, others)
            aucs.append(roc_auc_score([0] * len(one) + [1] * len(other), one + other))
        return of(*aucs)

    sides = tuple(np.unique(facts) for facts in (member_facts, other_facts))
    options = {"vectorized": False, "method": "percentile", "n_resamples": 1000, "rng": np.random.default_rng(0)}
    return tuple(bootstrap(sides, statistic, **options).confidence_interval)


def test_the_interval_of_an_auc_is_that_of_a_plain_bootstrap_of_facts_on_either_side():
    member_facts, other_facts = [3, 0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 3, 4]
    one = scores(7, 0.0, 1), scores(6, 1.0, 2)
    other = scores(7, 0.0, 3), scores(6, 0.5, 4)
    for attacks, of in (([one], lambda auc: auc), ([one, other], lambda auc, against: auc - against)):
        found = auc_interval(attacks, member_facts, other_facts, of)
        assert found == pytest.approx(slow_auc_interval(attacks, member_facts, other_facts, of), abs=1e-12)


def test_the_interval_of_an_auc_holds_the_true_one_in_nineteen_of_twenty_cases():
    """Scores one standard deviation apart: the AUC is 0.760."""
    held = 0
    for seed in range(60):
        members, others = scores(60, 0.0, seed), scores(60, 1.0, seed + 1000)
        low, high = auc_interval([(members, others)], range(60), range(60))
        held += low <= 0.760 <= high
    assert 52 <= held <= 60


@pytest.mark.parametrize(
    ("members", "facts"), [([0.5], [0]), ([0.5, 0.7], [3, 3]), ([0.5, float("nan")], [0, 1]), ([], [])]
)
def test_where_the_interval_of_an_auc_cannot_be_had_there_is_none(members, facts):
    assert auc_interval([(members, [0.1, 0.2])], facts, [0, 1]) is None
    assert auc_interval([([0.1, 0.2], members)], [0, 1], facts) is None
