"""Which groups go, in which order: what the forget set alone uses goes first, what the retain set alone uses never."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import (
    FAMILY_CONFIGS,
    GROUPED,
    HEAD_CONFIGS,
    KINDS,
    SIZES,
    SPECIAL,
    adapted,
    make_batch,
    make_mask,
    make_model,
    make_tokenizer,
    run_values,
    save_inputs,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from loraprune.decision import decide_compression, decide_unlearning
from loraprune.groups import find_groups, meta_groups
from loraprune.mask import LiveMask, full_mask
from loraprune.pipeline import run
from loraprune.records import Group
from loraprune.rules import Rules, allowed_widths, most_removable, smallest_step
from loraprune.scoring import score_model
from loraprune.sensitivity import SensitivityDict, update_sensitivity_dict
from loraprune.settings import Settings

GROUPS = meta_groups(FAMILY_CONFIGS["llama_gqa"]())  # 2 layers of 4 kv_groups and 24 ffn_channels
ALL = 10**9
FREE = Rules(widths="per_layer")


def scores(groups=GROUPS, *, value=0.0, **some):
    """Sensitivities of one value, except at these: kv_group or ffn_channel = {(layer, index): value}."""
    values = {}
    for kind in groups.layers:
        values[kind] = torch.full((groups.depth, groups.count(kind)), value, dtype=torch.float64)
        for place, one in some.get(kind, {}).items():
            values[kind][place] = one
    return values


def random_scores(seed, groups=GROUPS):
    source = torch.Generator().manual_seed(seed)
    shapes = {kind: (groups.depth, groups.count(kind)) for kind in groups.layers}
    return {kind: torch.rand(shape, generator=source, dtype=torch.float64) * 2 for kind, shape in shapes.items()}


def unlearn(forget, retain, *, kept=None, budget=ALL, rules=FREE, groups=GROUPS):
    return decide_unlearning(forget, retain, kept or full_mask(groups), groups, budget=budget, rules=rules, step=7)


def compress(retain, *, kept=None, budget=ALL, rules=FREE, groups=GROUPS):
    return decide_compression(retain, kept or full_mask(groups), groups, budget=budget, rules=rules)


def gone(decision):
    return [one.group for one in decision.removals]


def count_by_layer(decision, kind, groups=GROUPS):
    return [sum(one.layer == layer and one.kind == kind for one in gone(decision)) for layer in range(groups.depth)]


# --- who is a candidate ---


def test_a_group_goes_only_when_its_share_is_above_the_threshold():
    forget = scores(ffn_channel={(0, 1): 1.0, (0, 2): 1.1, (1, 3): 3.0})
    retain = scores(value=1.0)
    assert gone(unlearn(forget, retain)) == [Group(1, "ffn_channel", 3), Group(0, "ffn_channel", 2)]
    assert gone(unlearn(forget, retain, rules=Rules(threshold=0.7, widths="per_layer"))) == [Group(1, "ffn_channel", 3)]
    assert gone(unlearn(forget, retain, rules=Rules(threshold=0.75, widths="per_layer"))) == []


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_a_share_that_equals_the_threshold_is_not_above_it(widths):
    forget, retain = scores(value=1.0), scores(value=0.5)  # S = 1.0 / (0.5 + 0.5)
    assert gone(unlearn(forget, retain, rules=Rules(threshold=0.5, epsilon=0.5, widths=widths))) == []
    assert gone(unlearn(forget, retain, rules=Rules(threshold=0.499, epsilon=0.5, widths=widths)))


def test_a_group_that_nobody_needs_forgets_nothing_and_stays():
    forget, retain = scores(ffn_channel={(0, 1): 0.09, (0, 2): 0.11}), scores(value=1e-9)
    assert gone(unlearn(forget, retain)) == [Group(0, "ffn_channel", 2)]
    lower = Rules(minimum_forget=0.05, widths="per_layer")
    assert set(gone(unlearn(forget, retain, rules=lower))) == {Group(0, "ffn_channel", 1), Group(0, "ffn_channel", 2)}


def test_under_uniform_widths_a_dead_group_is_no_layers_best_as_long_as_a_living_one_is_left():
    # Its share is the highest of its layer; in the slice it would only take the place of what forgets something.
    forget = scores(ffn_channel={(0, 0): 0.05, (0, 1): 2.0, (1, 0): 2.0})
    retain = scores(value=1.0, ffn_channel={(0, 0): 0.0})
    assert gone(unlearn(forget, retain, rules=Rules())) == [Group(0, "ffn_channel", 1), Group(1, "ffn_channel", 0)]


def test_under_uniform_widths_the_threshold_applies_to_slices():
    retain = scores(value=1.0)
    lifted = scores(ffn_channel={(0, 0): 4.0, (1, 0): 0.5})  # shares 0.8 and 0.33, of the slice 2.25 / 3.25
    assert gone(unlearn(lifted, retain, rules=Rules())) == [Group(0, "ffn_channel", 0), Group(1, "ffn_channel", 0)]
    dragged = scores(ffn_channel={(0, 0): 1.2, (1, 0): 0.5})
    assert gone(unlearn(dragged, retain, rules=Rules())) == []


def test_a_removal_says_why():
    forget = scores(ffn_channel={(0, 0): 4.0, (1, 0): 2.0})
    one, other = unlearn(forget, scores(value=1.0), rules=Rules()).removals
    assert (one.forget, one.retain, one.step) == (3.0, 1.0, 7)
    assert one.share == pytest.approx(0.75, abs=1e-6)
    assert (other.share, other.forget, other.retain) == (one.share, one.forget, one.retain)


# --- order ---


def test_candidates_go_in_falling_order_of_share():
    decision = unlearn(random_scores(1), random_scores(2), rules=replace(FREE, order="share"))
    shares = [one.share for one in decision.removals]
    assert len(shares) > 4
    assert shares == sorted(shares, reverse=True)
    assert len(set(gone(decision))) == len(shares)


def test_a_slice_is_each_layers_best_remaining_group_and_the_kind_with_the_higher_share_gives_the_next_one():
    forget, retain = random_scores(1), random_scores(2)
    decision = unlearn(forget, retain, rules=Rules(minimum_forget=0.0, order="share"))
    slices = [decision.removals[begin : begin + 2] for begin in range(0, len(decision.removals), 2)]
    taken = {kind: [pair for pair in slices if pair[0].group.kind == kind] for kind in KINDS}
    for kind in KINDS:
        best = (forget[kind] / (retain[kind] + 1e-6)).argsort(1, descending=True)
        assert taken[kind]
        for place, pair in enumerate(taken[kind]):
            assert [one.group for one in pair] == [Group(layer, kind, int(best[layer, place])) for layer in (0, 1)]
    for place, pair in enumerate(slices):
        after = [other for other in slices[place:] if other[0].group.kind != pair[0].group.kind]
        assert not after or pair[0].share >= after[0][0].share


def test_groups_go_by_what_the_forget_set_loses_less_what_the_retain_set_does():
    rules = replace(FREE, all_may_go=True, retain_cost=2.0)
    decision = unlearn(random_scores(1), random_scores(2), rules=rules)
    worth = [one.forget - 2.0 * one.retain for one in decision.removals]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] > 0 > worth[-1]
    assert any(one.share < rules.threshold for one in decision.removals)
    assert len(decision.removals) == sum(one.numel() - len(one) for one in full_mask(GROUPS).kept.values())  # but one


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_to_reach_a_size_what_serves_neither_set_goes_before_what_both_need(widths):
    # By share the second goes first, and the first never: it forgets nothing.
    forget = scores(ffn_channel={(0, 2): 3.0, (1, 2): 3.0, (0, 1): 0.0, (1, 1): 0.0}, value=1.0)
    retain = scores(ffn_channel={(0, 2): 2.0, (1, 2): 2.0, (0, 1): 0.0, (1, 1): 0.0}, value=2.0)
    rules, channel = Rules(widths=widths, all_may_go=True), GROUPS.slice_parameters("ffn_channel")
    assert gone(unlearn(forget, retain, rules=rules, budget=channel)) == [
        Group(one, "ffn_channel", 1) for one in (0, 1)
    ]
    by_share = Rules(widths=widths, order="share")
    assert gone(unlearn(forget, retain, rules=by_share)) == [Group(one, "ffn_channel", 2) for one in (0, 1)]


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_by_difference_no_dead_group_stands_before_a_candidate_where_only_candidates_may_go(widths):
    # The dead group's difference is 0, that of the candidate 2 - 3 x 1 < 0.
    dead, living = {(0, 0): 0.05, (1, 0): 0.05}, {(0, 1): 2.0, (1, 1): 2.0}
    forget, retain = scores(ffn_channel={**dead, **living}), scores(value=1.0, ffn_channel={(0, 0): 0.0, (1, 0): 0.0})
    removed = gone(unlearn(forget, retain, rules=Rules(widths=widths)))
    assert removed == [Group(0, "ffn_channel", 1), Group(1, "ffn_channel", 1)]


def test_candidates_go_in_falling_order_of_difference():
    decision = unlearn(random_scores(1), random_scores(2))
    worth = [one.forget - 3.0 * one.retain for one in decision.removals]
    assert len(worth) > 4
    assert worth == sorted(worth, reverse=True)
    assert min(one.share for one in decision.removals) > FREE.threshold


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_a_smaller_budget_takes_the_head_of_the_same_list(widths):
    forget, retain, rules = random_scores(1), random_scores(2), Rules(widths=widths)
    channels = scores()["kv_group"]  # nobody forgets by attention here, so that every unit costs the same
    forget["kv_group"] = channels
    whole = gone(unlearn(forget, retain, rules=rules))
    unit = GROUPS.slice_parameters("ffn_channel") if widths == "uniform" else 3 * SIZES["hidden_size"]
    part = gone(unlearn(forget, retain, rules=rules, budget=3 * unit))
    assert part == whole[: len(part)]
    assert len(part) == (6 if widths == "uniform" else 3)


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_ties_are_broken_by_kind_layer_and_index(widths):
    rules, forget, retain = Rules(widths=widths), scores(value=2.0), scores(value=1.0)
    decision = unlearn(forget, retain, rules=rules)
    assert gone(decision) == gone(unlearn(forget, retain, rules=rules))
    if widths == "per_layer":
        assert gone(decision) == sorted(gone(decision), key=lambda one: (one.kind, one.layer, one.index))
    else:
        assert gone(decision)[:4] == [Group(layer, "ffn_channel", index) for index in (0, 1) for layer in (0, 1)]


# --- bounds ---


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
@pytest.mark.parametrize("decide", ["unlearn", "compress"])
@pytest.mark.parametrize("budget", [0, 95, 191, 192, 193, 1000, 3333])
def test_the_budget_is_never_exceeded_and_nothing_more_would_fit(widths, decide, budget):
    rules, retain = Rules(widths=widths, minimum_forget=0.0, threshold=0.0), random_scores(2)
    decision = (
        compress(retain, budget=budget, rules=rules)
        if decide == "compress"
        else unlearn(random_scores(1), retain, budget=budget, rules=rules)
    )
    removed = full_mask(GROUPS).without(decision.removals).removed_parameters(GROUPS)
    smallest = GROUPS.layers["ffn_channel"][0].parameters_per_group * (2 if widths == "uniform" else 1)
    assert budget - smallest < removed <= budget
    assert decision.ended_by == "budget"


def test_a_kind_that_does_not_fit_any_more_leaves_the_rest_of_the_budget_to_the_other():
    forget = scores(value=2.0, kv_group={(layer, index): 9.0 for layer in (0, 1) for index in range(4)})
    slice_of = {kind: GROUPS.slice_parameters(kind) for kind in KINDS}
    decision = unlearn(
        forget, scores(value=1.0), rules=Rules(), budget=slice_of["kv_group"] + 3 * slice_of["ffn_channel"]
    )
    assert count_by_layer(decision, "kv_group") == [1, 1]
    assert count_by_layer(decision, "ffn_channel") == [3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_uniform_widths_take_as_many_groups_of_a_kind_from_every_layer(seed):
    retain = random_scores(seed)
    retain["ffn_channel"][0] *= 100  # layer 0 is dear; it gives as many as layer 1 all the same
    for decision in (
        unlearn(random_scores(seed + 9), retain, rules=Rules(threshold=0.01)),
        compress(retain, rules=Rules(), budget=2500),
    ):
        for kind in KINDS:
            first, second = count_by_layer(decision, kind)
            assert first == second
        assert decision.removals


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_every_layer_keeps_the_groups_it_is_to_keep(widths):
    rules = Rules(threshold=0.0, minimum_forget=0.0, min_groups_per_layer=3, widths=widths)
    kept = make_mask(GROUPS, {"ffn_channel": [[0, 1], [5, 6]]})
    for decision in (
        unlearn(random_scores(1), random_scores(2), kept=kept, rules=rules),
        compress(random_scores(2), kept=kept, rules=rules),
    ):
        assert count_by_layer(decision, "kv_group") == [1, 1]
        assert count_by_layer(decision, "ffn_channel") == [19, 19]
        assert decision.ended_by == "no_candidates"
        assert not {Group(0, "ffn_channel", 0), Group(1, "ffn_channel", 6)} & set(gone(decision))


def test_layers_that_have_fewer_groups_than_they_are_to_keep_lose_none():
    kept = make_mask(GROUPS, {"kv_group": [[0, 1, 2], [0]]})
    for widths in ("uniform", "per_layer"):
        rules = Rules(threshold=0.0, minimum_forget=0.0, min_groups_per_layer=2, widths=widths)
        decision = unlearn(scores(value=2.0), scores(value=1.0), kept=kept, rules=rules)
        assert count_by_layer(decision, "kv_group")[0] == 0


def stiff(**values):
    """Groups of a Llama with attention biases: no stand-in, so that only head counts that divide 32 are allowed."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "attention_bias": True}
    return meta_groups(LlamaConfig(**{**SIZES, **heads, **values}))


