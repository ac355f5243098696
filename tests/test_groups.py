"""What can be cut out of an architecture, counted; what is not understood is refused by name."""

import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, SIZES, make_mask, make_model, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from loraprune.errors import UserError
from loraprune.groups import allowed_kv_groups, family_of, find_groups, meta_groups
from loraprune.model import checked_config
from loraprune.records import KINDS
from loraprune.settings import Settings
from loraprune.surgery import cut_config, cut_weights


def test_every_layer_has_its_kv_heads_and_its_feed_forward_rows_as_groups(config):
    groups = find_groups(make_model(config), config)
    assert groups.depth == config.num_hidden_layers
    for one in groups.layers["kv_group"]:
        assert one.count == config.num_key_value_heads
        assert one.consumer.count * one.consumer.size == config.num_attention_heads * groups_head_dim(config)
    for one in groups.layers["ffn_channel"]:
        assert (one.count, one.consumer.size) == (config.intermediate_size, 1)


def groups_head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_groups_parameters_are_what_the_cut_model_has_less(config, kind):
    model = make_model(config)
    groups = find_groups(model, config)
    mask = make_mask(groups, {kind: [[0, 2 if groups.count(kind) > 2 else 0]] * groups.depth})
    weights = cut_weights(dict(model.named_parameters()), groups, mask)
    less = groups.total_parameters - sum(one.numel() for one in weights.values())
    gone = int((~mask.kept[kind][0]).sum())
    assert less == sum(gone * one.parameters_per_group for one in groups.layers[kind])
    assert less == gone * groups.slice_parameters(kind) == mask.removed_parameters(groups)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(cut_config(config, groups, mask))
    assert sum(one.numel() for one in stock.parameters()) == groups.total_parameters - less


def test_tied_embeddings_count_once(tokenizer):
    tied, loose = (
        find_groups(make_model(one), one) for one in (FAMILY_CONFIGS["tied"](), FAMILY_CONFIGS["llama_gqa"]())
    )
    assert loose.total_parameters - tied.total_parameters == SIZES["vocab_size"] * SIZES["hidden_size"]


def test_groups_are_the_same_with_and_without_weights(config):
    assert meta_groups(config) == find_groups(make_model(config), config)


def test_an_architecture_that_is_not_in_the_table_is_refused_by_name():
    with pytest.raises(UserError, match="GPT2LMHeadModel is not known") as caught:
        family_of(GPT2Config(architectures=["GPT2LMHeadModel"]))
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in caught.value.fix


def test_a_head_that_is_no_language_model_is_refused_although_its_family_is_known():
    with pytest.raises(UserError, match="LlamaForSequenceClassification is not known"):
        family_of(LlamaConfig(architectures=["LlamaForSequenceClassification"]))


def refusal_of_a_lie(folder, tokenizer, **lies):
    """What the check says of a checkpoint whose config.json was changed afterwards; its weights cannot be loaded."""
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lies))
    with pytest.raises(UserError) as caught:
        checked_config(str(folder), Settings(model=str(folder)))
    return caught.value.what


def test_weights_that_contradict_their_config_are_refused_from_their_headers_alone(tmp_path, tokenizer):
    assert refusal_of_a_lie(tmp_path, tokenizer, intermediate_size=40) == (
        "LlamaForCausalLM: model.layers.0.mlp.gate_proj.weight is 24 x 32, the config says 40 x 32."
    )


def test_kv_heads_that_are_not_in_the_weights_are_refused(tmp_path, tokenizer):
    assert refusal_of_a_lie(tmp_path, tokenizer, num_key_value_heads=2) == (
        "LlamaForCausalLM: model.layers.0.self_attn.k_proj.weight is 16 x 32, the config says 8 x 32."
    )


def test_a_layer_that_is_not_in_the_weights_is_refused(tmp_path, tokenizer):
    assert refusal_of_a_lie(tmp_path, tokenizer, num_hidden_layers=3) == (
        "LlamaForCausalLM: model.layers.2.self_attn.q_proj.weight is missing."
    )


def test_query_heads_that_do_not_share_kv_heads_evenly_are_refused(tmp_path, tokenizer):
    what = refusal_of_a_lie(tmp_path, tokenizer, num_key_value_heads=3)
    assert what == "LlamaForCausalLM: 8 query heads do not share 3 key/value heads evenly."


def test_the_check_reads_headers_and_no_weights(tmp_path, tokenizer):
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(whole[:header] + b"\xff" * (len(whole) - header))
    config = checked_config(str(tmp_path), Settings(model=str(tmp_path)))
    assert config.num_key_value_heads == 4


def test_a_loaded_model_is_checked_as_its_headers_were(tmp_path):
    config = FAMILY_CONFIGS["llama_gqa"]()
    model = make_model(config)
    config.intermediate_size = 40
    with pytest.raises(UserError, match="the config says 40 x 32"):
        find_groups(model, config)


def test_weights_in_several_files_are_read_as_one(tmp_path, tokenizer):
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    for part, some in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in some}, tmp_path / f"model-{part}.safetensors")
    places = {name: f"model-{part}.safetensors" for part in (0, 1) for name in names[part::2]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({"stray": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not in the index: not the model's
    assert checked_config(str(tmp_path), Settings(model=str(tmp_path))).num_hidden_layers == 2


def llama(**values):
    return LlamaConfig(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 8, **values})


def test_llama_may_keep_any_number_of_kv_groups_since_mistral_stands_in():
    assert allowed_kv_groups(llama()) == set(range(1, 9))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_llama_with_biases_keeps_only_head_counts_that_divide_the_hidden_size(bias):
    assert allowed_kv_groups(llama(**{bias: True})) == {1, 2, 4, 8}
    assert allowed_kv_groups(llama(**{bias: True}, num_key_value_heads=4)) == {1, 2, 4}


def test_other_families_may_keep_any_number_of_kv_groups():
    config = Qwen2Config(**SIZES, num_attention_heads=8, num_key_value_heads=4)
    assert allowed_kv_groups(config) == {1, 2, 3, 4}
