"""Layers of different width: the checkpoint says what the masked model said, where nothing of ours is installed and here."""

import json
import re
import shutil

import pytest
import torch
from conftest import (
    FAMILY_CONFIGS,
    HEAD_CONFIGS,
    SIZES,
    logits_of,
    make_batch,
    make_mask,
    make_model,
    masked,
    run_values,
    some_heads,
    told_by_a_stranger,
    unit_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

import loraprune
from loraprune import cli, modeling_per_layer
from loraprune.errors import UserError
from loraprune.export import export_model
from loraprune.forms import CODE_FILE, form_of, has_stock_form, per_layer_config
from loraprune.groups import FAMILIES, find_groups
from loraprune.inputs import prepare
from loraprune.mask import LiveMask, full_mask
from loraprune.model import attach_lora, checked_config, load_tokenizer
from loraprune.pipeline import run
from loraprune.plan import make_plan
from loraprune.plan_tables import checkpoint_lines
from loraprune.settings import Settings
from loraprune.surgery import cut_weights

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {
    **FAMILY_CONFIGS,
    **HEAD_CONFIGS,
    "llama_biased": lambda: LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "mistral_window": lambda: MistralConfig(**SIZES, **HEADS, sliding_window=6),
}
BATCH = make_batch(4, 21)
PROMPT = BATCH["input_ids"][:1, :7]

STRANGER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
root, seen, tensors = Path(sys.argv[1]), {}, {}
batch = load_file(root / "batch.safetensors")
prompt = batch.pop("prompt")
for name in sys.argv[2:]:
    AutoTokenizer.from_pretrained(root / name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True).eval()
    model.save_pretrained(root / "again" / name)
    again = AutoModelForCausalLM.from_pretrained(root / "again" / name, trust_remote_code=True).eval()
    again.set_attn_implementation("eager")
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        tensors[f"{name}.logits"] = model(**batch).logits
        tensors[f"{name}.again"] = again(**batch).logits
        tensors[f"{name}.dynamic"] = model.generate(prompt, **how)
        tensors[f"{name}.static"] = model.generate(prompt, **how, cache_implementation="static", disable_compile=True)
        tensors[f"{name}.uncached"] = model.generate(prompt, **how, use_cache=False)
    seen[name] = [type(model).__name__, str(model.dtype), model.num_parameters(), type(model.model).__module__]
save_file(tensors, root / "found.safetensors")
assert "loraprune" not in sys.modules and "peft" not in sys.modules
print(json.dumps(seen))
"""


def uneven_mask(groups):
    """Layers that keep different numbers of both kinds; the first loses one kv_group, the last as many as it may.

    Of q_heads the first layer loses one of each kv_group, the last two.
    """
    last = groups.count(groups.attention) - 1
    attention = [[0], list(range(last))[:2]]
    if groups.attention == "q_head":
        attention = [some_heads(groups, 1), some_heads(groups, 2, turn=1)]
    return make_mask(groups, {groups.attention: attention, "ffn_channel": [[0, 9, 23], [1, *range(5, 12)]]})


def export_uneven(name, tokenizer, folder):
    """Export a model with trained adapters under an uneven mask; return what the live model said before."""
    model, groups, live = masked(CONFIGS[name](), unit=unit_of(name))
    mask = uneven_mask(groups)
    live.set(mask)
    with torch.no_grad():
        written = model.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = {"logits": logits_of(model, BATCH), "written": written}
    live.remove()
    said = export_model(model.merge_and_unload(), tokenizer, groups, mask, folder / name)
    return expected, said, groups.total_parameters - mask.removed_parameters(groups)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, tokenizer):
    """All families exported, and what a process that never saw this package finds in the folders."""
    folder = tmp_path_factory.mktemp("uneven")
    made = {name: export_uneven(name, tokenizer, folder) for name in CONFIGS}
    batch = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    save_file({**batch, "prompt": PROMPT.clone()}, folder / "batch.safetensors")
    offline = {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    said = told_by_a_stranger(STRANGER, folder, CONFIGS, **offline)
    return folder, made, load_file(folder / "found.safetensors"), said


# --- invariant 1 ---


def nearness(name):
    """How near logits are to be: Olmo 2's norm sums over all heads, in another order where some are gone."""
    return 2e-5 if name == "olmo2_heads" else 1e-5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_saved_checkpoint_gives_the_masked_models_logits_where_only_transformers_is_installed(uneven, name):
    _, made, found, seen = uneven
    expected, said, parameters = made[name]
    assert found[f"{name}.logits"].std() > 0.3
    assert torch.allclose(found[f"{name}.logits"], expected["logits"], rtol=0, atol=nearness(name))
    assert seen[name][:3] == [said, "torch.float32", parameters]
    assert said.startswith("PerLayer") and seen[name][3].startswith("transformers.models.")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_writes_what_the_masked_model_writes_with_every_cache(uneven, name):
    _, made, found, _ = uneven
    for cache in ("dynamic", "static", "uncached"):
        assert torch.equal(found[f"{name}.{cache}"], made[name][0]["written"])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saved_once_more_it_loads_again_and_takes_another_attention_implementation(uneven, name):
    folder, made, found, _ = uneven
    there = BATCH["attention_mask"].bool()  # padding beyond a sliding window attends to nothing, and says anything
    assert torch.allclose(found[f"{name}.again"][there], made[name][0]["logits"][there], rtol=0, atol=1e-5)
    assert (folder / "again" / name / CODE_FILE.name).read_bytes() == CODE_FILE.read_bytes()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_load_pruned_gives_the_same_by_our_own_copy_of_the_code(uneven, name):
    folder, made, _, _ = uneven
    model = loraprune.load_pruned(folder / name)
    assert type(model).__module__ == "loraprune.modeling_per_layer"
    assert torch.allclose(logits_of(model, BATCH), made[name][0]["logits"], rtol=0, atol=nearness(name))
    loraprune.load_pruned(folder / "again" / name)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_cut_weights_alone_give_the_masked_models_logits(name):
    config = CONFIGS[name]()
    model = make_model(config)
    groups = find_groups(model, config, unit_of(name))
    mask = uneven_mask(groups)
    LiveMask(model, groups).set(mask)
    small_config = per_layer_config(config, groups, mask)
    small = small_model(small_config)
    small.load_state_dict(cut_weights(model.state_dict(), groups, mask))
    assert torch.allclose(logits_of(small, BATCH), logits_of(model, BATCH), atol=1e-5)


def small_model(config):
    return getattr(modeling_per_layer, config.architectures[0])(config).eval()


def test_every_family_of_the_table_has_its_classes():
    assert FAMILIES.keys() <= modeling_per_layer.FAMILIES.keys()
    for name, family in FAMILIES.items():
        stock = modeling_per_layer.FAMILIES[name]
        made = getattr(modeling_per_layer, f"PerLayer{stock}ForCausalLM")
        assert made.__mro__[2].__name__ == family.architecture
        assert made.config_class.model_type == f"per_layer_{name}"


@pytest.mark.parametrize("family", list(modeling_per_layer.FAMILIES))
def test_layers_that_are_all_as_wide_as_before_compute_what_the_stock_class_does_bit_for_bit(family):
    config = AutoConfig.for_model(family, **SIZES, **HEADS, head_dim=4, pad_token_id=0)
    plain = make_model(config)
    same = small_model(config_with(config, [(4, 24)] * 2))
    same.load_state_dict(plain.state_dict())
    assert torch.equal(logits_of(same, BATCH), logits_of(plain, BATCH))


@pytest.mark.parametrize("family", list(modeling_per_layer.FAMILIES))
def test_layers_of_every_width_write_the_same_with_every_cache(family):
    config = AutoConfig.for_model(family, **SIZES, **HEADS, head_dim=4, pad_token_id=0)
    model = small_model(config_with(config, [(3, 7), (1, 24)]))
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True}
    written = [model.generate(PROMPT, **how, **one) for one in ({}, static, {"use_cache": False})]
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


