"""Whole small runs on the families that need something special, without a word about it in the settings.

And on models of which single query heads go, which is a setting.
"""

import json

import pytest
import torch
from conftest import (
    FAMILY_CONFIGS,
    HEAD_CONFIGS,
    make_model,
    make_rows,
    run_values,
    save_checkpoint,
    save_inputs,
    unit_of,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraprune.assembled import assemble
from loraprune.cli import main
from loraprune.model import load_pruned
from loraprune.pipeline import run
from loraprune.setting import flag
from loraprune.settings import Settings

FAMILIES = {  # the class that loads the result, its number format, and a sparsity that takes from both kinds
    "smollm": ("LlamaForCausalLM", torch.float32, 0.4),
    "gemma": ("GemmaForCausalLM", torch.float32, 0.4),
    "gemma2": ("Gemma2ForCausalLM", torch.bfloat16, 0.4),
    "phi3": ("Phi3ForCausalLM", torch.bfloat16, 0.3),
    "olmo2": ("Olmo2ForCausalLM", torch.float32, 0.3),
    "llama_mqa": ("LlamaForCausalLM", torch.float32, 0.2),
    "phi3_heads": ("Phi3ForCausalLM", torch.bfloat16, 0.2),
    "olmo2_heads": ("Olmo2ForCausalLM", torch.float32, 0.2),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_run_cuts_attention_and_feed_forward_and_leaves_what_the_familys_own_class_loads(name, tmp_path, tokenizer):
    architecture, dtype, sparsity = FAMILIES[name]
    config = {**FAMILY_CONFIGS, **HEAD_CONFIGS}[name]()
    save_checkpoint(make_model(config, dtype=dtype), tokenizer, tmp_path / "checkpoint")
    write_rows(tmp_path / "data.jsonl", make_rows()["retain"])
    values = run_values(tmp_path, "out", sparsity=sparsity, metric="lora", min_retain_performance=0.0)
    values["attention_unit"] = unit_of(name)
    for unlearning in ("forget", "retain", "forget_target"):
        del values[unlearning]
    report = run(Settings(**values, data=str(tmp_path / "data.jsonl")))
    sizes = report.metrics["model"]
    assert all(one["after"] < one["before"] for one in sizes["groups"].values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (type(model).__name__, model.dtype) == (architecture, dtype)
    assert model.num_parameters() == sizes["parameters"]["after"]
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {
        *(
            ["qkv_proj", "gate_up_proj"]
            if name.startswith("phi3")
            else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
        ),
        *("o_proj", "down_proj"),
    }


# --- query heads ---


@pytest.fixture(scope="module")
def with_few_kv_groups(tmp_path_factory, tokenizer):
    """What an unlearning run on a model of two kv_groups reads."""
    folder = tmp_path_factory.mktemp("heads")
    return save_inputs(folder, HEAD_CONFIGS["llama_heads"](), tokenizer)


def unlearning(folder, output, **changes):
    """The command line of a run that may take any group of the forget set's, single query heads among them."""
    values = {"sparsity": 0.25, "min_retain_performance": 0.0, "unlearning_threshold": 0.0, **changes}
    values = run_values(folder, output, attention_unit="q_head", **values)
    words = [word for name, value in values.items() if name != "model" for word in (flag(name), str(value))]
    return ["unlearn", values["model"], *words]


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_unlearning_takes_as_many_query_heads_of_each_kv_group_and_leaves_the_kv_groups(
    with_few_kv_groups, widths, capsys
):
    folder, out = with_few_kv_groups, with_few_kv_groups / widths
    assert main(unlearning(folder, widths, widths=widths)) in (0, 3), capsys.readouterr().err
    decision = json.loads((out / "decision.json").read_text())
    assert set(decision["groups"]) == set(decision["removals"]["kind"]) == {"q_head", "ffn_channel"}
    mask = load_file(out / "mask.safetensors")["q_head"]
    assert mask.sum(1).tolist() == decision["kept_by_layer"]["q_head"] and not mask.all()
    assert torch.equal(*mask.reshape(2, 2, 4).sum(2).unbind(1))
    model = load_pruned(out / "model")
    for layer, heads in zip(model.model.layers, decision["kept_by_layer"]["q_head"], strict=True):
        assert layer.self_attn.q_proj.out_features == 4 * heads == 4 * 2 * layer.self_attn.num_key_value_groups
        assert layer.self_attn.k_proj.out_features == 4 * 2
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model"]["parameters"]["after"] == model.num_parameters()
    assert metrics["model"]["groups"]["q_head"] == {"before": 16, "after": int(mask.sum())}
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    assert f"q_heads {int(mask.sum())} kept" in " ".join(capsys.readouterr().out.split())
    assert "q_heads" in (out / "model" / "README.md").read_text()


def test_the_same_query_heads_go_again(with_few_kv_groups):
    for output in ("once", "twice"):
        main(unlearning(with_few_kv_groups, output))
    once, twice = ((with_few_kv_groups / one / "decision.json").read_bytes() for one in ("once", "twice"))
    assert once == twice


def test_base_adapter_and_a_mask_of_query_heads_are_the_model_that_the_run_wrote(with_few_kv_groups, tmp_path):
    folder = with_few_kv_groups
    main(unlearning(folder, "parts"))
    assemble(Settings(model=str(folder / "checkpoint"), device="cpu"), str(folder / "parts"), {}, tmp_path / "model")
    written, again = (load_file(one / "model.safetensors") for one in (folder / "parts" / "model", tmp_path / "model"))
    assert written.keys() == again.keys()
    assert all(torch.equal(one, again[name]) for name, one in written.items())


def test_a_plan_speaks_of_query_heads(with_few_kv_groups, capsys):
    command = [word for word in unlearning(with_few_kv_groups, "never") if word != "unlearn"]
    assert main(["plan", *command]) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().out.split())
    assert "q_head 0 - 1 8 256 12" in printed  # 2 x 4 x 32 parameters each, of which each kv_group keeps one
    assert "of 8 q_heads and" in printed
    assert "LlamaForCausalLM with 8, 4, 2 q_heads" in printed and "MistralForCausalLM with 6 q_heads" in printed
    assert "q slices" in printed and "kv_group" not in printed


@pytest.mark.parametrize("projections", ["k_proj,v_proj,up_proj", "up_proj"])
def test_metric_lora_needs_an_adapter_on_what_query_heads_are_made_of(with_few_kv_groups, capsys, projections):
    assert main(unlearning(with_few_kv_groups, "never", metric="lora", target_modules=projections)) == 2
    assert "metric lora has no adapter on o_proj q_proj." in capsys.readouterr().err


def test_a_model_whose_heads_share_nothing_has_no_finer_unit(run_folder, tokenizer, tmp_path, capsys):
    folder = save_checkpoint(make_model(FAMILY_CONFIGS["llama_mha"]()), tokenizer, tmp_path / "checkpoint")
    arguments = unlearning(run_folder, "never")
    assert main(["unlearn", folder, *arguments[2:]]) == 2
    said = capsys.readouterr().err
    assert "each of the 4 kv_groups has one query head" in said and "leave --attention-unit out" in said
    assert not (run_folder / "never").exists()