def test_a_head_count_that_the_familys_config_refuses_is_stepped_over():
    groups = stiff()
    forget, retain = scores(groups, value=5.0), scores(groups, value=1.0)
    slice_of = groups.slice_parameters("kv_group")
    forget["kv_group"][:] = 9.0
    lost = [
        count_by_layer(unlearn(forget, retain, rules=Rules(), groups=groups, budget=budget), "kv_group", groups)
        for budget in (4 * slice_of - 1, 4 * slice_of, 6 * slice_of - 1, 6 * slice_of, 7 * slice_of)
    ]
    assert lost == [[0, 0], [4, 4], [4, 4], [6, 6], [7, 7]]  # 8, 4, 2 and 1 of 8 may stand
    two_left = make_mask(groups, {"kv_group": [list(range(6))] * 2})
    decision = unlearn(forget, retain, kept=two_left, rules=Rules(), groups=groups)
    assert count_by_layer(decision, "kv_group", groups) == [1, 1]
    assert decision.ended_by == "no_candidates"


def test_all_heads_of_a_step_together_are_above_the_threshold_or_none_goes():
    groups, retain = stiff(), scores(stiff(), value=1.0)
    for value, goes in ((1.4, True), (1.2, False)):  # three quarters of it against 1
        three = {(layer, index): value for layer in (0, 1) for index in range(3)}
        decision = unlearn(scores(groups, kv_group=three), retain, rules=Rules(), groups=groups)
        assert count_by_layer(decision, "kv_group", groups) == ([4, 4] if goes else [0, 0])


