"""Every mistake a user can make ends with exit code 2 and three lines, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from loraprune.cli import main
from loraprune.settings import Settings


@pytest.fixture
def given(run_folder, tmp_path):
    """A command line that would run; tests spoil one thing of it."""
    for name in ("forget", "retain"):
        shutil.copy(run_folder / f"{name}.jsonl", tmp_path)
    return {
        "model": str(run_folder / "checkpoint"),
        "--forget": str(tmp_path / "forget.jsonl"),
        "--retain": str(tmp_path / "retain.jsonl"),
        "--output": str(tmp_path / "out"),
    }


def refusal(capsys, given, *more):
    """Run `unlearn` and return the three lines; no output may be there afterwards that was not there before."""
    output = Path(given["--output"])
    was_there = output.exists()
    flags = [word for name, value in given.items() if name != "model" for word in (name, value)]
    code = main(["unlearn", given["model"], *flags, *more])
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if line.startswith(("error  ", "why    ", "fix    "))]
    assert code == 2
    assert [line.split()[0] for line in lines] == ["error", "why", "fix"]
    assert not any("Traceback" in line for line in printed)
    assert output.exists() == was_there
    return "\n".join(lines)


def spoilt(tmp_path, run_folder, **changes):
    """A copy of the checkpoint with other values in its config."""
    folder = tmp_path / "spoilt"
    shutil.copytree(run_folder / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_a_missing_file(capsys, given, tmp_path):
    text = refusal(capsys, {**given, "--forget": str(tmp_path / "nowhere.jsonl")})
    assert "nowhere.jsonl" in text and "--forget" in text


def test_a_malformed_line_is_named_by_its_number_and_its_text_is_not_shown(capsys, given, tmp_path):
    with (tmp_path / "forget.jsonl").open("a") as file:
        file.write('{"question": "whose secret", oops}\n')
    number = len((tmp_path / "forget.jsonl").read_text().splitlines())
    text = refusal(capsys, given)
    assert f"line {number}" in text and "secret" not in text


def test_an_unknown_column_with_the_nearest_name(capsys, given):
    text = refusal(capsys, given, "--columns", "prompt=qestion", "--columns", "answer=answer")
    assert "qestion" in text and "question" in text


def test_overlap_names_the_rows_and_not_their_text(capsys, given, tmp_path):
    rows = (tmp_path / "forget.jsonl").read_text().splitlines()
    with (tmp_path / "retain.jsonl").open("a") as file:
        file.write(rows[1] + "\n")
    count = len((tmp_path / "retain.jsonl").read_text().splitlines())
    text = refusal(capsys, given)
    assert f"forget row 2 = retain row {count}" in text and "--allow-overlap" in text
    assert json.loads(rows[1])["answer"] not in text


def test_an_empty_set(capsys, given, tmp_path):
    (tmp_path / "retain.jsonl").write_text("")
    assert "--retain" in refusal(capsys, given)


def test_an_unknown_architecture(capsys, given, tmp_path, run_folder):
    model = spoilt(tmp_path, run_folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    text = refusal(capsys, {**given, "model": model})
    assert "GPTNeoXForCausalLM" in text and "LlamaForCausalLM" in text


def test_an_architecture_that_transformers_does_not_know(capsys, given, tmp_path, run_folder):
    text = refusal(capsys, {**given, "model": spoilt(tmp_path, run_folder, model_type="strange")})
    assert "strange" in text


def test_weights_that_contradict_the_config(capsys, given, tmp_path, run_folder):
    text = refusal(capsys, {**given, "model": spoilt(tmp_path, run_folder, intermediate_size=25)})
    assert "LlamaForCausalLM" in text and "24 x 32" in text and "25 x 32" in text


def test_a_model_folder_without_a_tokenizer(capsys, given, tmp_path, run_folder):
    model = spoilt(tmp_path, run_folder)
    for file in (tmp_path / "spoilt").glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(capsys, {**given, "model": model})


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1"])
def test_a_sparsity_outside_its_range(capsys, given, value):
    text = refusal(capsys, given, "--sparsity", value)
    assert "sparsity" in text and "(0, 1)" in text


def test_a_sparsity_that_the_model_cannot_give(capsys, given):
    text = refusal(capsys, given, "--sparsity", "0.95")
    assert "0.95" in text and "lower --sparsity" in text


def test_a_sparsity_that_the_model_cannot_give_under_rounded_widths(capsys, given):
    text = refusal(capsys, given, "--sparsity", "0.3", "--round-to", "16")
    assert "at most 0.224" in text and "1 of 4 kv_groups and 16 of 24 ffn_channels" in text
    assert "--sparsity to at most 0.223" in text and "--round-to" in text


@pytest.mark.parametrize("name", ["sparsity", "max-sparsity"])
def test_a_sparsity_below_the_smallest_step(capsys, given, name):
    text = refusal(capsys, given, f"--{name}", "0.05", "--round-to", "8")  # 27,488 parameters; 8 channels have 1,536
    assert "0.05 is 1374 parameters, the smallest step removes 1536" in text
    assert f"raise --{name} to at least 0.0559" in text


@pytest.mark.parametrize("sparsity", [[], ["--sparsity", "0.1"]])
def test_a_model_of_which_nothing_can_go(capsys, given, sparsity):
    text = refusal(capsys, given, "--min-groups-per-layer", "24", *sparsity)
    assert "nothing can be cut" in text and "4 of 4 kv_groups and 24 of 24 ffn_channels" in text
    assert "at least 24 groups of each kind (--min-groups-per-layer), channels in multiples of 1 (--round-to)" in text


@pytest.mark.parametrize("value", ["1.2", "-0.5"])
def test_a_threshold_outside_its_range(capsys, given, value):
    text = refusal(capsys, given, "--unlearning-threshold", value)
    assert "unlearning_threshold" in text and "[0, 1]" in text


def test_a_misspelt_setting_is_offered_the_nearest(capsys, given, tmp_path):
    assert "--unlearning-threshold" in refusal(capsys, given, "--unlearning-treshold", "0.6")
    config = tmp_path / "settings.toml"
    config.write_text("sparcity = 0.3\n")
    assert "did you mean sparsity?" in refusal(capsys, given, "--config", str(config))


def test_target_modules_that_match_nothing(capsys, given):
    text = refusal(capsys, given, "--target-modules", "q_proj,fc1")
    assert "fc1" in text and "q_proj,k_proj" in text


def test_a_folder_with_a_run_of_other_settings_names_the_setting(capsys, given, tmp_path):
    (tmp_path / "out").mkdir()
    flags = {name.strip("-"): value for name, value in given.items() if name != "--output"}
    config = "".join(f'{name} = "{value}"\n' for name, value in flags.items())
    radius = Settings().relearning_radius
    newer = f'order = "difference"\nrelearning_radius = {radius}\n'  # a run without them is an older one
    (tmp_path / "out" / "config.toml").write_text(f'{config}output = "{given["--output"]}"\n{newer}seed = 3\n')
    before = (tmp_path / "out" / "config.toml").read_text()
    text = refusal(capsys, given)
    assert "seed was 3, now 0" in text and "--seed" in text and "relearning_radius" not in text
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["config.toml"]
    assert (tmp_path / "out" / "config.toml").read_text() == before


def test_a_folder_of_something_else_is_left_alone(capsys, given, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    assert "choose another --output" in refusal(capsys, given)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["model"]


def test_a_reference_that_is_not_there_is_found_before_anything_is_written(capsys, given, tmp_path):
    assert "there is no model" in refusal(capsys, given, "--reference", str(tmp_path / "nowhere"))


def test_a_device_that_is_not_there(capsys, given):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "--device cpu" in refusal(capsys, given, "--device", "cuda")


def test_a_reporting_tool_that_is_not_there(capsys, given):
    assert "tensorboardd" in refusal(capsys, given, "--report-to", "tensorboardd")


def test_quantised_weights(capsys, given, tmp_path, run_folder):
    model = spoilt(tmp_path, run_folder, quantization_config={"quant_method": "fp8"})
    assert "quantised" in refusal(capsys, {**given, "model": model})


def test_metric_lora_without_an_adapter_on_the_feed_forward(capsys, given):
    text = refusal(capsys, given, "--metric", "lora", "--target-modules", "q_proj")
    assert "down_proj gate_proj up_proj" in text and "--metric gate" in text


def test_withheld_rows_that_are_to_be_forgotten(capsys, given):
    text = refusal(capsys, given, "--floor-rows", given["--forget"])
    assert "--floor-rows also stand in the forget set" in text


def test_an_output_that_is_a_file(capsys, given, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refusal(capsys, given)
    assert (tmp_path / "out").read_text() == "mine"


def test_data_that_changed_since_the_run_began(capsys, given, tmp_path, run_folder):
    short = [
        "--warmup-steps",
        "1",
        "--prune-every",
        "1",
        "--prune-rounds",
        "1",
        "--finish-steps",
        "1",
        "--device",
        "cpu",
    ]
    flags = [word for name, value in given.items() if name != "model" for word in (name, value)]
    assert main(["unlearn", given["model"], *flags, *short]) in (0, 3)
    first, *rest = (tmp_path / "forget.jsonl").read_text().splitlines()
    (tmp_path / "forget.jsonl").write_text("\n".join([first.replace("Home", "House"), *rest]) + "\n")
    assert "forget: the content has changed" in refusal(capsys, given, *short)