def config_with(config, widths):
    """The family's per-layer config with (kv_groups of two heads, channels) for each layer."""
    made = getattr(modeling_per_layer, f"PerLayer{modeling_per_layer.FAMILIES[config.model_type]}Config")
    layers = {
        i: dict(zip(modeling_per_layer.WIDTHS, (2 * kv, kv, inner), strict=True))
        for i, (kv, inner) in enumerate(widths)
    }
    values = {name: one for name, one in config.to_dict().items() if name not in ("model_type", "architectures")}
    architectures = [made.__name__.replace("Config", "ForCausalLM")]
    return made.from_dict(values | {"per_layer_config": layers, "architectures": architectures})


# --- which form ---


def test_where_the_layers_end_up_alike_the_stock_form_is_written(tmp_path, tokenizer):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    groups = find_groups(model, model.config)
    mask = make_mask(groups, {"kv_group": [[0], [2]], "ffn_channel": [[1], [3]]})
    assert has_stock_form(groups, mask)
    assert export_model(model, tokenizer, groups, mask, tmp_path / "m") == "MistralForCausalLM"
    assert not (tmp_path / "m" / CODE_FILE.name).exists()
    assert form_of(checked_config(str(tmp_path / "m"), Settings())) == "stock"


def test_heads_that_no_stock_class_takes_go_into_the_per_layer_form_though_layers_are_alike(tmp_path, tokenizer):
    config = CONFIGS["llama_biased"]()  # 8 heads of a hidden size of 32; 6 are refused, and Mistral has no biases
    model = make_model(config)
    groups = find_groups(model, config)
    mask = make_mask(groups, {"kv_group": [[0], [2]]})
    assert not has_stock_form(groups, mask)
    live = LiveMask(model, groups)
    live.set(mask)
    expected = logits_of(model, BATCH)
    live.remove()
    assert export_model(model, tokenizer, groups, mask, tmp_path / "m") == "PerLayerLlamaForCausalLM"
    assert torch.allclose(logits_of(loraprune.load_pruned(tmp_path / "m"), BATCH), expected, rtol=0, atol=1e-5)


