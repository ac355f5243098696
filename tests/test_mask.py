"""A mask over a live model removes groups exactly and reversibly; a gate's gradient is what removing would do."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, logits_of, make_batch, make_mask, make_model, masked
from transformers import AutoModelForCausalLM

from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask, mask_of
from loraprune.objectives import answer_log_probabilities, row_sums
from loraprune.surgery import cut_config, cut_weights

REMOVED = {"kv_group": [[1], [0, 1]], "ffn_channel": [[0, 5, 23], [2]]}


def removed_of(groups):
    return REMOVED if groups.count("kv_group") > 2 else {**REMOVED, "kv_group": [[1], [0]]}


@pytest.mark.parametrize("family", [name for name in FAMILY_CONFIGS if name != "olmo2"])
def test_masking_equals_zeroing_the_columns_that_read_the_groups_where_no_norm_spans_them(family):
    config = FAMILY_CONFIGS[family]()
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
                    producer.get_base_layer().weight[projection.span][rows] += 7.0
                    producer.lora_B["default"].weight[projection.span][rows] += 7.0
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


# --- a norm over all heads, as OLMo 2 has it ---


def with_norms(dtype=torch.float32):
    config = FAMILY_CONFIGS["olmo2"]()
    base = make_model(config, dtype=dtype)
    return config, base, find_groups(base, config)


def test_masked_heads_do_not_count_in_a_norm_over_all_heads():
    _, base, groups = with_norms()
    attention, states = base.model.layers[0].self_attn, torch.randn(2, 5, 32)
    LiveMask(base, groups).set(make_mask(groups, {"kv_group": [[1, 3], []]}))  # query heads of 4, two to a key head
    with torch.no_grad():
        queries, keys = attention.q_norm(states), attention.k_norm(states[..., :16])
    for normed, read, weight, kept in (
        (queries, states, attention.q_norm.weight, [*range(8), *range(16, 24)]),
        (keys, states[..., :16], attention.k_norm.weight, [*range(4), *range(8, 12)]),
    ):
        own = read[..., kept] / (read[..., kept].square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight[kept]
        assert torch.allclose(normed[..., kept], own, atol=1e-6)
        assert normed.count_nonzero() == own.numel()


def test_zeroing_columns_alone_would_say_something_else_where_a_norm_spans_them():
    _, base, groups = with_norms()
    batch, live = make_batch(), LiveMask(base, groups)
    live.set(make_mask(groups, REMOVED))
    with_mask = logits_of(base, batch)
    for _, _, hook in live._norms:
        hook.handle.remove()
    assert (logits_of(base, batch) - with_mask).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_norms_give_what_the_norms_of_the_cut_model_give_bit_for_bit(dtype):
    config, base, groups = with_norms(dtype)
    mask = make_mask(groups, {"kv_group": [[1], [2]]})
    small = AutoModelForCausalLM.from_config(cut_config(config, groups, mask), dtype=dtype).eval()
    small.load_state_dict(cut_weights(base.state_dict(), groups, mask))
    LiveMask(base, groups).set(mask)
    kept, states = [*range(8), *range(16, 32)], torch.randn(3, 7, 32).to(dtype)
    with torch.no_grad():
        masked_norm = base.model.layers[0].self_attn.q_norm(states)
        assert torch.equal(masked_norm[..., kept], small.model.layers[0].self_attn.q_norm(states[..., kept]))
        assert masked_norm.dtype == dtype


def test_gradients_flow_through_a_masked_norm_with_and_without_gradient_checkpointing():
    config, _, groups = with_norms()
    found = []
    for checkpointing in (False, True):
        model = adapted(make_model(config), gradient_checkpointing=checkpointing).train()
        LiveMask(model, groups).set(make_mask(groups, REMOVED))
        losses(model, make_batch()).sum().backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    plain, saving = found
    assert plain.keys() == saving.keys()
    assert all(torch.allclose(one, saving[name], atol=1e-6) for name, one in plain.items())
    # of layer 0, kv_group 1 is gone: query rows 8 to 15 learn nothing, the others do
    rows = plain["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].abs().sum(1)
    assert rows[8:16].max() == 0
    assert torch.cat([rows[:8], rows[16:]]).min() > 0


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