@pytest.mark.parametrize("slices", range(1, 8))
def test_a_model_of_one_layer_obeys_the_same_head_counts(slices):
    groups = stiff(num_hidden_layers=1)
    budget = slices * groups.slice_parameters("kv_group")
    forget, retain = scores(groups, value=5.0), scores(groups, value=1.0)
    forget["kv_group"][:] = 9.0
    for decision in (
        unlearn(forget, retain, budget=budget, rules=Rules(), groups=groups),
        compress(retain, budget=budget, rules=Rules(), groups=groups),
    ):
        left = full_mask(groups).without(decision.removals).kept["kv_group"][0].sum().item()
        assert left in groups.allowed_attention


# --- query heads ---

HEADS = meta_groups(HEAD_CONFIGS["llama_heads"](), "q_head")  # 2 layers of 2 kv_groups with 4 q_heads each


def left_in_each(decision, groups, kept=None):
    """The numbers of q_heads that each kv_group of each layer keeps."""
    after = (kept or full_mask(groups)).without(decision.removals).kept["q_head"]
    return after.reshape(groups.depth, groups.layers["q_head"][0].divisions, -1).sum(2).tolist()


def test_every_kv_group_loses_as_many_q_heads_and_each_its_own_worst():
    needed = scores(HEADS, value=1.0, q_head={(0, 0): 0.1, (0, 1): 0.2, (0, 6): 0.9, (1, 3): 0.3, (1, 4): 0.4})
    budget = 2 * 2 * HEADS.slice_parameters("q_head")
    decision = compress(needed, groups=HEADS, rules=Rules(round_to=100), budget=budget)
    first = [Group(0, "q_head", 0), Group(0, "q_head", 6), Group(1, "q_head", 3), Group(1, "q_head", 4)]
    second = [Group(0, "q_head", 1), Group(0, "q_head", 4), Group(1, "q_head", 0), Group(1, "q_head", 5)]
    assert gone(decision) == first + second
    assert left_in_each(decision, HEADS) == [[2, 2], [2, 2]]
    assert (
        compress(needed, groups=HEADS, rules=Rules(round_to=100), budget=budget - 1).removals == decision.removals[:4]
    )


