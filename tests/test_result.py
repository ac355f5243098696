"""Which outcome a run has follows from what was written and from what stood in its way."""

import pytest

from loraprune.result import _outcome
from loraprune.settings import Settings
from loraprune.steering import Target

TARGET = Target(0.4, 0.3, 0.5, "reference")
GOAL = Settings(model="m", forget="f", retain="r", output="o", sparsity=0.3)


def outcome(performance=0.4, *, sparsity=0.3, ended_by="budget", breaks=(), target=TARGET, **held):
    values = {
        "sparsity": sparsity,
        "floor": {"held": held.get("floor", True), "final_held": held.get("final", True)},
        "guard": {"held": held.get("guard", True)},
        "already_forgotten": [{"held": True}, {"held": held.get("ceiling", True)}],
        "forget": {"after": {"performance": performance}},
    }
    decision = {"smallest_step": 0.01, "ended_by": ended_by, "breaks": dict.fromkeys(breaks, 1)}
    return _outcome(values, GOAL, target, decision)


def test_the_goal_is_met_inside_the_band_with_the_sparsity_as_near_as_the_steps_are():
    assert outcome() == outcome(0.3) == outcome(0.5) == outcome(sparsity=0.2901) == "target_reached"
    assert outcome(ended_by="floor", breaks=["floor"]) == "target_reached"  # whatever stood in its way
    assert outcome(target=None) == "budget_spent"


@pytest.mark.parametrize("limit", ["floor", "final", "guard", "ceiling"])
def test_a_written_model_that_breaks_a_limit_reached_no_target(limit):
    assert outcome(**{limit: False}) == "floor_reached"


@pytest.mark.parametrize("limit", ["floor", "guard", "ceiling"])
def test_a_missed_goal_is_laid_to_the_limit_that_stood_in_its_way(limit):
    assert outcome(0.6, breaks=[limit]) == outcome(0.6, ended_by=limit) == "floor_reached"
    assert outcome(sparsity=0.2, breaks=[limit]) == "floor_reached"
    assert outcome(sparsity=0.2, breaks=[limit], ended_by="no_candidates") == "no_candidates"


def test_without_one_it_is_the_candidates_or_the_steps():
    assert outcome(0.6, ended_by="no_candidates") == outcome(sparsity=0.2) == "no_candidates"
    assert outcome(0.6) == outcome(0.2) == outcome(0.2, breaks=["band"]) == "budget_spent"
