"""How much may be gone by when: fast at first, slower near the end, never more than all of it."""

from itertools import pairwise

import pytest

from loraprune.schedule import cubic, learning_rate_factor, pruning_round


@pytest.mark.parametrize("rounds", [1, 2, 7, 12])
def test_the_cubic_schedule_rises_from_nothing_to_all_in_ever_smaller_steps(rounds):
    values = [cubic(done, rounds) for done in range(rounds + 1)]
    steps = [after - before for before, after in pairwise(values)]
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert all(step > 0 for step in steps)
    assert steps == sorted(steps, reverse=True)


def test_the_cubic_schedule_is_the_papers_and_ends_where_it_ends():
    assert cubic(1, 2) == 1 - 0.5**3
    assert cubic(3, 12) == pytest.approx(1 - 0.75**3)
    assert cubic(13, 12) == 1.0


def test_pruning_steps_follow_the_warm_up_at_even_distances_and_are_counted():
    rounds = {step: turn for step in range(1, 40) if (turn := pruning_round(step, 5, 3, 4)) is not None}
    assert rounds == {8: 1, 11: 2, 14: 3, 17: 4}


def test_without_warm_up_the_first_pruning_step_comes_after_one_distance():
    assert [pruning_round(step, 0, 2, 2) for step in range(1, 7)] == [None, 1, None, 2, None, None]


def test_the_learning_rate_rises_stays_and_falls_when_recovery_begins():
    factors = [learning_rate_factor(step, warmup_steps=8, main_steps=20, finish_steps=10) for step in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:21]) == {1.0}
    falling = factors[20:]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == 10
    assert falling[-1] == pytest.approx(0.1)


def test_the_learning_rate_never_falls_to_nothing():
    assert learning_rate_factor(10**6, 8, 20, 10) > 0
    assert learning_rate_factor(0, 0, 0, 0) > 0
