"""The checkpoint that is written says what the masked model said, in a process that knows stock transformers only."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import (
    FAMILY_CONFIGS,
    GROUPED,
    HEAD_CONFIGS,
    SIZES,
    logits_of,
    make_batch,
    make_mask,
    make_model,
    masked,
    save_checkpoint,
    some_heads,
    told_by_a_stranger,
    unit_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, MistralConfig, Olmo2Config, Phi3Config

from loraprune.export import export_model
from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask
from loraprune.model import attach_lora
from loraprune.settings import Settings

STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
CONFIGS = {
    **FAMILY_CONFIGS,
    **HEAD_CONFIGS,
    "llama_stretched": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=STRETCHED, rms_norm_eps=1e-3),
    "llama_biased": lambda: LlamaConfig(**SIZES, **GROUPED, attention_bias=True, mlp_bias=True),
    "mistral_window": lambda: MistralConfig(**SIZES, **GROUPED, sliding_window=6),
    "phi3_window": lambda: Phi3Config(**SIZES, **GROUPED, pad_token_id=0, sliding_window=6),
    "olmo2_biased": lambda: Olmo2Config(**SIZES, **GROUPED, attention_bias=True),
}
KV_REMOVED = {"llama_biased": 2, "wide_heads": 1}  # as many as leave a head count the class allows; else 1
RESCALED = ("llama_biased", "qwen2_heads", "gemma2", "phi3", "llama_heads")  # what is left is multiplied by a factor
CLASS = {
    "llama_mha": "MistralForCausalLM",  # 3 heads do not divide 32
    "llama_gqa": "MistralForCausalLM",  # nor do 6
    "tied": "MistralForCausalLM",
    "llama_stretched": "MistralForCausalLM",
    "mistral_gqa": "MistralForCausalLM",
    "mistral_window": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "wide_heads": "LlamaForCausalLM",  # 2 heads do
    "llama_biased": "LlamaForCausalLM",  # 4 heads do
    "smollm": "LlamaForCausalLM",  # 6 heads divide 36
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi3_window": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo2_biased": "Olmo2ForCausalLM",
    "llama_heads": "MistralForCausalLM",
    "llama_mqa": "MistralForCausalLM",  # nor do 7
    "qwen2_heads": "Qwen2ForCausalLM",
    "qwen3_heads": "Qwen3ForCausalLM",
    "gemma2_heads": "Gemma2ForCausalLM",
    "phi3_heads": "Phi3ForCausalLM",
    "olmo2_heads": "Olmo2ForCausalLM",
}
BATCH = make_batch(4, 21)

STRANGER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, seen, logits = Path(sys.argv[1]), {}, {}
batch = load_file(root / "batch.safetensors")
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(root / name).eval()
    with torch.no_grad():
        logits[name] = model(**batch).logits
        prompt = batch["input_ids"][:1, :5]
        cached, plain = (
            model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=one, eos_token_id=None)
            for one in (True, False)
        )
    one = next(model.parameters())
    seen[name] = [type(model).__name__, str(one.dtype), model.num_parameters(), bool(torch.equal(cached, plain))]
save_file(logits, root / "logits.safetensors")
assert "loraprune" not in sys.modules and "peft" not in sys.modules
print(json.dumps(seen))
"""


def removed_heads(name, groups):
    """What goes of attention: the first kv_groups of one layer and the last of the other, or a q_head of each."""
    if groups.attention == "q_head":
        return [some_heads(groups, 1), some_heads(groups, 1, turn=2)]
    kv, last = KV_REMOVED.get(name, 1), groups.count("kv_group") - 1
    return [list(range(kv)), list(range(last, last - kv, -1))]


def export_pruned(name, tokenizer, folder):
    """Export a model with trained adapters and a mask; return the logits of the live model before."""
    model, groups, live = masked(CONFIGS[name](), unit=unit_of(name))
    mask = make_mask(groups, {groups.attention: removed_heads(name, groups), "ffn_channel": [[0, 9, 23], [1, 2, 3]]})
    if name in RESCALED:
        mask = replace(mask, factors={kind: torch.tensor([1.25, 0.875]) for kind in groups.layers})
    live.set(mask)
    expected = logits_of(model, BATCH)
    live.remove()
    said = export_model(model.merge_and_unload(), tokenizer, groups, mask, folder / name)
    return expected, said, groups.total_parameters - mask.removed_parameters(groups)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tokenizer):
    """All families exported, and what a process that never saw this package finds in the folders."""
    folder = tmp_path_factory.mktemp("exported")
    made = {name: export_pruned(name, tokenizer, folder) for name in CONFIGS}
    save_file({name: BATCH[name] for name in ("input_ids", "attention_mask")}, folder / "batch.safetensors")
    said = told_by_a_stranger(STRANGER, folder, CONFIGS)
    return folder, made, load_file(folder / "logits.safetensors"), said