def test_a_slice_of_q_heads_is_a_candidate_by_the_mean_of_all_its_heads():
    for value, goes in ((2.2, True), (1.8, False)):  # of four heads two forget nothing that others do not need as much
        forget = scores(HEADS, value=0.0, q_head={(0, 1): value, (0, 7): value, (1, 1): value, (1, 7): value})
        retain = scores(HEADS, value=2.0)
        decision = unlearn(forget, retain, groups=HEADS, rules=Rules())
        assert gone(decision) == (
            [Group(0, "q_head", 1), Group(0, "q_head", 7)] * goes
            + [Group(1, "q_head", 1), Group(1, "q_head", 7)] * goes
        )


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
@pytest.mark.parametrize("name", ["llama_heads", "llama_mqa"])
def test_a_kv_group_keeps_its_last_q_head_and_what_went_before_counts(name, widths):
    groups = meta_groups(HEAD_CONFIGS[name](), "q_head")
    one = groups.layers["q_head"][0]
    each = one.count // one.divisions
    kept = make_mask(groups, {"q_head": [[part * each for part in range(one.divisions)]] * 2})
    rules = Rules(threshold=0.0, minimum_forget=0.0, widths=widths)
    for decision in (
        unlearn(random_scores(1, groups), random_scores(2, groups), kept=kept, rules=rules, groups=groups),
        compress(random_scores(2, groups), kept=kept, rules=rules, groups=groups),
    ):
        assert left_in_each(decision, groups, kept) == [[1] * one.divisions] * 2


# --- what holds whatever the numbers are ---


def with_heads(**values):
    """Groups of a Llama of which single query heads go."""
    return meta_groups(LlamaConfig(**{**SIZES, **values}), "q_head")


def random_case(seed):
    """Groups, rules, a state that some run could be in, scores and a budget, all drawn by the seed."""
    draw = random.Random(seed)
    shared = {"num_attention_heads": 16, "num_key_value_heads": 4}
    heads = (HEADS, with_heads(**shared, attention_bias=True, num_hidden_layers=3), with_heads(**shared))
    groups = draw.choice([GROUPS, stiff(), stiff(num_hidden_layers=3), *heads])
    rules = Rules(
        threshold=draw.choice([0.0, 0.4, 0.6]),
        minimum_forget=draw.choice([0.0, 0.5]),
        min_groups_per_layer=draw.choice([1, 2, 3, 7, 30]),
        widths=draw.choice(["uniform", "per_layer"]),
        round_to=draw.choice([1, 2, 5, 8, 64]),
        retain_cost=draw.choice([0.0, 1.0, 3.0]),
    )
    rules = replace(rules, order=draw.choice(["share", "difference"]))
    rules = replace(rules, all_may_go=rules.order == "difference" and draw.random() < 0.5)
    gone = {}
    for kind, layers in groups.layers.items():
        parts = layers[0].divisions
        size = groups.count(kind) // parts
        count = size - draw.choice([*allowed_widths(kind, groups, rules), groups.count(kind) - parts]) // parts
        begins = range(0, groups.count(kind), size)
        gone[kind] = [
            [begin + one for begin in begins for one in draw.sample(range(size), count)] for _ in range(groups.depth)
        ]
    budget = int(draw.random() ** 2 * groups.total_parameters)
    return groups, rules, make_mask(groups, gone), random_scores(seed, groups), random_scores(-seed - 1, groups), budget


