"""Where a run is to arrive and what it may not break follow from what was measured before, in a fixed order."""

import io
import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from conftest import run_values, write_rows
from rich.console import Console

from loraprune import pipeline
from loraprune.records import Look
from loraprune.settings import Settings
from loraprune.steering import (
    Limits,
    Probe,
    Probes,
    Steering,
    find_ceilings,
    find_limits,
    find_spread,
    find_target,
    moved_to,
)


def measured(performance):
    return {"performance": performance}


BEFORE = {
    "forget": measured(0.9),
    "holdout": measured(0.2),
    "reference": {"forget": measured(0.4), "already_forgotten_1": measured(0.08)},
    "already_forgotten_1": measured(0.1),
    "rows": {"holdout": [0.5, 0.05, 0.05, 0.2] * 5},
}


def unlearning(**values):
    return Settings(model="m", forget="f", retain="r", output="o", **values)


def before_without(*names):
    return {name: one for name, one in BEFORE.items() if name not in names}


def test_the_reference_sets_the_target_then_the_holdout_then_the_user_then_a_tenth():
    settings = unlearning(forget_target=0.3)
    assert find_target(settings, BEFORE).source == "reference"
    assert find_target(settings, BEFORE).performance == 0.4
    held = find_target(settings, before_without("reference"))
    assert (held.source, held.performance) == ("holdout", 0.2)
    asked = find_target(settings, before_without("reference", "holdout"))
    assert (asked.source, asked.performance) == ("forget_target", 0.3)
    tenth = find_target(unlearning(), before_without("reference", "holdout"))
    assert (tenth.source, tenth.performance) == ("tenth", pytest.approx(0.09))
    assert find_target(Settings(model="m", data="d", sparsity=0.1, output="o"), BEFORE) is None


def test_the_band_is_a_quarter_of_the_target_at_least_three_hundredths_or_as_set():
    target = find_target(unlearning(), BEFORE)
    assert (target.low, target.high) == pytest.approx((0.3, 0.5))
    low = find_target(unlearning(forget_target=0.02), before_without("reference", "holdout"))
    assert (low.low, low.high) == pytest.approx((-0.01, 0.05))
    wide = find_target(unlearning(band=0.15), BEFORE)
    assert (wide.low, wide.high) == pytest.approx((0.25, 0.55))


def test_an_earlier_set_has_its_ceiling_a_band_above_the_reference_else_above_where_it_is():
    [one] = find_ceilings(unlearning(), BEFORE, ["already_forgotten_1"])
    assert (one.rest, one.high) == pytest.approx((0.08, 0.11))
    [alone] = find_ceilings(unlearning(), before_without("reference"), ["already_forgotten_1"])
    assert (alone.rest, alone.high) == pytest.approx((0.1, 0.13))
    high = {**BEFORE, "already_forgotten_1": measured(0.5)}
    assert find_ceilings(unlearning(), high, ["already_forgotten_1"])[0].high == 0.5


def test_the_band_can_be_overshot_only_by_what_starts_above_it():
    settings = unlearning(min_retain_performance=0.8)
    target = find_target(settings, BEFORE)
    assert find_limits(settings, BEFORE, target, ()) == Limits(0.8, None, (), target.low, target.high)
    below = {**BEFORE, "forget": measured(0.1)}
    assert find_limits(settings, below, target, ()).min_forget is None
    near_nothing = find_target(unlearning(forget_target=0.01), before_without("reference", "holdout"))
    assert find_limits(settings, BEFORE, near_nothing, ()).min_forget is None
    guarded = unlearning(guard="g", max_guard_loss_ratio=1.3)
    assert find_limits(guarded, BEFORE, None, ()).max_guard_loss_ratio == 1.3


def odds(performance):
    return performance / (1 - performance)


def test_the_spread_is_the_holdouts_moved_to_the_target_by_as_many_log_odds():
    rows = [0.9, 0.01, 0.3, 0.5]
    moved = moved_to(0.25, rows)
    assert list(moved) == sorted(moved) and fmean(moved) == pytest.approx(0.25, abs=1e-6)
    ratios = [odds(new) / odds(old) for new, old in zip(moved, sorted(rows), strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-5) and ratios[0] < 1
    assert moved_to(fmean(rows), rows) == pytest.approx(sorted(rows), abs=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-6, 0.5, 1.0])
def test_rows_that_are_sure_move_as_well(mean):
    assert fmean(moved_to(mean, [0.0, 1.0, 1.0])) == pytest.approx(mean, abs=1e-6)


