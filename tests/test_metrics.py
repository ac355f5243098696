"""Metrics: the plan's formulas, on numbers whose answer is known."""

import pytest

from loraprune.metrics import forget_drop, retention, unlearning_efficiency


def test_a_forget_drop_is_a_difference_of_performances():
    assert forget_drop(0.75, 0.25) == 0.5
    assert forget_drop(0.25, 0.75) == -0.5


def test_retention_is_a_ratio_and_may_exceed_one():
    assert retention(0.8, 0.6) == pytest.approx(0.75)
    assert retention(0.5, 0.6) == pytest.approx(1.2)


def test_nothing_known_before_has_no_retention():
    with pytest.raises(ValueError, match="P_before is 0"):
        retention(0.0, 0.4)


def test_efficiency_divides_the_drop_by_what_it_cost():
    assert unlearning_efficiency(0.5, 0.75, 10.0, 1000) == {
        "forget_per_retain": pytest.approx(2.0),
        "forget_per_second": pytest.approx(0.05),
        "forget_per_removed_parameter": pytest.approx(0.0005),
    }


@pytest.mark.parametrize("kept", [0.995, 1.0, 1.3])
def test_a_loss_below_one_percent_counts_as_one_percent(kept):
    assert unlearning_efficiency(0.5, kept, 1.0, 1)["forget_per_retain"] == pytest.approx(50.0)


@pytest.mark.parametrize("nothing", [None, 0])
def test_a_rate_without_a_denominator_is_none(nothing):
    rates = unlearning_efficiency(0.5, 0.9, nothing, nothing)
    assert rates["forget_per_second"] is None
    assert rates["forget_per_removed_parameter"] is None
