"""Which widths may stand: only those of which a checkpoint can be written, none below what a layer keeps."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, HEAD_CONFIGS, SIZES, make_mask, unit_of
from transformers import AutoModelForCausalLM, LlamaConfig

from loraprune.groups import meta_groups
from loraprune.rules import Rules, allowed_widths, most_removable, smallest_step
from loraprune.settings import Settings
from loraprune.surgery import cut_config

GROUPS = meta_groups(FAMILY_CONFIGS["llama_gqa"]())  # 2 layers of 4 kv_groups and 24 ffn_channels
STIFF = meta_groups(LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8, attention_bias=True))


@pytest.mark.parametrize(
    ("round_to", "minimum", "widths"),
    [
        (1, 22, [24, 23, 22]),
        (8, 1, [24, 16, 8]),
        (8, 9, [24, 16]),
        (5, 1, [24, 20, 15, 10, 5]),
        (64, 1, [24]),
        (1, 24, [24]),
        (1, 99, [24]),
    ],
)
def test_channels_end_at_a_multiple_or_stay_as_they_are(round_to, minimum, widths):
    rules = Rules(round_to=round_to, min_groups_per_layer=minimum)
    assert allowed_widths("ffn_channel", GROUPS, rules) == widths


@pytest.mark.parametrize("channels", [255, 256, 257])
def test_to_a_size_wide_layers_lose_channels_by_eights_unless_another_multiple_is_asked_for(channels):
    groups = meta_groups(LlamaConfig(**{**SIZES, "intermediate_size": channels}))
    lower = [width for width in range(channels - 1, 0, -1) if channels < 256 or width % 8 == 0]
    assert allowed_widths("ffn_channel", groups, Rules(all_may_go=True)) == [channels, *lower]
    for single in (Rules(), Rules(all_may_go=True, widths="per_layer"), Rules(all_may_go=True, round_to=1)):
        assert allowed_widths("ffn_channel", groups, single) == list(range(channels, 0, -1))


def test_attention_keeps_head_counts_that_the_familys_config_takes_whatever_channels_are_rounded_to():
    assert allowed_widths("kv_group", GROUPS, Rules(round_to=8)) == [4, 3, 2, 1]
    assert allowed_widths("kv_group", STIFF, Rules(round_to=8)) == [8, 4, 2, 1]
    assert allowed_widths("kv_group", STIFF, Rules(min_groups_per_layer=3)) == [8, 4]


def test_under_per_layer_widths_a_layer_is_free_in_its_heads():
    rules = Rules(widths="per_layer", round_to=8)
    assert allowed_widths("kv_group", STIFF, rules) == list(range(8, 0, -1))
    assert allowed_widths("ffn_channel", STIFF, rules) == [24, 16, 8]


@pytest.mark.parametrize(
    ("values", "uniform"), [({}, [16, 12, 8, 4]), ({"attention_bias": True}, [16, 8, 4])]
)  # without biases Mistral stands in for a Llama that takes divisors of 32 alone
def test_q_heads_are_left_as_many_in_each_kv_group(values, uniform):
    heads = LlamaConfig(**SIZES, num_attention_heads=16, num_key_value_heads=4, **values)
    groups = meta_groups(heads, "q_head")
    assert allowed_widths("q_head", groups, Rules(round_to=8)) == uniform
    assert allowed_widths("q_head", groups, Rules(widths="per_layer")) == [16, 12, 8, 4]
    assert allowed_widths("q_head", groups, Rules(min_groups_per_layer=5)) == [one for one in uniform if one >= 5]


def test_the_smallest_step_goes_to_the_next_width_of_the_cheaper_kind():
    channel, head = GROUPS.slice_parameters("ffn_channel"), GROUPS.slice_parameters("kv_group")
    assert smallest_step(GROUPS, Rules()) == channel
    assert smallest_step(GROUPS, Rules(round_to=23)) == channel
    assert smallest_step(GROUPS, Rules(round_to=8)) == min(8 * channel, head)
    assert smallest_step(GROUPS, Rules(widths="per_layer")) == channel // 2
    assert smallest_step(STIFF, Rules(min_groups_per_layer=24)) == 0
    assert smallest_step(STIFF, Rules(round_to=100)) == 4 * STIFF.slice_parameters("kv_group")


def test_the_smallest_step_is_counted_from_the_groups_that_are_left():
    kept = make_mask(STIFF, {"ffn_channel": [[0, 1, 2]] * 2, "kv_group": [[0, 1, 2, 3]] * 2})
    rules = Rules(round_to=5)
    assert smallest_step(STIFF, rules, kept) == STIFF.slice_parameters("ffn_channel")  # 21 to 20
    attention_only = Rules(round_to=100)
    assert smallest_step(STIFF, attention_only, kept) == 2 * STIFF.slice_parameters("kv_group")  # 4 to 2


@pytest.mark.parametrize("name", [*FAMILY_CONFIGS, *HEAD_CONFIGS])
def test_most_that_can_go_is_what_a_model_of_the_lowest_widths_has_less(name):
    config = {**FAMILY_CONFIGS, **HEAD_CONFIGS}[name]()
    groups, rules = meta_groups(config, unit_of(name)), Rules(round_to=5, min_groups_per_layer=2)
    lost = {kind: groups.count(kind) - allowed_widths(kind, groups, rules)[-1] for kind in groups.layers}
    mask = make_mask(groups, {kind: [list(range(count))] * groups.depth for kind, count in lost.items()})
    with torch.device("meta"):
        least = AutoModelForCausalLM.from_config(cut_config(config, groups, mask))
    parameters = sum(one.numel() for one in least.parameters())
    assert most_removable(groups, rules) == groups.total_parameters - parameters > 0


def test_a_runs_rules_are_its_settings():
    settings = Settings(
        unlearning_threshold=0.6,
        unlearning_epsilon=1e-3,
        minimum_forget_sensitivity=0.2,
        min_groups_per_layer=3,
        round_to=64,
    )
    assert Rules.of(settings) == Rules(0.6, 1e-3, 0.2, 3, "uniform", 64)
    assert Rules.of(Settings()) == Rules()
    asked = Settings(sparsity=0.3, retain_cost=2.0)
    assert Rules.of(asked) == Rules(retain_cost=2.0, all_may_go=True)
    assert Rules.of(Settings(sparsity=0.3, order="share")) == Rules(order="share")
