"""An interval says how far a number measured on a few rows may be off; rows of one fact count as one."""

import random

import pytest

from loraprune.interval import ratio_interval


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


@pytest.mark.parametrize(
    ("after", "facts"), [([0.5], [0]), ([0.5, 0.7], [3, 3]), ([0.5, float("nan")], [0, 1]), ([], [])]
)
def test_where_it_cannot_be_had_there_is_none(after, facts):
    assert ratio_interval(after, [1.0] * len(after), facts) is None
