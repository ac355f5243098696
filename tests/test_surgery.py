"""What is cut out of the weights is what the mask masks, and the config says so."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, HEAD_CONFIGS, SIZES, logits_of, make_batch, make_mask, make_model, some_heads
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask
from loraprune.surgery import cut_config, cut_weights, uniform_widths


def cut(config, removed, unit="kv_group"):
    model = make_model(config)
    groups = find_groups(model, config, unit)
    mask = make_mask(groups, removed)
    return model, groups, mask, cut_weights(model.state_dict(), groups, mask)


def test_the_masked_and_the_cut_model_say_the_same(config):
    count = config.num_key_value_heads
    removed = {"kv_group": [[0], [count - 1]], "ffn_channel": [[0, 5, 23], [2, 3, 11]]}
    model, groups, mask, weights = cut(config, removed)
    LiveMask(model, groups).set(mask)
    small = AutoModelForCausalLM.from_config(cut_config(config, groups, mask)).eval()
    small.load_state_dict(weights)
    batch = make_batch(4, 17)
    assert torch.allclose(logits_of(small, batch), logits_of(model, batch), atol=1e-5)


def test_a_kv_group_goes_with_its_query_heads_and_their_biases():
    model, _, _, weights = cut(FAMILY_CONFIGS["qwen2"](), {"kv_group": [[1], [3]]})  # heads of 4, two share one key
    whole, layer = model.state_dict(), "model.layers.0.self_attn"
    queries, keys = [*range(8), *range(16, 32)], [*range(4), *range(8, 16)]
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        for part in ("weight", "bias"):
            assert torch.equal(weights[f"{layer}.{name}.{part}"], whole[f"{layer}.{name}.{part}"][rows])
    assert torch.equal(weights[f"{layer}.o_proj.weight"], whole[f"{layer}.o_proj.weight"][:, queries])
    assert (
        weights["model.layers.1.self_attn.v_proj.bias"].tolist()
        == whole["model.layers.1.self_attn.v_proj.bias"][:12].tolist()
    )


def test_a_q_head_goes_with_its_bias_and_leaves_keys_and_values_alone():
    removed = {"q_head": [[0, 5], [3, 6]]}  # heads of 4; the first four share one key, the others the second
    model, groups, mask, weights = cut(HEAD_CONFIGS["qwen2_heads"](), removed, "q_head")
    whole, layer = model.state_dict(), "model.layers.0.self_attn"
    queries = [*range(4, 20), *range(24, 32)]
    for part in ("weight", "bias"):
        assert torch.equal(weights[f"{layer}.q_proj.{part}"], whole[f"{layer}.q_proj.{part}"][queries])
        for name in ("k_proj", "v_proj"):
            assert torch.equal(weights[f"{layer}.{name}.{part}"], whole[f"{layer}.{name}.{part}"])
    assert torch.equal(weights[f"{layer}.o_proj.weight"], whole[f"{layer}.o_proj.weight"][:, queries])
    small = cut_config(model.config, groups, mask)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (6, 2, 4)


def test_q_heads_are_never_cut_so_that_others_would_read_another_kv_groups_keys():
    with pytest.raises(ValueError, match="layer 1 keeps unequal numbers of q_heads in its kv_groups"):
        cut(HEAD_CONFIGS["llama_heads"](), {"q_head": [[0, 5], [3, 2]]}, "q_head")


@pytest.mark.parametrize("name", list(HEAD_CONFIGS))
def test_the_masked_and_the_cut_model_say_the_same_whatever_number_of_q_heads_goes(name):
    config = HEAD_CONFIGS[name]()
    for number in (1, 2, 3):
        groups = find_groups(make_model(config), config, "q_head")
        removed = {"q_head": [some_heads(groups, number), some_heads(groups, number, turn=3)]}
        model, groups, mask, weights = cut(config, removed, "q_head")
        LiveMask(model, groups).set(mask)
        small = AutoModelForCausalLM.from_config(cut_config(config, groups, mask)).eval()
        small.load_state_dict(weights)
        batch = make_batch(4, 17)
        assert torch.allclose(logits_of(small, batch), logits_of(model, batch), atol=1e-5)


def test_the_rows_of_fused_projections_are_cut_in_each_of_their_parts():
    removed = {"kv_group": [[1], [0, 3]], "ffn_channel": [[0, 5], [23, 7]]}
    model = make_model(
        FAMILY_CONFIGS["phi3"]()
    )  # 8 query heads of 4, then 4 keys, then 4 values; 24 gates, then 24 ups
    with torch.no_grad():  # every row says where it stood
        for name, one in model.named_parameters():
            if "qkv_proj" in name or "gate_up_proj" in name:
                one.copy_(torch.arange(len(one))[:, None].expand_as(one))
    groups = find_groups(model, model.config)
    weights = cut_weights(model.state_dict(), groups, make_mask(groups, removed))
    left = {name: one[:, 0].tolist() for name, one in weights.items() if "qkv_proj" in name or "gate_up" in name}
    assert left == {
        "model.layers.0.self_attn.qkv_proj.weight": [
            *range(8), *range(16, 32),  # queries
            *range(32, 36), *range(40, 48),  # keys
            *range(48, 52), *range(56, 64),  # values
        ],
        "model.layers.1.self_attn.qkv_proj.weight": [*range(8, 24), *range(36, 44), *range(52, 60)],
        "model.layers.0.mlp.gate_up_proj.weight": [one for one in range(48) if one not in (0, 5, 24, 29)],
        "model.layers.1.mlp.gate_up_proj.weight": [one for one in range(48) if one not in (7, 23, 31, 47)],
    }  # fmt: skip
    layer = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(weights[layer], model.state_dict()[layer][:, [*range(8), *range(16, 32)]])


def test_biases_of_fused_projections_go_with_their_rows():
    config = FAMILY_CONFIGS["phi3"]()
    model = make_model(config)
    groups, weights = find_groups(model, config), model.state_dict()
    bias = "model.layers.0.self_attn.qkv_proj.bias"
    weights[bias] = torch.arange(64.0)
    cut_bias = cut_weights(weights, groups, make_mask(groups, {"kv_group": [[0, 1, 2], [0, 1, 2]]}))[bias]
    assert cut_bias.tolist() == [*range(24, 32), *range(44, 48), *range(60, 64)]


def test_a_norm_over_all_heads_loses_what_its_heads_lose():
    model, _, _, weights = cut(FAMILY_CONFIGS["olmo2"](), {"kv_group": [[1], [3]]})
    whole, layer = model.state_dict(), "model.layers.0.self_attn"
    queries, keys = [*range(8), *range(16, 32)], [*range(4), *range(8, 16)]
    assert torch.equal(weights[f"{layer}.q_norm.weight"], whole[f"{layer}.q_norm.weight"][queries])
    assert torch.equal(weights[f"{layer}.k_norm.weight"], whole[f"{layer}.k_norm.weight"][keys])
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        assert torch.equal(weights[f"model.layers.0.{name}.weight"], whole[f"model.layers.0.{name}.weight"])


def test_an_output_bias_is_not_cut():
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8, attention_bias=True, mlp_bias=True)
    model, _, _, weights = cut(config, {"kv_group": [[0, 1, 2, 3]] * 2, "ffn_channel": [[4], [7]]})
    whole = model.state_dict()
    for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
        assert torch.equal(weights[f"model.layers.0.{name}"], whole[f"model.layers.0.{name}"])
    assert weights["model.layers.0.mlp.up_proj.bias"].shape == (23,)
    assert weights["model.layers.0.self_attn.q_proj.bias"].shape == (16,)


def test_norms_over_a_head_are_left_as_they_are():
    model, _, _, weights = cut(FAMILY_CONFIGS["qwen3"](), {"kv_group": [[0], [0]]})
    for name, one in model.state_dict().items():
        if "norm" in name:
            assert weights[name] is not None
            assert torch.equal(weights[name], one)


def test_weights_that_lose_nothing_are_the_same_tensors(config):
    model = make_model(config)
    groups, before = find_groups(model, config), model.state_dict()
    after = cut_weights(before, groups, full_mask(groups))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_cut_changes_nothing_in_the_weights_it_was_given():
    model, groups, mask, _ = cut(FAMILY_CONFIGS["llama_gqa"](), {"kv_group": [[0], [0]]})
    before = {name: one.clone() for name, one in model.state_dict().items()}
    cut_weights(model.state_dict(), groups, mask)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_config_says_what_is_left(config):
    heads, count = config.num_attention_heads, config.num_key_value_heads
    removed = {"kv_group": [[0], [1]], "ffn_channel": [[0, 1], [2, 3]]}
    _, groups, mask, _ = cut(config, removed)
    small = cut_config(config, groups, mask)
    assert small.num_key_value_heads == count - 1
    assert small.num_attention_heads == (count - 1) * heads // count
    assert small.intermediate_size == SIZES["intermediate_size"] - 2
    head_dim = getattr(config, "head_dim", None) or SIZES["hidden_size"] // heads
    assert small.head_dim == head_dim
    changed = {"num_key_value_heads", "num_attention_heads", "intermediate_size", "head_dim"}
    for name in (
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
    ):
        assert name not in changed
        assert getattr(small, name) == getattr(config, name)
    assert small.rope_parameters == config.rope_parameters


def test_the_config_that_was_given_stays_as_it_was():
    config = FAMILY_CONFIGS["llama_gqa"]()
    before = config.to_dict()
    cut(config, {"kv_group": [[0], [1]]})
    model = make_model(config)
    groups = find_groups(model, config)
    cut_config(config, groups, make_mask(groups, {"kv_group": [[0], [1]]}))
    assert config.to_dict() | {"architectures": None, "dtype": None} == before | {"architectures": None, "dtype": None}


@pytest.mark.parametrize(("removed", "kind"), [(1, "mistral"), (2, "llama"), (3, "llama")])
def test_a_llama_becomes_a_mistral_only_where_its_heads_do_not_divide_the_hidden_size(removed, kind):
    config = FAMILY_CONFIGS["llama_gqa"]()  # 8 heads in 4 groups, hidden size 32
    _, groups, mask, _ = cut(config, {"kv_group": [list(range(removed))] * 2})
    small = cut_config(config, groups, mask)
    assert small.model_type == kind
    assert getattr(small, "sliding_window", None) is None


def test_a_llama_with_biases_has_no_stock_form_with_heads_that_do_not_divide_the_hidden_size():
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8, attention_bias=True)
    _, groups, mask, _ = cut(config, {"kv_group": [[0], [1]]})
    with pytest.raises(ValueError, match="LlamaForCausalLM has no stock form with 7 heads"):
        cut_config(config, groups, mask)


def test_what_is_gemma_2s_own_stays_in_its_config():
    config = FAMILY_CONFIGS["gemma2"]()
    _, groups, mask, _ = cut(config, {"kv_group": [[0, 1], [1, 3]]})
    small = cut_config(config, groups, mask)
    assert (small.model_type, small.num_attention_heads, small.head_dim) == ("gemma2", 4, 8)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
        assert getattr(small, name) == getattr(config, name) is not None


def test_gemma_2_has_no_stock_form_with_heads_that_do_not_divide_the_hidden_size():
    config = Gemma2Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    _, groups, mask, _ = cut(config, {"kv_group": [[0], [1]]})
    with pytest.raises(ValueError, match="Gemma2ForCausalLM has no stock form with 6 heads"):
        cut_config(config, groups, mask)


def test_a_models_own_modelling_file_is_not_named_where_a_stock_class_is_meant():
    config = FAMILY_CONFIGS["phi3"]()
    config.auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    _, groups, mask, _ = cut(config, {"kv_group": [[0], [1]]})
    assert "auto_map" not in cut_config(config, groups, mask).to_dict()


def test_layers_of_different_width_have_no_stock_config():
    config = FAMILY_CONFIGS["llama_gqa"]()
    _, _, mask, _ = cut(config, {"ffn_channel": [[0, 1], [3]]})
    with pytest.raises(ValueError, match="layers keep 22 to 23 groups of kind ffn_channel"):
        uniform_widths(mask)
