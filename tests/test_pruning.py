"""One pruning step on a live model: it keeps the floor, and a step that cannot leaves no trace."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_CONFIGS, KINDS, make_mask, masked

from loraprune.mask import full_mask
from loraprune.pruning import local_prune, restore_state, take_state, unlearning_prune
from loraprune.records import Look
from loraprune.rules import Rules, smallest_share
from loraprune.sensitivity import SensitivityDict
from loraprune.steering import Limits

RULES = Rules(minimum_forget=0.0)


@pytest.fixture
def model_and_mask():
    model, _, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    return model, live


def scores(live, seed):
    source = torch.Generator().manual_seed(seed)
    kept = live.value.kept
    return {kind: torch.rand(kept[kind].shape, generator=source, dtype=torch.float64) + 0.1 for kind in KINDS}


def both(live):
    """Sensitivities of both sets under which every group is a candidate at threshold 0."""
    return scores(live, 1), scores(live, 2)


def trained_weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def looking(live, retention, **numbers):
    """What measures the model: its retention as given, and its sparsity as it is."""

    def look():
        values = {"retention": retention(), "sparsity": live.value.sparsity(live.groups), "groups": {}}
        return Look.from_values({**values, **{name: one() for name, one in numbers.items()}})

    return look


def step(model, live, *, retention, floor=0.9, ratio=0.2, threshold=0.0, record=None, numbers=None, **others):
    forget, retain = both(live)
    events = [] if record is None else record
    decision = unlearning_prune(
        model,
        forget,
        retain,
        threshold,
        floor,
        look=looking(live, retention, **(numbers or {})),
        ratio=ratio,
        rules=RULES,
        record=lambda kind, look, **values: events.append({"event": kind, **look.as_values(), **values}),
        **others,
    )
    return decision, events


# --- state ---


def test_a_restored_state_is_the_old_one_bit_for_bit(model_and_mask):
    model, live = model_and_mask
    mask = make_mask(live.groups, {"ffn_channel": [[1], [2]]})
    live.set(mask)
    before, weights = take_state(model), trained_weights(model)
    live.set(make_mask(live.groups, {"ffn_channel": [[1, 3], [2, 4]], "kv_group": [[0], [0]]}))
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.1)
    assert not same(trained_weights(model), weights)
    restore_state(model, before)
    assert same(trained_weights(model), weights)
    assert live.value is mask


def test_a_state_holds_the_trained_weights_and_no_others(model_and_mask):
    model, _ = model_and_mask
    assert set(take_state(model).trained) == set(trained_weights(model))
    assert all("lora_" in name for name in take_state(model).trained)


# --- local_prune ---


def test_a_step_masks_what_it_decides_and_stays_within_the_ratio(model_and_mask):
    model, live = model_and_mask
    scored = SensitivityDict.of(*both(live))
    decision = local_prune(model, scored, 0.1, 0.3, rules=Rules(threshold=0.0, minimum_forget=0.0))
    assert same(dict(live.value.kept), dict(full_mask(live.groups).without(decision.removals).kept))
    smallest = min(live.groups.slice_parameters(kind) for kind in KINDS) / live.groups.total_parameters
    assert 0.1 - smallest < live.value.sparsity(live.groups) <= 0.1


def test_no_step_goes_beyond_the_end(model_and_mask):
    model, live = model_and_mask
    local_prune(model, SensitivityDict.of(*both(live)), 0.9, 0.15, rules=Rules(threshold=0.0, minimum_forget=0.0))
    assert 0 < live.value.sparsity(live.groups) <= 0.15


def test_a_second_step_takes_the_rest_and_brings_nothing_back(model_and_mask):
    model, live = model_and_mask
    scored, rules = SensitivityDict.of(*both(live)), Rules(threshold=0.0, minimum_forget=0.0)
    first = local_prune(model, scored, 0.1, 0.3, rules=rules)
    second = local_prune(model, scored, 0.2, 0.3, rules=rules)
    groups = [one.group for one in (*first.removals, *second.removals)]
    assert len(set(groups)) == len(groups) == sum(int((~one).sum()) for one in live.value.kept.values())
    assert local_prune(model, scored, 0.2, 0.3, rules=rules).removals == ()


def test_nothing_goes_once_enough_is_forgotten(model_and_mask):
    model, live = model_and_mask
    scored, rules = SensitivityDict.of(*both(live)), Rules(threshold=0.0, minimum_forget=0.0)
    done = local_prune(model, scored, 0.2, 0.3, rules=rules, forget_performance=0.1, forget_goal=0.1)
    assert (done.removals, done.ended_by) == ((), "target")
    assert live.value.sparsity(live.groups) == 0
    more = local_prune(model, scored, 0.2, 0.3, rules=rules, forget_performance=0.1001, forget_goal=0.1)
    assert more.removals


def test_without_a_forget_set_the_least_sensitive_groups_go(model_and_mask):
    model, live = model_and_mask
    decision = local_prune(model, SensitivityDict.of(None, scores(live, 2)), 0.1, 0.3)
    assert decision.removals
    assert all(one.share is None for one in decision.removals)


# --- the floor ---


def test_a_step_that_holds_the_floor_is_accepted_without_repair(model_and_mask):
    model, live = model_and_mask
    decision, events = step(model, live, retention=lambda: 0.9, repair=lambda: pytest.fail("repaired"))
    assert decision.removals
    assert [one["event"] for one in events] == ["propose", "accept"]
    assert events[0]["removed"] == len(decision.removals)
    assert events[0]["sparsity"] == live.value.sparsity(live.groups)


def test_a_step_that_breaks_the_floor_is_repaired_once_and_kept_when_that_is_enough(model_and_mask):
    model, live = model_and_mask
    repairs = []
    decision, events = step(
        model, live, retention=lambda: 0.95 if repairs else 0.5, repair=lambda: repairs.append(live.value) or 7
    )
    assert len(repairs) == 1
    assert repairs[0].sparsity(live.groups) > 0  # the repair sees the pruned model
    assert decision.removals
    assert [one["event"] for one in events] == ["propose", "recover", "accept"]
    assert [one["retention"] for one in events] == [0.5, 0.95, 0.95]
    assert (events[0]["broken"], events[1]["broken"], events[1]["steps"]) == (("floor",), (), 7)
    assert decision.look.retention == 0.95


def test_a_step_that_stays_broken_is_halved_until_it_holds(model_and_mask):
    model, live = model_and_mask
    decision, events = step(
        model, live, ratio=0.2, retention=lambda: 1.0 if live.value.sparsity(live.groups) <= 0.06 else 0.5
    )
    proposed = [one["sparsity"] for one in events if one["event"] == "propose"]
    assert len(proposed) == 3
    for found, allowed in zip(proposed, (0.2, 0.1, 0.05), strict=True):
        assert allowed - 0.01 < found <= allowed
    assert [one["event"] for one in events] == ["propose", "roll_back"] * 2 + ["propose", "accept"]
    assert all(one["sparsity"] == 0 for one in events if one["event"] == "roll_back")
    assert decision.removals
    assert live.value.sparsity(live.groups) == proposed[-1]


def test_where_even_the_smallest_step_fails_mask_and_weights_are_as_before_bit_for_bit(model_and_mask):
    model, live = model_and_mask
    live.set(make_mask(live.groups, {"ffn_channel": [[1], [2]]}))
    before, mask = trained_weights(model), live.value

    def repair():
        with torch.no_grad():
            for one in model.parameters():
                if one.requires_grad:
                    one.mul_(1.5)
        return 1

    decision, events = step(model, live, retention=lambda: 0.1, repair=repair)
    assert (decision.removals, decision.ended_by) == ((), "floor")
    assert same(trained_weights(model), before)
    assert live.value is mask
    tries = sum(one["event"] == "propose" for one in events)
    assert tries > 2
    assert (
        sum(one["event"] == "recover" for one in events) == sum(one["event"] == "roll_back" for one in events) == tries
    )


def test_a_rollback_goes_to_the_last_good_state_not_to_the_model_that_came_in(model_and_mask):
    model, live = model_and_mask
    good = take_state(model)
    with torch.no_grad():  # training since then, which broke the floor by itself
        for one in model.parameters():
            if one.requires_grad:
                one.add_(1.0)

    def roll_back():
        restore_state(model, good)
        return looking(live, lambda: 1.0)()

    decision, events = step(model, live, retention=lambda: 0.1, roll_back=roll_back)
    assert decision.ended_by == "floor"
    assert {one["retention"] for one in events if one["event"] == "roll_back"} == {1.0}
    assert same(trained_weights(model), dict(good.trained))


def test_halving_counts_from_the_good_states_sparsity(model_and_mask):
    model, live = model_and_mask
    live.set(make_mask(live.groups, {"ffn_channel": [[0, 1, 2, 3]] * 2}))
    done = live.value.sparsity(live.groups)
    _, events = step(model, live, ratio=done + 0.1, retention=lambda: 0.1)
    tops = [one["sparsity"] - done for one in events if one["event"] == "propose"]
    for found, allowed in zip(tops, (0.1 / 2**i for i in range(9)), strict=False):
        assert found <= allowed + 1e-9
    assert all(one["sparsity"] == done for one in events if one["event"] == "roll_back")


def test_the_threshold_given_to_the_step_is_the_one_that_counts(model_and_mask):
    model, live = model_and_mask
    decision, _ = step(model, live, retention=lambda: 1.0, threshold=0.999)
    assert (decision.removals, decision.ended_by) == ((), "no_candidates")


def test_early_stop_takes_nothing_and_says_target(model_and_mask):
    model, live = model_and_mask
    decision, _ = step(model, live, retention=lambda: 1.0, forget_performance=0.05, forget_goal=0.1)
    assert (decision.removals, decision.ended_by) == ((), "target")


def test_plain_compression_keeps_a_floor_too(model_and_mask):
    model, live = model_and_mask
    retain = scores(live, 2)
    decision = unlearning_prune(model, None, retain, 0.5, 0.9, look=looking(live, lambda: 0.1), ratio=0.2)
    assert decision.ended_by == "floor"
    decision = unlearning_prune(model, None, retain, 0.5, 0.9, look=looking(live, lambda: 1.0), ratio=0.2)
    assert decision.removals


# --- the other limits ---

BANDED = Limits(max_guard_loss_ratio=1.1, ceilings=(0.3, 0.4), min_forget=0.2)
WELL = {"forget": 0.2, "guard_loss_ratio": 1.1, "already_forgotten": (0.3, 0.4)}
BROKEN = {
    "guard": {"guard_loss_ratio": 1.101},
    "ceiling": {"already_forgotten": (0.1, 0.401)},
    "band": {"forget": 0.199},
}


@pytest.mark.parametrize("limit", list(BROKEN))
def test_a_step_that_breaks_another_limit_is_undone_like_one_that_breaks_the_floor(model_and_mask, limit):
    model, live = model_and_mask
    before = live.value

    def number(name):
        return lambda: ({**WELL, **BROKEN[limit]} if live.value.sparsity(live.groups) > 0.06 else WELL)[name]

    numbers = {name: number(name) for name in WELL}
    decision, events = step(model, live, retention=lambda: 1.0, limits=BANDED, numbers=numbers)
    assert [one["event"] for one in events] == ["propose", "roll_back"] * 2 + ["propose", "accept"]
    assert [one["broken"] for one in events if one["event"] == "roll_back"] == [(limit,)] * 2
    assert 0 < decision.look.sparsity <= 0.06

    live.set(before)
    numbers = {name: (lambda name=name: {**WELL, **BROKEN[limit]}[name]) for name in WELL}
    decision, _ = step(model, live, retention=lambda: 1.0, limits=BANDED, numbers=numbers)
    assert (decision.removals, decision.ended_by, decision.look) == ((), limit, None)
    assert live.value.sparsity(live.groups) == 0


CAME_IN = Look.from_values({"sparsity": 0.0, "retention": 0.98, "groups": {}, "forget": 0.8})


def test_a_cut_that_takes_the_room_of_forgetting_is_undone_without_repair_and_pruning_may_go_on(model_and_mask):
    model, live = model_and_mask
    held = {"limits": Limits(forget_high=0.5), "looked": CAME_IN, "numbers": {"forget": lambda: 0.8}}
    small = lambda: 0.98 if live.value.sparsity(live.groups) < 0.06 else 0.93  # noqa: E731
    decision, events = step(model, live, retention=small, repair=lambda: pytest.fail("repaired"), **held)
    assert {one["broken"] for one in events if one["event"] == "roll_back"} == {("room",)}
    assert 0 < decision.look.sparsity < 0.06

    live.set(full_mask(live.groups))
    deep = lambda: 0.98 if live.value.sparsity(live.groups) < 0.06 else 0.5  # noqa: E731  # below the floor of 0.9 too
    decision, events = step(model, live, retention=deep, repair=lambda: pytest.fail("repaired"), **held)
    assert {one["broken"] for one in events if one["event"] == "roll_back"} == {("room",)}
    assert 0 < decision.look.sparsity < 0.06

    for least in (0.93, 0.5):
        live.set(full_mask(live.groups))
        retentions = lambda least=least: least if live.value.removed_parameters(live.groups) else 0.98  # noqa: E731
        decision, _ = step(model, live, retention=retentions, **held)
        assert (decision.removals, decision.ended_by, decision.look.retention) == ((), "room", 0.98)


def test_one_try_at_a_model_that_came_in_broken_does_not_end_the_pruning(model_and_mask):
    model, live = model_and_mask
    smallest = smallest_share(live.groups, RULES, live.value)
    came_in, good = (replace(CAME_IN, retention=one, forget=0.1) for one in (0.5, 1.0))
    others = {"retention": lambda: 0.5, "ratio": 1.5 * smallest, "roll_back": lambda: good}
    decision, events = step(model, live, looked=came_in, **others)
    assert [one["event"] for one in events] == ["propose", "roll_back"]
    assert (decision.removals, decision.ended_by, decision.look) == ((), "floor", good)

    live.set(full_mask(live.groups))
    decision, _ = step(model, live, looked=good, **others)
    assert (decision.removals, decision.ended_by, decision.look) == ((), "floor", None)


def test_training_that_took_the_room_of_forgetting_is_not_undone(model_and_mask):
    model, live = model_and_mask
    held = {"limits": Limits(forget_high=0.5), "looked": CAME_IN, "numbers": {"forget": lambda: 0.8}}
    _, events = step(model, live, retention=lambda: 0.93, ratio=0.0, **held)
    assert [one["event"] for one in events] == ["propose", "accept"]


def test_where_training_alone_broke_the_floor_it_is_undone_and_pruning_may_go_on(model_and_mask):
    model, live = model_and_mask
    retentions = iter([1.0, 0.5])  # as it came in, and with nothing more to remove
    decision, events = step(model, live, ratio=0.0, retention=lambda: next(retentions))
    assert [one["event"] for one in events] == ["propose", "roll_back"]
    assert (decision.removals, decision.ended_by, decision.look.retention) == ((), "budget", 1.0)


@pytest.mark.parametrize("number", ["retention", "guard_loss_ratio", "already_forgotten", "forget"])
def test_a_number_that_is_not_one_breaks_its_limit(number):
    values = {"retention": 1.0, "sparsity": 0.0, "groups": {}, **WELL}
    assert BANDED.broken(Look.from_values(values)) == ()
    values[number] = (0.1, float("nan")) if number == "already_forgotten" else float("nan")
    assert len(BANDED.broken(Look.from_values(values))) == 1


def test_a_target_that_the_repair_or_the_roll_back_lost_again_does_not_end_the_pruning(model_and_mask):
    model, live = model_and_mask
    goal = {"forget_performance": 0.1, "forget_goal": 0.15}
    retentions, forgets = iter([0.5, 1.0]), iter([0.1, 0.3])
    lost = {"forget": lambda: next(forgets)}
    decision, _ = step(model, live, retention=lambda: next(retentions), numbers=lost, repair=lambda: 1, **goal)
    assert (decision.removals, decision.ended_by, decision.look.forget) == ((), "budget", 0.3)
    retentions, forgets = iter([1.0, 0.5]), iter([0.9, 0.1])  # as it came in, and as training left it
    decision, _ = step(model, live, retention=lambda: next(retentions), numbers=lost, **goal)
    assert (decision.removals, decision.ended_by, decision.look.forget) == ((), "budget", 0.9)
