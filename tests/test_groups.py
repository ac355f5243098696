"""What can be cut out of an architecture, counted; what is not understood is refused by name."""

import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, HEAD_CONFIGS, KINDS, SIZES, make_mask, make_model, save_checkpoint, some_heads
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from loraprune.errors import UserError
from loraprune.groups import allowed_attention, family_of, find_groups, meta_groups
from loraprune.inputs import prepare
from loraprune.model import checked_config
from loraprune.settings import Settings
from loraprune.surgery import cut_config, cut_weights

ARCHITECTURES = [
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "Olmo2ForCausalLM"),
]


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
    assert caught.value.fix == f"use a model of one of these: {', '.join(ARCHITECTURES)}."


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
    assert allowed_attention(llama(), "kv_group") == set(range(1, 9))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_llama_with_biases_keeps_only_head_counts_that_divide_the_hidden_size(bias):
    assert allowed_attention(llama(**{bias: True}), "kv_group") == {1, 2, 4, 8}
    assert allowed_attention(llama(**{bias: True}, num_key_value_heads=4), "kv_group") == {1, 2, 4}


def stock_accepts(config, kv_groups):
    """Whether transformers builds the model with so many kv_groups, from a file as it would be saved."""
    values = config.to_dict()
    heads = kv_groups * config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values |= {"num_key_value_heads": kv_groups, "num_attention_heads": heads, "head_dim": head_dim}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    except StrictDataclassClassValidationError:
        return False
    assert model.model.layers[0].self_attn.o_proj.weight.shape[1] == heads * head_dim
    return True