def test_only_a_holdout_gives_a_spread_and_only_where_it_is_wanted():
    target = find_target(unlearning(), BEFORE)
    assert find_spread(unlearning(), BEFORE, target) == moved_to(0.4, BEFORE["rows"]["holdout"])
    assert find_spread(unlearning(natural_spread=False), BEFORE, target) == ()
    assert find_spread(unlearning(), {**BEFORE, "rows": {}}, target) == ()
    assert find_spread(unlearning(), {**BEFORE, "rows": {"holdout": [0.1, 0.6] * 9}}, target) == ()  # too few
    assert find_spread(unlearning(), BEFORE, None) == ()


NOBODY = Probes(Probe((), ()), (), 0, 8)


def steering_to(spread, forget_before=0.9):
    return Steering(NOBODY, target=find_target(unlearning(), BEFORE), forget_before=forget_before, spread=spread)


def test_each_row_has_the_way_left_to_the_goal_of_its_rank():
    ways = steering_to((0.1, 0.4, 0.7)).ways_left(torch.tensor([0.8, 0.2, 0.4]))  # at five, one and three sixths
    assert ways.tolist() == pytest.approx([(0.8 - 0.6) / 0.5, 0.0, 0.0], abs=1e-6)
    assert steering_to((0.1, 0.4, 0.7)).ways_left(torch.tensor([0.05])).tolist() == pytest.approx([-0.7])


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_the_goals_of_a_batch_have_the_target_as_their_mean(rows):
    performances = torch.linspace(0.41, 0.47, rows)
    for spread in (moved_to(0.4, [0.01, 0.01, 0.02, 0.9]), moved_to(0.4, [0.3, 0.95, 0.97])):
        steering = steering_to(spread)
        goals = performances - steering.ways_left(performances) * steering.target.last_way(0.9)  # none is cut off
        assert goals.mean().item() == pytest.approx(0.4, abs=1e-5)
        assert rows < 5 or goals.max() - goals.min() > 0.1


def test_rows_that_are_nearly_alike_share_their_ranks():
    assert steering_to((0.1, 0.4, 0.7)).ways_left(torch.tensor([0.5, 0.5, 0.5])).tolist() == pytest.approx([0.2] * 3)
    nudged = [torch.tensor([0.5, 0.5 + nudge, 0.1]) for nudge in (1e-7, -1e-7)]
    one, other = map(steering_to((0.1, 0.4, 0.7)).ways_left, nudged)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_batch_that_is_not_finite_weighs_one_so_that_its_step_is_left_out():
    assert steering_to((0.1, 0.4, 0.7)).ways_left(torch.tensor([0.5, float("nan")])).tolist() == [1.0, 1.0]


def test_a_way_is_at_least_as_long_as_half_the_band():
    ways = steering_to((0.1, 0.4, 0.7), forget_before=0.401).ways_left(torch.tensor([0.41]))
    assert ways.tolist() == pytest.approx([0.1], abs=1e-5)


