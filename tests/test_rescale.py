"""What is left of a layer is multiplied so that the layer's output keeps its size, and the factor goes where the mask goes."""

import json

import pytest
import torch
from conftest import (
    FAMILY_CONFIGS,
    HEAD_CONFIGS,
    make_batch,
    make_mask,
    make_model,
    masked,
    run_values,
    some_heads,
    unit_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from loraprune.assembled import assemble
from loraprune.mask import full_mask
from loraprune.pipeline import run
from loraprune.pruning import local_prune
from loraprune.rescale import rescaled
from loraprune.rules import Rules
from loraprune.sensitivity import SensitivityDict
from loraprune.settings import Settings

BATCH = make_batch(4, 21)
CONFIGS = {
    **FAMILY_CONFIGS,
    **HEAD_CONFIGS,
    "llama_biased": lambda: LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, attention_bias=True, mlp_bias=True,
    ),
}  # fmt: skip
ROUNDING = 2**-8  # of a factor, which is one of bfloat16


@torch.no_grad()
def sizes(model, live):
    """The root mean square of every consumer's output over the tokens of the batch, biases aside."""
    found, handles = {}, []
    for kind, layers in live.groups.layers.items():
        for one in layers:
            module = model.get_base_model().get_submodule(one.consumer.module)

            def hook(module, given, output, place=(kind, one.layer)):
                whole = output - (0.0 if module.base_layer.bias is None else module.base_layer.bias)
                found[place] = whole[BATCH["attention_mask"].bool()].square().mean().sqrt().item()

            handles.append(module.register_forward_hook(hook))
    model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
    for handle in handles:
        handle.remove()
    return found


def some_removed(groups, layers=(0, 1)):
    attention = some_heads(groups, 1) if groups.attention == "q_head" else [0]
    removed = {groups.attention: attention, "ffn_channel": [1, 2, 3, 5, 7, 11]}
    return {kind: [one if layer in layers else [] for layer in range(2)] for kind, one in removed.items()}


@pytest.mark.parametrize("name", ["llama_gqa", "llama_biased", "phi3", "olmo2", "gemma2", "qwen2_heads"])
def test_the_output_of_a_layer_that_loses_groups_keeps_its_size(name):
    model, groups, live = masked(CONFIGS[name](), unit=unit_of(name))
    before = sizes(model, live)
    mask = make_mask(groups, some_removed(groups, layers=(0,)))
    live.set(mask)
    without = sizes(model, live)
    live.set(full_mask(groups))
    live.set(rescaled(model, live, mask, [BATCH]))
    after = sizes(model, live)
    attention = groups.attention, 0
    assert abs(without[attention] / before[attention] - 1) > 0.01
    assert after[attention] == pytest.approx(before[attention], rel=ROUNDING)
    expected = before[attention] / without[attention]
    assert live.value.factor(*attention) == pytest.approx(expected, rel=ROUNDING)
    assert live.value.factor("ffn_channel", 0) == pytest.approx(
        before["ffn_channel", 0] / without["ffn_channel", 0], rel=ROUNDING
    )
    assert live.value.factor(groups.attention, 1) == live.value.factor("ffn_channel", 1) == 1.0


def test_of_groups_that_go_one_after_the_other_each_step_keeps_what_the_one_before_left():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    before = sizes(model, live)
    for removed in ([0], [0, 2]):
        live.set(rescaled(model, live, make_mask(groups, {"kv_group": [removed, []]}), [BATCH]))
    assert sizes(model, live)["kv_group", 0] == pytest.approx(before["kv_group", 0], rel=2 * ROUNDING)


def test_measuring_leaves_the_model_as_it_was():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    model.train()
    before = live.value
    rescaled(model, live, make_mask(groups, some_removed(groups)), [BATCH])
    assert live.value is before and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_of_another_size_give_the_same_factors():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    mask = make_mask(groups, some_removed(groups))
    rows = [{name: one[row : row + 1] for name, one in BATCH.items()} for row in range(4)]
    one, other = (rescaled(model, live, mask, batches).factors for batches in ([BATCH], rows))
    assert all(torch.equal(one[kind], other[kind]) for kind in one)


def test_a_layer_whose_survivors_say_nothing_is_left_alone():
    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    mask = make_mask(groups, {"ffn_channel": [list(range(24)), []]})
    assert rescaled(model, live, mask, [BATCH]).factors["ffn_channel"].tolist() == [1.0, 1.0]


def test_a_step_that_removes_nothing_measures_nothing():
    model, _, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    scores = {kind: torch.ones_like(one, dtype=torch.float64) for kind, one in live.value.kept.items()}

    def never(mask):
        raise AssertionError(mask)

    assert local_prune(model, SensitivityDict.of(None, scores), 0.0, 1.0, rules=Rules(), rescale=never).removals == ()


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_a_run_writes_the_factors_into_the_weights_and_beside_the_mask(run_folder, tmp_path, widths):
    values = run_values(run_folder, f"rescaled-{widths}", rescale_survivors=True, widths=widths, sparsity=0.2)
    run(Settings(**{**values, "min_retain_performance": 0.0, "unlearning_threshold": 0.0}))
    folder = run_folder / f"rescaled-{widths}"
    tensors = load_file(folder / "mask.safetensors")
    factors = torch.cat([tensors[f"{kind}.factor"] for kind in ("kv_group", "ffn_channel")])
    assert factors.shape == (4,) and (factors != 1.0).any() and factors.isfinite().all() and (factors > 0).all()
    base = Settings(model=str(run_folder / "checkpoint"), device="cpu")
    assemble(base, str(folder), {}, tmp_path / "model")
    written, again = (load_file(one / "model.safetensors") for one in (folder / "model", tmp_path / "model"))
    assert all(torch.equal(one, again[name]) for name, one in written.items())
    assert json.loads((folder / "decision.json").read_text())["factors"] == {
        kind: tensors[f"{kind}.factor"].tolist() for kind in ("kv_group", "ffn_channel")
    }


def test_without_the_setting_nothing_of_it_is_written(run_folder):
    run(Settings(**run_values(run_folder, "plain", min_retain_performance=0.0)))
    assert load_file(run_folder / "plain" / "mask.safetensors").keys() == {"kv_group", "ffn_channel"}
    assert "factors" not in json.loads((run_folder / "plain" / "decision.json").read_text())


def test_weights_of_bfloat16_hold_the_very_factor_of_the_mask(tmp_path, tokenizer):
    from loraprune.export import export_model

    model, groups, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    plain = make_model(FAMILY_CONFIGS["llama_gqa"](), dtype=torch.bfloat16)
    mask = rescaled(model, live, make_mask(groups, some_removed(groups)), [BATCH])
    export_model(plain, tokenizer, groups, mask, tmp_path / "m")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    one = groups.layers["ffn_channel"][0].consumer.module
    kept = plain.state_dict()[f"{one}.weight"][:, mask.kept["ffn_channel"][0]]
    assert torch.equal(written[f"{one}.weight"], (kept.float() * mask.factor("ffn_channel", 0)).bfloat16())