LONG_FACTORS = [1.0, 1.5]  # two numbers for a head of 4
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": LONG_FACTORS, "long_factor": LONG_FACTORS}
HEADS = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}
COUNTS = {
    "gemma 2, 8 heads on 32": (Gemma2Config(**HEADS, head_dim=8), {1, 2, 4}),
    "gemma 2, 8 heads on 48": (Gemma2Config(**{**HEADS, "hidden_size": 48}, head_dim=8), {1, 2, 3, 4}),
    "gemma": (GemmaConfig(**HEADS, head_dim=8), {1, 2, 3, 4}),
    "gemma, one for all": (GemmaConfig(**{**HEADS, "num_key_value_heads": 1}, head_dim=8), {1}),
    "phi-3": (Phi3Config(**HEADS, pad_token_id=0), {1, 2, 3, 4}),
    # Its config counts the factors of a stretched rope against hidden size / heads, whatever head_dim says.
    "phi-3, long": (Phi3Config(**{**HEADS, "num_key_value_heads": 8}, pad_token_id=0, rope_parameters=LONG_ROPE), {6, 7, 8}),
    "olmo 2": (Olmo2Config(**HEADS), {1, 2, 3, 4}),
    "qwen 2": (Qwen2Config(**HEADS), {1, 2, 3, 4}),
    "qwen 3": (Qwen3Config(**HEADS, head_dim=8), {1, 2, 3, 4}),
    "mistral": (MistralConfig(**HEADS), {1, 2, 3, 4}),
    "smollm": (FAMILY_CONFIGS["smollm"](), {1, 2, 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_numbers_of_kv_groups_that_may_be_left_are_those_that_the_stock_config_takes(name):
    config, allowed = COUNTS[name]
    assert allowed_attention(config, "kv_group") == allowed
    assert {n for n in range(1, config.num_key_value_heads + 1) if stock_accepts(config, n)} == allowed


@pytest.mark.parametrize(("sparsity", "words"), [(0.9, "cannot be reached: at most"), (0.001, "nothing would be cut")])
def test_a_goal_that_gemma_2s_head_counts_forbid_is_refused_in_words(tmp_path, tokenizer, sparsity, words):
    config = Gemma2Config(**HEADS, head_dim=8, pad_token_id=0)
    folder = save_checkpoint(make_model(config), tokenizer, tmp_path / "gemma2")
    settings = Settings(model=folder, data="none.jsonl", output=str(tmp_path / "out"), sparsity=sparsity, device="cpu")
    with pytest.raises(UserError, match=words) as caught:
        prepare(settings)
    assert "only head counts that the family's config takes" in caught.value.why


# --- query heads ---

HEAD_COUNTS = {  # 8 heads of two kv_groups, or of as many as are named
    "llama_heads": {2, 4, 6, 8},
    "llama_mqa": set(range(1, 9)),
    "gemma2_heads": {2, 4, 6, 8},
    "olmo2_heads": {2, 4, 6, 8},
}


@pytest.mark.parametrize("name", list(HEAD_COUNTS))
def test_the_numbers_of_q_heads_that_may_be_left_are_even_and_those_that_the_stock_config_takes(name):
    assert allowed_attention(HEAD_CONFIGS[name](), "q_head") == HEAD_COUNTS[name]


def test_a_stock_config_that_refuses_a_head_count_refuses_it_of_q_heads_too():
    assert allowed_attention(llama(attention_bias=True, num_key_value_heads=2), "q_head") == {2, 4, 8}
    assert allowed_attention(Gemma2Config(**{**HEADS, "num_key_value_heads": 2}, head_dim=8), "q_head") == {2, 4, 8}


@pytest.mark.parametrize("name", list(HEAD_CONFIGS))
def test_a_q_heads_parameters_are_its_query_rows_its_output_columns_and_its_part_of_a_norm(name):
    config = HEAD_CONFIGS[name]()
    model = make_model(config)
    groups = find_groups(model, config, "q_head")
    assert groups == meta_groups(config, "q_head")
    mask = make_mask(groups, {"q_head": [some_heads(groups, 1), some_heads(groups, 1, turn=1)]})
    whole = dict(model.named_parameters())
    weights = cut_weights(whole, groups, mask)
    assert groups.total_parameters - sum(one.numel() for one in weights.values()) == mask.removed_parameters(groups)
    cut = {key.partition("layers.")[2][2:].rpartition(".")[0] for key in weights if weights[key] is not whole[key]}
    query = "self_attn.qkv_proj" if name == "phi3_heads" else "self_attn.q_proj"
    assert cut == {query, "self_attn.o_proj", *(["self_attn.q_norm"] if name == "olmo2_heads" else [])}


def test_where_a_kv_group_has_one_query_head_there_is_nothing_finer():
    with pytest.raises(UserError, match="each of the 8 kv_groups has one query head") as caught:
        meta_groups(llama(), "q_head")
    assert caught.value.fix == "leave --attention-unit out."


# --- fused projections, norms over all heads ---


def test_the_parts_of_a_fused_projection_lie_on_each_other_and_fill_it():
    config = FAMILY_CONFIGS["phi3"]()
    groups = meta_groups(config)
    for kind, spans in (("kv_group", [(0, 32), (32, 48), (48, 64)]), ("ffn_channel", [(0, 24), (24, 48)])):
        one = groups.layers[kind][1]
        assert len({part.module for part in one.producers}) == 1
        assert [(part.span.start, part.span.stop) for part in one.producers] == spans
        assert list(one.by_module) == [one.producers[0].module, one.consumer.module]


def test_a_norm_over_all_heads_is_a_part_of_their_groups_and_one_over_each_head_is_not():
    olmo, qwen = (meta_groups(FAMILY_CONFIGS[name]()).layers["kv_group"][0] for name in ("olmo2", "qwen3"))
    assert [(one.module.rpartition(".")[2], one.size) for one in olmo.norms] == [("q_norm", 8), ("k_norm", 4)]
    assert qwen.norms == ()
    assert olmo.parameters_per_group == (8 + 4 + 4) * 32 + 8 * 32 + (8 + 4)


def test_a_norm_of_another_width_is_refused(tmp_path, tokenizer):
    save_checkpoint(make_model(FAMILY_CONFIGS["olmo2"]()), tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.k_norm.weight"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_norm\.weight is 4, the config says 16\."):
        checked_config(str(tmp_path), Settings(model=str(tmp_path)))