def test_a_stock_checkpoint_is_loaded_by_load_pruned_as_well(run_folder):
    model = loraprune.load_pruned(run_folder / "checkpoint", dtype=torch.bfloat16)
    assert (type(model).__name__, model.dtype, model.training) == ("LlamaForCausalLM", torch.bfloat16, False)


def test_the_config_names_the_widths_of_every_layer_and_is_told_which_code_to_load(uneven):
    values = json.loads((uneven[0] / "qwen3" / "config.json").read_text())
    assert values["per_layer_config"] == {
        "0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 21},
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16},
    }
    assert values["auto_map"] == {
        "AutoConfig": "modeling_per_layer.PerLayerQwen3Config",
        "AutoModelForCausalLM": "modeling_per_layer.PerLayerQwen3ForCausalLM",
    }


# --- what lies in the folder is not run, and what contradicts itself is refused ---


@pytest.fixture
def copied(uneven, tmp_path):
    """A copy of one exported folder, to be spoilt."""
    shutil.copytree(uneven[0] / "llama_gqa", tmp_path / "model")
    return tmp_path / "model"


def said_of(path):
    with pytest.raises(UserError) as caught:
        loraprune.load_pruned(path)
    return str(caught.value.what), caught.value.why, caught.value.fix


@pytest.mark.parametrize("trust", [False, True])
def test_a_changed_modelling_file_is_refused_and_never_run(copied, trust):
    with (copied / CODE_FILE.name).open("a") as file:
        file.write("\nraise RuntimeError('this was run')\n")
    what, why, fix = said_of(copied)
    assert what == f"modeling_per_layer.py of {copied} is not the file that this release of loraprune writes."
    assert "never run" in why and "trust_remote_code=True" in fix
    with pytest.raises(UserError, match="is not the file"):
        checked_config(str(copied), Settings(trust_remote_code=trust))


