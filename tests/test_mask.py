"""A mask over a live model removes groups exactly and reversibly; a gate's gradient is what removing would do."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, make_batch, make_mask, make_model, masked

from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask, mask_of
from loraprune.objectives import answer_log_probabilities, row_sums

REMOVED = {"kv_group": [[1], [0, 1]], "ffn_channel": [[0, 5, 23], [2]]}


def removed_of(groups):
    return REMOVED if groups.count("kv_group") > 2 else {**REMOVED, "kv_group": [[1], [0]]}


@torch.no_grad()
def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_masking_equals_zeroing_the_columns_that_read_the_groups(config):
    base = make_model(config)
    groups, batch = find_groups(base, config), make_batch()
    mask = make_mask(groups, removed_of(groups))
    live = LiveMask(base, groups)
    live.set(mask)
    with_mask = logits_of(base, batch)
    live.remove()
    for kind, layers in groups.layers.items():
        for one in layers:
            gone = (~mask.kept[kind][one.layer]).repeat_interleave(one.consumer.size)
            with torch.no_grad():
                base.get_submodule(one.consumer.module).weight[:, gone] = 0.0
    assert torch.equal(logits_of(base, batch), with_mask)


def test_a_masked_group_speaks_through_neither_weight_nor_adapter(config):
    model, groups, live = masked(config)
    mask = make_mask(groups, removed_of(groups))
    live.set(mask)
    batch = make_batch()
    before = logits_of(model, batch)
    base = model.get_base_model()
    with torch.no_grad():
        for kind, layers in groups.layers.items():
            for one in layers:
                gone = (~mask.kept[kind][one.layer]).repeat_interleave(one.consumer.size)
                consumer = base.get_submodule(one.consumer.module)
                consumer.get_base_layer().weight[:, gone] += 7.0
                consumer.lora_A["default"].weight[:, gone] += 7.0
                for projection in one.producers:
                    rows = (~mask.kept[kind][one.layer]).repeat_interleave(projection.size)
                    producer = base.get_submodule(projection.module)
                    producer.get_base_layer().weight[rows] += 7.0
                    producer.lora_B["default"].weight[rows] += 7.0
    assert torch.equal(logits_of(model, batch), before)


def test_a_lifted_mask_is_no_mask_and_comes_back_even_after_an_error():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    batch = make_batch()
    whole = logits_of(model, batch)
    mask = make_mask(groups, REMOVED)
    live.set(mask)
    cut = logits_of(model, batch)
    assert not torch.allclose(cut, whole)
    with pytest.raises(KeyError), live.lifted():
        assert torch.equal(logits_of(model, batch), whole)
        raise KeyError
    assert live.value is mask
    assert torch.equal(logits_of(model, batch), cut)


def test_the_full_mask_changes_no_bit():
    config = FAMILY_CONFIGS["llama_gqa"]()
    model, batch = make_model(config), make_batch()
    before = logits_of(model, batch)
    live = LiveMask(model, groups := find_groups(model, config))
    live.set(full_mask(groups))
    assert torch.equal(logits_of(model, batch), before)


def test_a_removed_mask_leaves_no_hook_behind():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    batch = make_batch()
    whole = logits_of(model, batch)
    live.set(make_mask(groups, REMOVED))
    live.remove()
    assert torch.equal(logits_of(model, batch), whole)


def test_a_models_mask_is_found_by_the_model_and_missing_where_there_is_none():
    model, _, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    assert mask_of(model) is live
    with pytest.raises(ValueError, match="this model has no mask"):
        mask_of(make_model(FAMILY_CONFIGS["llama_gqa"]()))


# --- gates ---


def losses(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return -row_sums(*answer_log_probabilities(logits, batch["labels"]))


def test_a_gates_gradient_is_the_finite_difference_of_each_examples_loss(family):
    model, _, live = masked(FAMILY_CONFIGS[family]())
    batch, step = make_batch(rows=3), 1e-2
    with live.gates(3, torch.device("cpu")) as gates:
        losses(model, batch).sum().backward()
    for kind, layer, channel in (("kv_group", 0, 3), ("kv_group", 1, 5), ("ffn_channel", 0, 7), ("ffn_channel", 1, 20)):
        with torch.no_grad(), live.gates(3, torch.device("cpu")) as moved:
            moved[kind, layer][:, :, channel] = 1.0 + step
            above = losses(model, batch).double()
            moved[kind, layer][:, :, channel] = 1.0 - step
            below = losses(model, batch).double()
        difference = (above - below) / (2 * step)
        assert torch.allclose(gates[kind, layer].grad[:, 0, channel].double(), difference, rtol=2e-2, atol=2e-3)


def test_one_examples_gate_knows_nothing_of_the_others():
    model, _, live = masked(FAMILY_CONFIGS["qwen2"]())
    batch = make_batch(rows=3)
    with live.gates(3, torch.device("cpu")) as gates:
        losses(model, batch)[1].backward()
    for gate in gates.values():
        assert gate.grad[1].abs().max() > 0
        assert gate.grad[0].abs().max() == gate.grad[2].abs().max() == 0


def test_gates_are_float32_on_a_half_precision_model_and_change_nothing():
    config = FAMILY_CONFIGS["llama_gqa"]()
    base = make_model(config, dtype=torch.bfloat16)
    groups = find_groups(base, config)
    model, batch = adapted(base), make_batch()
    live = LiveMask(model, groups)
    before = logits_of(model, batch)
    with live.gates(4, torch.device("cpu")) as gates:
        assert {one.dtype for one in gates.values()} == {torch.float32}
        assert torch.equal(logits_of(model, batch), before)
    assert torch.equal(logits_of(model, batch), before)


def test_a_removed_group_has_a_gate_without_effect():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    live.set(make_mask(groups, REMOVED))
    with live.gates(4, torch.device("cpu")) as gates:
        losses(model, make_batch()).sum().backward()
    assert gates["ffn_channel", 0].grad[:, 0, REMOVED["ffn_channel"][0]].abs().max() == 0
    assert gates["ffn_channel", 0].grad[:, 0, 1].abs().max() > 0
