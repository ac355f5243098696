"""Whole small runs on the families that need something special, without a word about it in the settings."""

import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_rows, run_values, save_checkpoint, write_rows
from transformers import AutoModelForCausalLM

from loraprune.pipeline import run
from loraprune.settings import Settings

FAMILIES = {  # the class that loads the result, its number format, and a sparsity that takes from both kinds
    "smollm": ("LlamaForCausalLM", torch.float32, 0.4),
    "gemma": ("GemmaForCausalLM", torch.float32, 0.4),
    "gemma2": ("Gemma2ForCausalLM", torch.bfloat16, 0.4),
    "phi3": ("Phi3ForCausalLM", torch.bfloat16, 0.3),
    "olmo2": ("Olmo2ForCausalLM", torch.float32, 0.3),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_run_cuts_attention_and_feed_forward_and_leaves_what_the_familys_own_class_loads(name, tmp_path, tokenizer):
    architecture, dtype, sparsity = FAMILIES[name]
    save_checkpoint(make_model(FAMILY_CONFIGS[name](), dtype=dtype), tokenizer, tmp_path / "checkpoint")
    write_rows(tmp_path / "data.jsonl", make_rows()["retain"])
    values = run_values(tmp_path, "out", sparsity=sparsity, metric="lora", min_retain_performance=0.0)
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
        *(["qkv_proj", "gate_up_proj"] if name == "phi3" else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),
        *("o_proj", "down_proj"),
    }