def test_a_folder_without_the_modelling_file_loads_all_the_same(copied, uneven):
    (copied / CODE_FILE.name).unlink()
    model = loraprune.load_pruned(copied)
    assert torch.allclose(logits_of(model, BATCH), uneven[1]["llama_gqa"][0]["logits"], rtol=0, atol=1e-5)
    assert load_tokenizer(str(copied), Settings()).eos_token_id == 2


def test_trusting_remote_code_runs_our_own_copy_none_the_less(copied):
    checked_config(str(copied), Settings(trust_remote_code=True))
    model = AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=True)
    assert type(model).__module__ == "loraprune.modeling_per_layer"


def change_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_layer_whose_weights_are_not_what_its_widths_say_is_refused_by_name(copied):
    change_config(copied, lambda values: values["per_layer_config"]["1"].update(intermediate_size=17))
    what, _, fix = said_of(copied)
    assert what == "LlamaForCausalLM: model.layers.1.mlp.gate_proj.weight is 16 x 32, the config says 17 x 32."
    assert fix == "check that config.json belongs to these weights."


def test_heads_that_do_not_share_their_keys_evenly_are_refused_by_layer(copied):
    change_config(copied, lambda values: values["per_layer_config"]["1"].update(num_attention_heads=5))
    with pytest.raises(Exception, match="layer 1: 5 query heads do not share 2 key/value heads evenly"):
        AutoModelForCausalLM.from_config(per_layer_of(copied))