# --- invariant 1 ---


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_saved_checkpoint_gives_the_masked_models_logits_in_stock_transformers(pruned, name):
    _, made, logits, _ = pruned
    assert logits[name].std() > 0.3
    assert torch.allclose(logits[name], made[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_checkpoint_loads_as_the_stock_class_that_was_said(pruned, name):
    folder, made, _, seen = pruned
    assert seen[name][0] == made[name][1] == CLASS[name]
    assert json.loads((folder / name / "config.json").read_text())["architectures"] == [CLASS[name]]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_checkpoint_has_the_parameters_that_were_left_and_generates_with_a_cache(pruned, name):
    _, made, _, seen = pruned
    assert seen[name][1:] == ["torch.float32", made[name][2], True]


def test_a_cut_that_leaves_the_heads_a_divisor_stays_a_llama(tmp_path, tokenizer):
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    mask = make_mask(groups, {"kv_group": [[0, 1], [2, 3]]})
    live.remove()
    assert export_model(model.merge_and_unload(), tokenizer, groups, mask, tmp_path / "m") == "LlamaForCausalLM"


# --- invariant 2 ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILY_CONFIGS))
def test_where_nothing_is_removed_every_weight_comes_out_bit_for_bit(tmp_path, tokenizer, name, dtype):
    config = FAMILY_CONFIGS[name]()
    base = make_model(config, dtype=dtype)
    save_checkpoint(base, tokenizer, tmp_path / "before")
    groups = find_groups(base, config)
    model = attach_lora(base, Settings())
    live = LiveMask(model, groups)
    live.set(full_mask(groups))
    logits_of(model, BATCH)
    live.remove()
    said = export_model(model.merge_and_unload(), tokenizer, groups, live.value, tmp_path / "after")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "after"))
    assert after.keys() == before.keys()
    for key, one in before.items():
        assert after[key].dtype == one.dtype == dtype
        assert torch.equal(after[key].view(torch.uint8), one.view(torch.uint8))
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("before", "after")]
    assert said in configs[0]["architectures"]
    configs[1].pop("head_dim")  # is always said
    configs[0].pop("head_dim", None)
    assert configs[1] == configs[0]


def test_an_untrained_adapter_and_a_lifted_mask_leave_no_trace_after_pruning_was_rolled_back(tmp_path, tokenizer):
    config = FAMILY_CONFIGS["llama_gqa"]()
    base = make_model(config)
    before = {name: one.clone() for name, one in base.state_dict().items()}
    groups = find_groups(base, config)
    model = attach_lora(base, Settings())
    live = LiveMask(model, groups)
    live.set(make_mask(groups, {"kv_group": [[0], [0]]}))
    live.set(full_mask(groups))
    live.remove()
    export_model(model.merge_and_unload(), tokenizer, groups, live.value, tmp_path / "after")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert all(torch.equal(after[name], one) for name, one in before.items())


# --- what lies in the folder ---


def test_tokenizer_and_generation_settings_lie_beside_the_weights_and_work(tmp_path, tokenizer):
    config = FAMILY_CONFIGS["qwen2"]()
    model = make_model(config)
    model.generation_config = GenerationConfig(temperature=0.625, do_sample=True, eos_token_id=2)
    groups = find_groups(model, config)
    export_model(model, tokenizer, groups, full_mask(groups), tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.625
    text = "Zürich 😀 once"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)


def test_there_is_no_pickle_and_nothing_half_written_in_the_folder(pruned):
    folder = pruned[0]
    files = [path for name in CONFIGS for path in (folder / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")]
    assert not list(folder.glob("*.part"))


def test_of_tied_embeddings_the_input_side_is_written_as_save_pretrained_does(pruned):
    weights = load_file(pruned[0] / "tied" / "model.safetensors")
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_header_notes_nothing_whose_order_could_differ_from_save_to_save(pruned, name):
    with safe_open(pruned[0] / name / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    config = FAMILY_CONFIGS["llama_gqa"]()
    model = make_model(config)
    groups = find_groups(model, config)
    with pytest.raises(OSError, match="disk full"):
        export_model(model, Broken(), groups, full_mask(groups), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
