"""Quantised bases: read by rows, trained on, and never what is written: that is the original, cut and merged."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_batch, make_model, run_values, save_checkpoint
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraprune import ending, pipeline
from loraprune.errors import UserError
from loraprune.groups import find_groups, meta_groups
from loraprune.mask import LiveMask
from loraprune.memory import traced
from loraprune.model import attach_lora, base_groups, load_base
from loraprune.pipeline import run
from loraprune.plan import make_plan
from loraprune.quantised import QUANTISED, load_quantised, quietly, weight_bytes, weight_rows
from loraprune.records import Mask
from loraprune.scoring import score_model
from loraprune.sensitivity import adapter_gradient, adapter_importance
from loraprune.settings import Settings
from loraprune.steering import scale_original

CPU = torch.device("cpu")
CUT = {"hidden_size": 72, "intermediate_size": 107, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}


@pytest.fixture(autouse=True)
def quiet():
    """Everything here runs as inside a run: nothing is compiled."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quantize: pip install 'loraprune[quantize]'")
    with quietly():
        yield


@pytest.fixture(scope="module")
def cut_widths(tmp_path_factory):
    """A checkpoint of widths such as cutting leaves, no multiple of anything, and the model in it."""
    config = FAMILY_CONFIGS["mistral_gqa"]()
    for name, value in CUT.items():
        setattr(config, name, value)
    plain = make_model(config)
    return save_checkpoint(plain, None, tmp_path_factory.mktemp("cut")), plain


def projections(model, number_format):
    return [one for one in model.modules() if type(one).__name__ == QUANTISED[number_format]]


# --- weights ---


@pytest.mark.parametrize(("number_format", "most"), [("int8", 0.01), ("nf4", 0.2)])
def test_quantised_weights_are_near_the_plain_ones_at_widths_that_cutting_leaves(number_format, most, cut_widths):
    folder, plain = cut_widths
    model = load_quantised(folder, Settings(device="cpu"), number_format, CPU)
    assert len(projections(model, number_format)) == 2 * 7
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits.float(), plain(input_ids=ids).logits
    assert 0 < (ours - theirs).pow(2).mean() / theirs.pow(2).mean() < most


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("number_format", ["int8", "nf4"])
def test_rows_of_a_quantised_weight_are_what_the_module_computes_with(number_format, used, cut_widths):
    model = load_quantised(cut_widths[0], Settings(device="cpu"), number_format, CPU)
    if used:
        model(input_ids=torch.arange(3, 9)[None])
    for module in projections(model, number_format):
        rows, (height, width) = weight_rows(module), (module.out_features, module.in_features)
        pieces = [rows.of(slice(start, start + rows.step)) for start in range(0, height, rows.step)]
        weight = torch.cat(pieces)
        assert weight.shape == (height, width)
        computed = module(torch.eye(width)).t()
        assert torch.allclose(weight.float(), computed, atol=1e-4)  # int8 is computed in float16
        assert torch.equal(weight, rows.of(slice(0, height)))


@pytest.mark.parametrize("number_format", ["int8", "nf4"])
def test_scoring_a_quantised_layer_makes_no_plain_copy_of_it_and_leaves_it_as_it_was(number_format, tmp_path):
    config = FAMILY_CONFIGS["llama_gqa"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 1024, 2048, 128
    model = make_model(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_quantised(str(tmp_path), Settings(device="cpu"), number_format, CPU)
    model = attach_lora(base, Settings(lora_rank=2))
    model(**make_batch()).loss.backward()
    logits = model(**make_batch()).logits
    one = base_groups(base, config).layers["ffn_channel"][0].consumer
    layer = model.get_base_model().get_submodule(one.module)
    gradient = adapter_gradient(layer)
    taken = max(traced(lambda: adapter_importance(layer, gradient, one)))
    assert taken < 2 * 2**20 * 4  # the weight in float32
    assert torch.equal(logits, model(**make_batch()).logits)


@pytest.mark.parametrize("metric", ["gate", "lora"])
@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.8)])
def test_a_quantised_base_is_scored_much_as_the_plain_one(bits, least, metric, cut_widths):
    folder, plain = cut_widths
    scores = []
    for base in (plain, load_base(folder, Settings(device="cpu", base_bits=bits))):
        groups = base_groups(base, plain.config)
        model = attach_lora(base, Settings(lora_rank=4))
        live = LiveMask(model, groups)
        scores.append(score_model(model, live, [make_batch()], "forget", prune_metric=metric, loss="log_odds"))
        live.remove()
        model.unload()
    ours, theirs = (
        one.values["ffn_channel"].flatten() for one in scores
    )  # 214 of them; heads are too few to correlate
    assert least < torch.corrcoef(torch.stack([ours, theirs]))[0, 1] < 1


