"""The adapter's configuration is PEFT's, with the plan's four settings, and comes back from disk as itself."""

import json

import peft
import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, logits_of, make_batch, make_model

from loraprune.config import LoraConfig, lora_config
from loraprune.errors import UserError
from loraprune.model import attach_lora
from loraprune.settings import Settings

FOUR = ("unlearning_threshold", "unlearning_epsilon", "min_retain_performance", "forget_retain_ratio")


def four(config):
    return tuple(getattr(config, name) for name in FOUR)


def test_the_four_settings_have_the_plans_defaults_and_the_adapters_are_pefts():
    config = LoraConfig()
    assert four(config) == (0.5, 1e-6, 0.9, 1.0)
    assert isinstance(config, peft.LoraConfig)


def test_a_config_comes_back_from_its_folder_as_our_class_with_every_field(tmp_path):
    config = LoraConfig(
        r=5, lora_alpha=7, lora_dropout=0.25, target_modules=["q_proj", "down_proj"], unlearning_threshold=0.6,
        unlearning_epsilon=1e-3, min_retain_performance=0.75, forget_retain_ratio=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig
    assert four(loaded) == (0.6, 1e-3, 0.75, 0.0)
    assert loaded.to_dict() == config.to_dict()


def test_a_saved_adapters_config_holds_the_four_settings_and_plain_peft_can_load_the_adapter(tmp_path):
    model = adapted(make_model(FAMILY_CONFIGS["llama_gqa"]()), unlearning_threshold=0.7)
    batch = make_batch()
    before = logits_of(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["unlearning_threshold"] == 0.7
    assert LoraConfig.from_pretrained(tmp_path, subfolder="adapter").unlearning_threshold == 0.7
    loaded = peft.PeftModel.from_pretrained(make_model(FAMILY_CONFIGS["llama_gqa"]()), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, batch), before)


def test_a_keyword_wins_over_the_file(tmp_path):
    LoraConfig(r=4).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path, unlearning_threshold=0.9).unlearning_threshold == 0.9


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("unlearning_threshold", 1.5, "[0, 1]"),
        ("unlearning_threshold", float("nan"), "[0, 1]"),
        ("unlearning_epsilon", 0.0, "> 0"),
        ("min_retain_performance", -0.1, "[0, 1]"),
        ("forget_retain_ratio", -1.0, ">= 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name, value, allowed):
    with pytest.raises(UserError, match=f"{name} is") as caught:
        LoraConfig(**{name: value})
    assert allowed in caught.value.what


def test_a_runs_settings_become_its_adapters():
    settings = Settings(
        lora_rank=3, lora_alpha=6, lora_dropout=0.5, target_modules=("q_proj",), forget_retain_ratio=0.5,
        unlearning_threshold=0.25, unlearning_epsilon=1e-4, min_retain_performance=0.5,
    )  # fmt: skip
    config = lora_config(settings, settings.target_modules)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 6, 0.5, {"q_proj"})
    assert four(config) == (0.25, 1e-4, 0.5, 0.5)


def test_target_modules_that_match_nothing_are_refused_by_name():
    settings = Settings(target_modules=("q_proj", "qkv_proj", "fc1"))
    with pytest.raises(UserError) as caught:
        attach_lora(make_model(FAMILY_CONFIGS["llama_gqa"]()), settings)
    assert str(caught.value) == (
        "error  target_modules: qkv_proj, fc1 match no projection of LlamaForCausalLM.\n"
        "why    an adapter that is not there neither guides the pruning nor repairs it.\n"
        "fix    name some of --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj, or leave it out: "
        "then all of them carry one."
    )


def test_names_of_llamas_projections_are_refused_on_fused_ones_which_are_offered():
    with pytest.raises(UserError, match=r"q_proj, v_proj match no projection of Phi3ForCausalLM\.") as caught:
        attach_lora(make_model(FAMILY_CONFIGS["phi3"]()), Settings(target_modules=("q_proj", "v_proj")))
    assert "--target-modules qkv_proj,o_proj,gate_up_proj,down_proj," in caught.value.fix


def carriers_of(model):
    """Which modules carry an adapter, by the last parts of their names, and how many there are."""
    names = [name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    return {name.rpartition(".")[2] for name in names}, len(names)


@pytest.mark.parametrize("wrap", ["a run's settings", "the plain configuration"])
def test_every_projection_of_every_family_gets_an_adapter_where_none_is_named(family, wrap):
    base = make_model(FAMILY_CONFIGS[family]())
    linear = {name for name, one in base.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"}
    expected = {name.rpartition(".")[2] for name in linear}
    if wrap == "a run's settings":
        model = attach_lora(base, Settings())
    else:
        model = peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    assert carriers_of(model) == (expected, len(linear))
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} == expected
    assert len(linear) == (4 if family == "phi3" else 7) * 2


def test_fresh_adapters_change_no_logit_and_the_seed_fixes_them():
    def fresh(seed):
        return attach_lora(make_model(FAMILY_CONFIGS["qwen2"]()), Settings(seed=seed)).eval()

    batch = make_batch()
    assert torch.equal(logits_of(make_model(FAMILY_CONFIGS["qwen2"]()), batch), logits_of(fresh(0), batch))
    torch.rand(7)  # whatever was drawn before
    first, again, other = (
        {name: one for name, one in fresh(seed).named_parameters() if "lora_A" in name} for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