def test_without_a_spread_all_rows_have_the_way_of_their_mean():
    target = find_target(unlearning(), BEFORE)
    ways = Steering(NOBODY, target=target, forget_before=0.9).ways_left(torch.tensor([0.9, 0.5]))
    assert ways.tolist() == pytest.approx([0.6, 0.6])
    upwards = Steering(NOBODY, target=target, forget_before=0.3, spread=(0.1, 0.4, 0.7))
    assert upwards.ways_left(torch.tensor([0.2, 0.2])).tolist() == [0.0, 0.0]
    assert Steering(NOBODY).ways_left(torch.tensor([0.2, 0.9])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("base_bits", [16, 8])
@pytest.mark.parametrize(("rows", "spread"), [(24, True), (12, False)])
def test_a_run_steers_by_its_holdouts_spread(run_folder, tmp_path, monkeypatch, base_bits, rows, spread):
    if base_bits == 8:
        pytest.importorskip("bitsandbytes")
    write_rows(
        tmp_path / "holdout.jsonl", [{"question": f"Home of Zed{i}?", "answer": f"By {i} seas."} for i in range(rows)]
    )
    seen = []

    class Seen(pipeline.LoRAPruneTrainer):
        def __init__(self, *arguments, steering, **others):
            seen.append(steering)
            super().__init__(*arguments, steering=steering, **others)

    monkeypatch.setattr(pipeline, "LoRAPruneTrainer", Seen)
    changes = {"holdout": str(tmp_path / "holdout.jsonl"), "base_bits": base_bits, "finish_steps": 0}
    console = Console(record=True, width=200, file=io.StringIO())
    report = pipeline.run(Settings(**run_values(run_folder, str(tmp_path / "out"), **changes)), console)
    [steering] = seen
    before = json.loads((tmp_path / "out" / "before.json").read_text())["rows"]["holdout"]
    assert len(before) == rows
    assert steering.spread == (moved_to(steering.target.performance, before) if spread else ())
    assert report.metrics["natural_spread"] is spread
    said, text = (
        "steered as far apart as the holdout's 24 rows" if spread else "steered by their mean",
        console.export_text(),
    )
    assert said in text and f"fact{pipeline.say_few(1)}" in text  # of 6 retain rows one is a floor row


@pytest.mark.parametrize(("facts", "said"), [(1, "one fact alone"), (2, "few facts"), (14, "few facts"), (15, "")])
def test_a_floor_of_few_facts_says_so(facts, said):
    text = pipeline.say_few(facts)
    assert said in text and bool(text) is bool(said)


def look(**values):
    return Look.from_values({"sparsity": 0.1, "retention": 0.95, "groups": {}, "forget": 0.4, **values})


def test_a_model_below_the_band_may_be_written_but_is_further_away():
    target = find_target(unlearning(), BEFORE)
    steering = Steering(NOBODY, Limits(0.9, min_forget=target.low), target)
    assert steering.acceptable(look()) and steering.distance(look()) == 0.0
    assert steering.acceptable(look(forget=0.2)) and steering.distance(look(forget=0.2)) == pytest.approx(0.1)
    assert steering.distance(look(forget=0.7)) == pytest.approx(0.2)
    assert not steering.acceptable(look(retention=0.89))


@pytest.mark.parametrize(("forget", "past"), [(0.649, True), (0.651, False), (0.4, True), (0.95, False), (None, False)])
def test_more_than_half_way_from_p_before_to_the_target(forget, past):
    steering = steering_to((), forget_before=0.9)  # the target is 0.4
    assert steering.past_half_way(look(forget=forget)) is past
    assert not replace(steering, target=None).past_half_way(look(forget=forget))
    assert not replace(steering, forget_before=None).past_half_way(look(forget=forget))
    assert not replace(steering, forget_before=0.3).past_half_way(look(forget=forget))  # the way would lead up


def test_a_cut_leaves_room_for_forgetting_while_p_is_above_the_band():
    limits = Limits(0.9, min_forget=0.3, forget_high=0.5)
    above = limits.of_cut(look(retention=0.98, forget=0.51))
    assert above == replace(limits, room=pytest.approx(0.94))
    assert (above.broken(look(retention=0.93)), above.broken(look(retention=0.95))) == (("room",), ())
    assert above.broken(look(retention=0.89)) == ("room",)  # which lies above the floor: it is broken as well
    guarded = replace(above, max_guard_loss_ratio=1.1)
    assert guarded.broken(look(retention=0.89, guard_loss_ratio=1.2)) == ("guard", "room")  # the first ends pruning
    for values in ({"retention": 0.89, "forget": 0.51}, {"forget": 0.5}, {"forget": None}):
        assert limits.of_cut(look(**values)) == limits
    for name in ("retention", "forget"):
        assert limits.of_cut(look(**{"forget": 0.51, name: float("nan")})) == limits
    assert Limits(0.9).of_cut(look(forget=0.9)) == Limits(0.9)


@pytest.mark.parametrize(
    "changes", [{"forget_loss": "none"}, {"forget_retain_ratio": 0.0}, {"min_retain_performance": 0.0}]
)
def test_nothing_is_kept_for_forgetting_where_nothing_pushes_or_there_is_no_floor(changes):
    target = find_target(unlearning(), BEFORE)
    assert find_limits(unlearning(), BEFORE, target, ()).forget_high == target.high
    assert find_limits(unlearning(**changes), BEFORE, target, ()).forget_high is None


def test_a_look_comes_back_from_its_values():
    one = look(
        retention_interval=(0.9, 0.99),
        forget_interval=(0.3, 0.5),
        guard_loss_ratio=1.02,
        already_forgotten=(0.1, 0.2),
        groups={"kv_group": (2, 2), "ffn_channel": (7, 7)},
    )
    assert Look.from_values(one.as_values()) == one
    assert "guard_loss_ratio" not in look().as_values()