@pytest.mark.parametrize(("bits", "most"), [(8, 0.55), (4, 0.35)])
def test_a_quantised_base_takes_a_quarter_to_half_of_the_projections_memory(bits, most, tmp_path):
    config = FAMILY_CONFIGS["llama_gqa"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 1024, 32
    plain = make_model(config, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), Settings(device="cpu", base_bits=bits))
    assert weight_bytes(plain) == sum(one.nbytes for one in plain.parameters())
    outside = 2 * plain.get_input_embeddings().weight.nbytes
    assert weight_bytes(base) - outside < most * (weight_bytes(plain) - outside)


def test_the_groups_of_a_quantised_base_are_those_of_the_plain_one(cut_widths):
    folder, plain = cut_widths
    base = load_base(folder, Settings(device="cpu", base_bits=4))
    assert base_groups(base, plain.config) == find_groups(plain, plain.config) == meta_groups(plain.config)


# --- runs ---

COMBINATIONS = [
    ("unlearn", "gate", 4, torch.bfloat16, True),
    ("unlearn", "lora", 8, torch.float32, True),
    ("prune", "lora", 4, torch.bfloat16, True),
    ("prune", "gate", 8, torch.bfloat16, False),
]


def values_of(folder, output, **changes):
    """The settings of a tiny run, with a floor that a rounded model may hold."""
    values = {
        "forget_retain_ratio": 1.0,
        "min_retain_performance": 0.0,
        "prune_rounds": 2,
        "finish_steps": 2,
        **changes,
    }
    return run_values(folder, str(output), **values)


@pytest.fixture
def inputs_of(run_folder, tmp_path, tokenizer):
    """A folder with the tiny run's sets and a checkpoint in a number format."""

    def make(dtype):
        save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"](), dtype=dtype), tokenizer, tmp_path / "checkpoint")
        for name in ("forget.jsonl", "retain.jsonl"):
            (tmp_path / name).write_bytes((run_folder / name).read_bytes())
        return tmp_path

    return make


def settings_of(folder, task, **changes):
    values = values_of(folder, folder / "run", **changes)
    if task == "prune":
        values |= {"data": values.pop("retain"), "forget": None, "forget_target": None}
    return Settings(**values)


@pytest.mark.parametrize(("task", "metric", "bits", "dtype", "checkpointing"), COMBINATIONS)
def test_what_a_quantised_run_writes_is_the_original_merged_and_cut(
    task, metric, bits, dtype, checkpointing, inputs_of
):
    folder = inputs_of(dtype)
    changes = {"metric": metric, "base_bits": bits, "gradient_checkpointing": checkpointing}
    report = run(settings_of(folder, task, **changes))
    assert report.metrics["sparsity"] > 0
    written = AutoModelForCausalLM.from_pretrained(report.folder / "model")
    assert written.dtype == dtype
    assert getattr(written.config, "quantization_config", None) is None
    original = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    merged = PeftModel.from_pretrained(original, report.folder / "adapter").merge_and_unload()
    live = LiveMask(merged, find_groups(merged, merged.config))
    live.set(Mask(load_file(report.folder / "mask.safetensors")))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = written(input_ids=ids).logits.float(), merged(input_ids=ids).logits.float()
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 0.05)
    rounded = json.loads((report.folder / "quantised.json").read_text())
    before = json.loads((report.folder / "before.json").read_text())
    assert 0 < abs(rounded["floor"]["performance"] / before["floor"]["performance"] - 1) < 0.5