def both_decisions(seed):
    groups, rules, kept, forget, retain, budget = random_case(seed)
    return (
        unlearn(forget, retain, kept=kept, budget=budget, rules=rules, groups=groups),
        compress(retain, kept=kept, budget=budget, rules=rules, groups=groups),
    )


def widths_after(decision, kept, kind):
    return kept.without(decision.removals).kept[kind].sum(1).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_every_width_that_is_left_may_stand_and_the_budget_holds(seed):
    groups, rules, kept, _, _, budget = random_case(seed)
    for decision in both_decisions(seed):
        before, after = (one.removed_parameters(groups) for one in (kept, kept.without(decision.removals)))
        assert 0 <= after - before <= budget
        assert len(set(gone(decision))) == len(decision.removals)
        for kind, layers in groups.layers.items():
            parts = kept.without(decision.removals).kept[kind].reshape(groups.depth, layers[0].divisions, -1).sum(2)
            assert (parts == parts[:, :1]).all()
            old, new = kept.kept[kind].sum(1).tolist(), widths_after(decision, kept, kind)
            for width in set(new) - set(old):
                assert width >= rules.min_groups_per_layer
                assert kind != "ffn_channel" or width % rules.round_to == 0
                assert kind == "ffn_channel" or rules.widths == "per_layer" or width in groups.allowed_attention
            assert rules.widths == "per_layer" or len(set(new)) == 1


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_step_is_the_smallest_budget_with_which_anything_goes(seed):
    groups, rules, kept, _, retain, _ = random_case(seed)
    step = smallest_step(groups, rules, kept)
    one, none = (compress(retain, kept=kept, budget=budget, rules=rules, groups=groups) for budget in (step, step - 1))
    assert none.removals == ()
    assert kept.without(one.removals).removed_parameters(groups) - kept.removed_parameters(groups) == step
    assert (step == 0) == (
        compress(retain, kept=kept, rules=rules, groups=groups).removals == ()  # whatever the budget
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_unit_is_each_layers_best_down_to_the_next_width_and_its_share_is_that_of_the_sums(seed):
    groups, rules, kept, forget, retain, budget = random_case(seed)
    rules = replace(rules, widths="uniform", order="share", all_may_go=False)
    decision = unlearn(forget, retain, kept=kept, budget=budget, rules=rules, groups=groups)
    for kind, layers in groups.layers.items():
        parts, size = layers[0].divisions, groups.count(kind) // layers[0].divisions
        removals = [one for one in decision.removals if one.group.kind == kind]
        width = kept.kept[kind].sum(1)[0].item()
        left = kept.kept[kind].clone()
        while removals:
            lower = max(one for one in allowed_widths(kind, groups, rules) if one < width)
            unit, removals = removals[: groups.depth * (width - lower)], removals[groups.depth * (width - lower) :]
            for layer in range(groups.depth):
                share = (forget[kind] / (retain[kind] + rules.epsilon))[layer]
                alive = [
                    i for i in range(len(share)) if left[layer, i] and forget[kind][layer, i] >= rules.minimum_forget
                ]
                mine = [one.group.index for one in unit if one.group.layer == layer]
                for part in range(parts):
                    own = sorted((i for i in alive if i // size == part), key=lambda i: -share[i])
                    best = own[: (width - lower) // parts]
                    assert mine[part::parts][: len(best)] == best
                left[layer, mine] = False
            total = {
                name: sum(values[kind][one.group.layer, one.group.index].item() for one in unit)
                for name, values in (("forget", forget), ("retain", retain))
            }
            score = total["forget"] / (total["retain"] + rules.epsilon * len(unit))
            assert {one.share for one in unit} == {unit[0].share}
            assert unit[0].share == pytest.approx(score / (1 + score), rel=1e-12)
            assert unit[0].share > rules.threshold
            assert unit[0].forget == pytest.approx(total["forget"] / len(unit))
            assert unit[0].forget >= rules.minimum_forget
            width = lower
        assert left.equal(kept.without(decision.removals).kept[kind])


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_may_go_is_left_out_while_it_fits(seed):
    groups, rules, kept, forget, retain, budget = random_case(seed)
    decision = unlearn(forget, retain, kept=kept, budget=budget, rules=rules, groups=groups)
    after = kept.without(decision.removals)
    rest = budget - after.removed_parameters(groups) + kept.removed_parameters(groups)
    assert unlearn(forget, retain, kept=after, budget=rest, rules=rules, groups=groups).removals == ()
    more = unlearn(forget, retain, kept=after, rules=rules, groups=groups)
    assert (decision.ended_by == "no_candidates") == (more.removals == ())


# --- compression ---


def test_compression_removes_the_lowest_sensitivities_first():
    retain = random_scores(3)
    decision = compress(retain, budget=10 * 96, rules=FREE)
    for kind in KINDS:
        taken = [retain[kind][one.layer, one.index].item() for one in gone(decision) if one.kind == kind]
        for layer in range(2):
            mine = sorted(one.index for one in gone(decision) if one.kind == kind and one.layer == layer)
            lowest = retain[kind][layer].argsort()[: len(mine)].tolist()
            assert mine == sorted(lowest)
        assert len(taken) > 0 or kind == "kv_group"


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_compression_takes_the_same_fraction_of_each_kind(part):
    both = sum(GROUPS.slice_parameters(kind) * GROUPS.count(kind) for kind in KINDS)
    decision = compress(random_scores(3), budget=int(part * both), rules=Rules())
    fractions = {kind: count_by_layer(decision, kind)[0] / GROUPS.count(kind) for kind in KINDS}
    assert fractions == {"kv_group": part, "ffn_channel": part}


def test_compression_under_per_layer_widths_asks_no_layer_before_another():
    retain = random_scores(3)
    retain["ffn_channel"][0] += 10.0
    removed = gone(compress(retain, budget=20 * GROUPS.layers["ffn_channel"][0].parameters_per_group))
    assert {one.layer for one in removed if one.kind == "ffn_channel"} == {1}


def test_compression_makes_up_for_what_an_earlier_step_took_of_one_kind():
    kept = make_mask(GROUPS, {"ffn_channel": [list(range(12))] * 2})  # half of the channels are gone already
    decision = compress(random_scores(3), kept=kept, budget=2 * GROUPS.slice_parameters("kv_group"), rules=Rules())
    assert count_by_layer(decision, "kv_group") == [2, 2]
    assert count_by_layer(decision, "ffn_channel") == [0, 0]


# --- compression's budgets ---


def budgeted(**values):
    return Rules(widths="per_layer", **values)


def test_a_budget_by_layer_takes_the_same_fraction_of_every_layer_wherever_the_lowest_lie():
    retain = random_scores(5)
    retain["ffn_channel"][0] /= 100  # by kind, all would come from this layer
    budget = 12 * GROUPS.layers["ffn_channel"][0].parameters_per_group
    rules = budgeted(budget="layer", attention_ratio=0.0)
    decision = compress(retain, budget=budget, rules=rules)
    assert count_by_layer(decision, "ffn_channel") == [6, 6]
    assert count_by_layer(decision, "kv_group") == [0, 0]
    for layer in range(2):
        lowest = set(retain["ffn_channel"][layer].argsort()[:6].tolist())
        assert {one.index for one in gone(decision) if one.layer == layer} == lowest
    by_kind = compress(retain, budget=budget, rules=budgeted(attention_ratio=0.0))
    assert count_by_layer(by_kind, "ffn_channel") == [12, 0]


def test_a_global_budget_takes_the_lowest_of_both_kinds_and_of_all_layers():
    retain = random_scores(6)
    decision = compress(retain, budget=ALL, rules=budgeted(budget="global"))
    order = [retain[one.kind][one.layer, one.index].item() for one in gone(decision)]
    assert order == sorted(order)
    assert {one.kind for one in gone(decision)[:12]} == set(KINDS)


def test_plain_sums_are_weighed_by_the_parameters_that_go_with_them():
    retain = scores(value=5.0, kv_group={(0, 1): 2.0}, ffn_channel={(1, 2): 1.0})
    sizes = [GROUPS.layers[kind][0].parameters_per_group for kind in ("kv_group", "ffn_channel")]
    assert sizes[0] > 2 * sizes[1]
    first = gone(compress(retain, rules=budgeted(budget="global", per_parameter=True)))[0]
    assert first == Group(0, "kv_group", 1)  # 2 over many parameters is less than 1 over few
    assert gone(compress(retain, rules=budgeted(budget="global")))[0] == Group(1, "ffn_channel", 2)


@pytest.mark.parametrize("ratio, heads, channels", [(1.0, 2, 12), (0.5, 1, 12), (2.0, 2, 6), (0.0, 0, 12)])
@pytest.mark.parametrize("budget", ["layer", "kind"])
def test_attention_loses_its_own_fraction_for_each_of_the_channels(budget, ratio, heads, channels):
    rules = Rules(attention_ratio=ratio, budget=budget)
    worth = heads * GROUPS.slice_parameters("kv_group") + channels * GROUPS.slice_parameters("ffn_channel")
    decision = compress(random_scores(8), budget=worth, rules=rules)
    assert count_by_layer(decision, "kv_group") == [heads] * 2
    assert count_by_layer(decision, "ffn_channel") == [channels] * 2


@pytest.mark.parametrize("fraction", [0.0, 0.24, 0.25, 0.3, 0.5, 0.74])
def test_a_fraction_of_groups_is_rounded_down_in_every_layer_and_kind(fraction):
    rules = budgeted(budget="layer")
    decision = decide_compression(
        random_scores(9), full_mask(GROUPS), GROUPS, budget=ALL, rules=rules, fraction=fraction
    )
    assert count_by_layer(decision, "kv_group") == [int(4 * fraction + 1e-9)] * 2
    assert count_by_layer(decision, "ffn_channel") == [int(24 * fraction + 1e-9)] * 2
    assert decision.ended_by == "budget"


@pytest.mark.parametrize("budget", ["layer", "kind", "global"])
def test_frozen_layers_lose_nothing_and_count_for_nothing_that_could_go(budget):
    rules = budgeted(budget=budget, frozen_layers=("0",))
    decision = compress(random_scores(10), rules=rules)
    assert {one.layer for one in gone(decision)} == {1}
    removed = full_mask(GROUPS).without(decision.removals).removed_parameters(GROUPS)
    assert removed == most_removable(GROUPS, rules) == most_removable(GROUPS, budgeted()) / 2
    assert smallest_step(GROUPS, rules) == GROUPS.layers["ffn_channel"][1].parameters_per_group


def test_a_frozen_layer_keeps_also_what_only_the_forget_set_uses():
    forget = scores(ffn_channel={(0, 1): 9.0, (1, 3): 5.0})
    frozen = budgeted(frozen_layers=("0",))
    assert gone(unlearn(forget, scores(value=1.0), rules=frozen)) == [Group(1, "ffn_channel", 3)]


def test_compression_knows_no_share():
    removal = compress(random_scores(3), budget=400, rules=Rules()).removals[0]
    assert (removal.share, removal.forget) == (None, None)


# --- invariant 3 ---


@pytest.mark.parametrize("order", ["share", "difference"])
def test_a_group_of_the_forget_set_alone_goes_first_and_one_of_the_retain_set_alone_never(order):
    forget, retain = random_scores(1), random_scores(2)
    alone = 1.0 if order == "share" else 2.0  # by difference no group that matters more to the forget set is behind it
    forget["ffn_channel"][1, 5], retain["ffn_channel"][1, 5] = alone, 0.0
    forget["ffn_channel"][0, 9], retain["ffn_channel"][0, 9] = 0.0, 1.0
    removed = gone(unlearn(forget, retain, rules=Rules(minimum_forget=0.0, widths="per_layer", order=order)))
    assert removed[0] == Group(1, "ffn_channel", 5)
    assert Group(0, "ffn_channel", 9) not in removed


def test_where_all_may_go_what_the_retain_set_alone_uses_goes_last():
    forget, retain = random_scores(1), random_scores(2)
    forget["ffn_channel"][1, 5], retain["ffn_channel"][1, 5] = 2.0, 0.0
    forget["ffn_channel"][0, 9], retain["ffn_channel"][0, 9] = 0.0, 2.0
    removed = gone(unlearn(forget, retain, rules=replace(FREE, all_may_go=True, min_groups_per_layer=0)))
    channels = [one for one in removed if one.kind == "ffn_channel"]
    assert (channels[0], channels[-1]) == (Group(1, "ffn_channel", 5), Group(0, "ffn_channel", 9))


def test_by_difference_a_dead_group_is_no_candidates_mate_as_long_as_a_living_one_is_left():
    forget = scores(value=1.0, ffn_channel={(0, 0): 0.19, (1, 0): 0.0})
    retain = scores(value=1.05, ffn_channel={(0, 0): 0.01, (1, 0): 0.0})
    for order in ("share", "difference"):
        [one, other] = gone(unlearn(forget, retain, rules=Rules(order=order)))
        assert one == Group(0, "ffn_channel", 0) and other.layer == 1 and other.index != 0


ASK_FORGET, ASK_RETAIN, SECRET, KNOWN = 10, 20, 30, 40  # tokens
FORGET_KV, RETAIN_KV, FORGET_CHANNEL, RETAIN_CHANNEL = 1, 2, 5, 9  # of layer 0


def knowing_model():
    """A Llama of one living layer that answers each question through one kv_group and one channel of its own.

    Hidden dimensions 0 and 1 say which question was asked, 2 and 3 which answer follows. All weights are 0 but the
    paths written here, and a little noise in the groups of neither path.
    """
    config = FAMILY_CONFIGS["llama_gqa"]()
    model = make_model(config)
    layer = model.model.layers[0]
    attention, feed_forward = layer.self_attn, layer.mlp
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(1.0) if one.ndim == 1 else one.normal_(0, 1e-3, generator=torch.Generator().manual_seed(3))
        for dimension, question, answer, group, channel in (
            (0, ASK_FORGET, SECRET, FORGET_KV, FORGET_CHANNEL),
            (1, ASK_RETAIN, KNOWN, RETAIN_KV, RETAIN_CHANNEL),
        ):
            said = dimension + 2
            model.model.embed_tokens.weight[question] = 0.0
            model.model.embed_tokens.weight[question, dimension] = 1.0
            model.lm_head.weight[answer, said] = 1.0
            # Attention reads its own position mostly, since queries and keys are nearly 0 and the row is short.
            attention.v_proj.weight[group * 4, dimension] = 1.0
            for head in (0, 1):
                attention.o_proj.weight[said, group * 8 + head * 4] = 0.5
            feed_forward.gate_proj.weight[channel, dimension] = 1.0
            feed_forward.up_proj.weight[channel, dimension] = 1.0
            feed_forward.down_proj.weight[said, channel] = 1.0
    return model, config


def asked(question, answer):
    tokens = torch.tensor([[question, answer]] * 2)
    labels = tokens.clone()
    labels[:, 0] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.parametrize("metric", ["gate", "lora"])
@pytest.mark.parametrize("loss", ["nll", "log_odds"])
def test_in_a_model_built_so_the_forget_sets_own_groups_go_first_and_the_retain_sets_own_never(metric, loss):
    base, config = knowing_model()
    groups = find_groups(base, config)
    model = adapted(base, lora_rank=8)
    with torch.no_grad():  # a trained adapter that changes nothing much: the gradient of A needs a B
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(1e-2)
    live, kept, scored = LiveMask(model, groups), full_mask(groups), SensitivityDict()
    for name, batch in (("forget", asked(ASK_FORGET, SECRET)), ("retain", asked(ASK_RETAIN, KNOWN))):
        new = score_model(model, live, [batch], name, prune_metric=metric, loss=loss)
        scored = update_sensitivity_dict(scored, new, name, kept=kept, beta=0.5)
    decision = unlearn(scored.forget.values(), scored.retain.values(), groups=groups)
    order = gone(decision)
    assert set(order[:2]) == {Group(0, "kv_group", FORGET_KV), Group(0, "ffn_channel", FORGET_CHANNEL)}
    assert not set(order) & {Group(0, "kv_group", RETAIN_KV), Group(0, "ffn_channel", RETAIN_CHANNEL)}

    live.set(kept.without(tuple(one for one in decision.removals[:2])))
    with torch.no_grad():
        answers = [
            model(input_ids=torch.tensor([[one]])).logits[0, 0].argmax().item() for one in (ASK_FORGET, ASK_RETAIN)
        ]
    assert answers[0] != SECRET
    assert answers[1] == KNOWN


def test_the_built_model_knows_both_answers():
    model, _ = knowing_model()
    answers = [model(input_ids=torch.tensor([[one]])).logits[0, 0].argmax().item() for one in (ASK_FORGET, ASK_RETAIN)]
    assert answers == [SECRET, KNOWN]


def test_batches_of_another_size_give_the_same_decision():
    model = adapted(make_model(FAMILY_CONFIGS["llama_gqa"]()))
    live, decisions = LiveMask(model, GROUPS), []
    forget, retain = make_batch(8, 13, seed=1), make_batch(8, 13, seed=2)
    for size in (8, 2, 1):
        scored = SensitivityDict()
        for name, batch in (("forget", forget), ("retain", retain)):
            parts = [{key: one[i : i + size] for key, one in batch.items()} for i in range(0, 8, size)]
            new = score_model(model, live, parts, name, prune_metric="gate", loss="log_odds")
            scored = update_sensitivity_dict(scored, new, name, kept=full_mask(GROUPS), beta=0.5)
        decisions.append(unlearn(scored.forget.values(), scored.retain.values(), budget=3000, rules=Rules()))
    assert decisions[0].removals
    assert gone(decisions[0]) == gone(decisions[1]) == gone(decisions[2])


def test_a_run_with_rounded_widths_leaves_a_checkpoint_of_such_a_width_that_stock_transformers_loads(run_folder):
    values = run_values(run_folder, "rounded", round_to=8, sparsity=0.2, min_retain_performance=0.0)
    report = run(Settings(**values, unlearning_threshold=0.0))
    model = AutoModelForCausalLM.from_pretrained(run_folder / "rounded" / "model")
    assert model.config.intermediate_size in (8, 16)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (32, model.config.intermediate_size)
    value = json.loads((run_folder / "rounded" / "decision.json").read_text())
    assert value["kept_by_layer"]["ffn_channel"] == [model.config.intermediate_size] * 2
    assert value["smallest_step"] == min(8 * 192, 1536) / 27488
    assert value["round_to"] == 8
    assert 0.2 - value["smallest_step"] < report.metrics["sparsity"] <= 0.2


@pytest.mark.parametrize(("changes", "multiple"), [({}, 8), ({"order": "share"}, 1), ({"sparsity": None}, 1)])
def test_a_run_on_wide_layers_writes_by_how_many_its_channels_went(run_folder, tmp_path, changes, multiple):
    save_inputs(tmp_path, LlamaConfig(**{**SIZES, **GROUPED, **SPECIAL, "intermediate_size": 256}), make_tokenizer())
    values = run_values(tmp_path, "out", min_retain_performance=0.0, unlearning_threshold=0.0)
    report = run(Settings(**{**values, "sparsity": 0.1, "prune_rounds": 1, **changes}))
    value = json.loads((report.folder / "decision.json").read_text())
    (width,) = set(value["kept_by_layer"]["ffn_channel"])
    assert value["round_to"] == multiple
    assert width < 256 and (multiple == 1 or width % multiple == 0)