def per_layer_of(folder):
    return modeling_per_layer.PerLayerLlamaConfig.from_pretrained(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert said_of(tmp_path / "nothing")[0] == f"there is no model {tmp_path / 'nothing'}."


def test_the_model_trains_with_adapters_and_gradient_checkpointing(copied):
    settings = Settings(lora_rank=2, gradient_checkpointing=True)
    model = attach_lora(loraprune.load_pruned(copied), settings).train()
    model(input_ids=BATCH["input_ids"], labels=BATCH["labels"]).loss.backward()
    gradients = [one.grad for name, one in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14 and all(one.abs().sum() > 0 for one in gradients)


def test_no_run_can_start_from_layers_of_different_width(copied, run_folder, tmp_path):
    settings = Settings(**run_values(run_folder, "unused", model=str(copied)))
    with pytest.raises(UserError) as caught:
        prepare(settings)
    assert caught.value.what == "PerLayerLlamaForCausalLM: its layers keep different numbers of groups."
    assert "evaluate and attack take such a model" in caught.value.why
    assert "--widths uniform" in caught.value.fix
    with pytest.raises(UserError, match="different numbers of groups"):
        find_groups(loraprune.load_pruned(copied), checked_config(str(copied), settings))


# --- a whole run ---


def uneven_run(folder, output, **changes):
    values = run_values(folder, output, widths="per_layer", min_retain_performance=0.0, **changes)
    return Settings(**values)


def flags_of(folder, model):
    common = ["--device", "cpu", "--template", "{prompt} ", "--rouge-rows", "0"]
    sets = [part for name in ("forget", "retain") for part in (f"--{name}", str(folder / f"{name}.jsonl"))]
    return ["evaluate", str(model), *sets, *common]


@pytest.fixture(scope="module")
def run_made(tmp_path_factory, run_folder):
    """A finished unlearning run whose layers were free, on a copy of the tiny run's folder."""
    folder = tmp_path_factory.mktemp("free") / "inputs"
    shutil.copytree(run_folder, folder)
    return folder, run(uneven_run(folder, "out", sparsity=0.12, unlearning_threshold=0.0))


def test_unlearning_with_free_layers_writes_the_per_layer_form_and_says_so(run_made, capsys):
    folder, report = run_made
    decision = json.loads((folder / "out" / "decision.json").read_text())
    assert len(set(decision["kept_by_layer"]["ffn_channel"])) > 1
    assert report.metrics["model"]["form"] == "per_layer"
    assert report.metrics["model"]["class"] == "PerLayerLlamaForCausalLM"
    model = loraprune.load_pruned(folder / "out" / "model")
    assert sum(one.numel() for one in model.parameters()) == report.metrics["model"]["parameters"]["after"]
    widths = [one.mlp.up_proj.out_features for one in model.model.layers]
    assert widths == decision["kept_by_layer"]["ffn_channel"]
    card = (folder / "out" / "model" / "README.md").read_text()
    assert card.count('"this/folder", trust_remote_code=True') == 2 and "load_pruned" in card
    assert "per layer, each layer with its own widths" in (folder / "out" / "report.html").read_text()
    assert cli.main(["status", str(folder / "out")]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "checkpoint per layer, each layer with its own widths and the modelling code in the folder" in said


def test_the_written_model_is_evaluated_as_any_other(run_made, capsys):
    folder, report = run_made
    written = folder / "out" / "model"
    assert cli.main(flags_of(folder, written)) == 0, capsys.readouterr().err
    rows = {"forget": str(folder / "forget.jsonl"), "template": "{prompt} ", "rouge_rows": 0, "device": "cpu"}
    found = loraprune.evaluate_files(Settings(model=str(written), **rows))
    assert found["forget"]["performance"] == pytest.approx(report.metrics["forget"]["after"]["performance"], rel=1e-4)


def test_the_run_is_attacked_as_any_other(run_made, capsys):
    folder, _ = run_made
    quick = ["--attack-steps", "2", "--attack-samples", "2", "--attack-rows", "4"]
    assert cli.main(["attack", str(folder / "out"), "--device", "cpu", *quick]) == 0, capsys.readouterr().err
    values = json.loads((folder / "out" / "attacks.json").read_text())
    for name in ("relearn_full", "relearn_lora", "quantise_int8", "quantise_nf4", "prune_again", "look_inside"):
        assert "readings" in values["results"][name]["unlearned"]


def test_a_second_request_on_it_is_refused_in_three_lines(run_made, capsys):
    folder, _ = run_made
    arguments = ["plan", str(folder / "out" / "model"), "--forget", str(folder / "forget.jsonl")]
    assert cli.main([*arguments, "--retain", str(folder / "retain.jsonl"), "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("error  PerLayerLlamaForCausalLM: its layers keep different numbers of groups")
    assert "fix    start from the model that it was cut from" in " ".join(lines)


def test_compression_with_free_layers_meets_the_sparsity_and_is_planned_as_such(run_made):
    folder, _ = run_made
    data = {"forget": None, "retain": None, "data": str(folder / "retain.jsonl"), "forget_target": None}
    settings = uneven_run(folder, "pruned", **data, sparsity=0.1)
    checkpoint = make_plan(settings)["checkpoint"]
    assert checkpoint["widths"] == "per_layer" and checkpoint["classes"] == {} and checkpoint["never"] == []
    lines = "\n".join(checkpoint_lines(checkpoint))
    assert checkpoint["form"] == "per_layer" and "with trust_remote_code=True" in lines and " to " in lines
    metrics = run(settings).metrics
    groups = find_groups(make_model(FAMILY_CONFIGS["llama_gqa"]()), FAMILY_CONFIGS["llama_gqa"]())
    smallest = groups.layers["ffn_channel"][0].parameters_per_group / groups.total_parameters
    assert 0.1 - smallest < metrics["sparsity"] <= 0.1
    assert metrics["model"]["form"] == form_of(checked_config(str(folder / "pruned" / "model"), settings))


def test_a_mask_that_keeps_everything_has_the_stock_form():
    model = make_model(CONFIGS["llama_biased"]())
    groups = find_groups(model, model.config)
    assert has_stock_form(groups, full_mask(groups))