def test_nothing_trained_and_nothing_cut_is_the_original_bit_for_bit(inputs_of, monkeypatch):
    folder, look_at = inputs_of(torch.bfloat16), ending.look_at

    def worse(*arguments):  # whatever is not untouched: then that is the only end
        looked = look_at(*arguments)
        return looked if looked.retention == pytest.approx(1.0, abs=1e-6) else replace(looked, retention=0.1)

    monkeypatch.setattr(ending, "look_at", worse)
    report = run(settings_of(folder, "unlearn", base_bits=4, min_retain_performance=0.2))
    before, after = (load_file(one / "model.safetensors") for one in (folder / "checkpoint", report.folder / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.metrics["floor"]["held"]


def test_an_end_that_breaks_the_floor_as_it_is_written_gives_way_to_the_next(inputs_of, monkeypatch):
    folder, seen = inputs_of(torch.bfloat16), []
    look_at = ending.look_at

    def worse(*arguments):
        looked = look_at(*arguments)
        seen.append(looked)
        return replace(looked, retention=0.1) if looked.sparsity > 0 else looked

    monkeypatch.setattr(ending, "look_at", worse)
    report = run(settings_of(folder, "unlearn", base_bits=4, min_retain_performance=0.2))
    assert seen[0].sparsity > 0
    assert seen[-1].sparsity == 0
    assert report.metrics["sparsity"] == 0
    assert report.metrics["ended_by"] == "floor"
    events = [json.loads(line) for line in (report.folder / "events.jsonl").read_text().splitlines()]
    undone = [one for one in events if one["event"] == "roll_back"][-1]
    assert undone["broken"] == ["floor"]
    assert undone["tried"] == seen[0].sparsity


def test_a_run_killed_while_the_original_is_cut_ends_as_if_nobody_had_killed_it(inputs_of, monkeypatch):
    folder = inputs_of(torch.bfloat16)
    settings = settings_of(folder, "unlearn", base_bits=4)
    whole = run(replace(settings, output=str(folder / "whole")))
    write_best = ending.write_best

    def killed(*arguments):
        write_best(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_best", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    monkeypatch.undo()
    resumed = run(settings)
    for name in ("decision.json", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    assert sorted(one.name for one in whole.folder.iterdir()) == sorted(one.name for one in resumed.folder.iterdir())


def test_rounding_is_not_charged_to_a_run():
    original = {"sets": {"floor": {"performance": 0.8, "row_performance": [0.9, 0.7]}, "guard": {"loss": 2.0}}}
    before = {"floor": {"performance": 0.4}, "guard": {"loss": 3.0}}
    rounded = {"rows": {"floor": [0.3, 0.2]}, "guard": {"loss": 3.3}}
    sets = scale_original(original, before, rounded)["sets"]
    assert sets["floor"]["row_performance"] == [0.6, 0.4]  # an earlier request halved it; so it is halved now
    assert sets["floor"]["performance"] == pytest.approx(0.5)
    assert sets["guard"]["loss"] == pytest.approx(2.2)


# --- plan, refusals ---


def test_a_plan_knows_that_the_base_is_smaller_while_it_is_trained(inputs_of):
    folder = inputs_of(torch.float32)
    stages = {}
    for bits in (16, 4):
        plan = make_plan(settings_of(folder, "unlearn", base_bits=bits))
        stages[bits] = {one["stage"]: one for one in plan["memory"]["stages"]}
    base = load_base(str(folder / "checkpoint"), Settings(device="cpu", base_bits=4))
    assert stages[4]["train"]["weights"] == stages[4]["score"]["weights"] == weight_bytes(base)
    assert stages[4]["train"]["weights"] < stages[16]["train"]["weights"]
    for stage in ("evaluate before", "export", "evaluate after"):
        assert stages[4][stage]["weights"] == pytest.approx(stages[16][stage]["weights"], rel=0.05)


@pytest.mark.parametrize("start", [run, make_plan])
def test_a_quantised_base_without_bitsandbytes_is_refused_before_anything_is_done(start, inputs_of, monkeypatch):
    monkeypatch.setattr("loraprune.quantised.find_spec", lambda name: None)
    folder = inputs_of(torch.float32)
    with pytest.raises(UserError) as caught:
        start(settings_of(folder, "unlearn", base_bits=4))
    assert caught.value.what == "base_bits is 4, and bitsandbytes is not installed."
    assert caught.value.fix == "pip install 'loraprune[quantize]', or set --base-bits 16."
    assert not (folder / "run").exists()


def test_a_checkpoint_that_is_quantised_on_disk_is_refused(inputs_of):
    folder = inputs_of(torch.float32)
    base = load_quantised(str(folder / "checkpoint"), Settings(device="cpu"), "nf4", CPU)
    base.save_pretrained(folder / "rounded")
    (folder / "rounded" / "tokenizer.json").write_bytes((folder / "checkpoint" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError) as caught:
        run(replace(settings_of(folder, "unlearn", base_bits=4), model=str(folder / "rounded")))
    assert "quantised" in caught.value.what


def test_bits_that_no_format_has_are_refused():
    with pytest.raises(UserError, match="one of 16, 8, 4"):
        Settings(base_bits=3)
