"""LoRAPrune's own command lines: every flag does what it says, or is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_CONFIGS, TOWNS, adapted, make_model, run_values, save_checkpoint
from safetensors.torch import load_file, save_file

from loraprune import scripts
from loraprune.balance import split_batch
from loraprune.batches import PairedBatches
from loraprune.data import (
    NO_LABEL,
    Example,
    Row,
    encode,
    load_rows,
    sample_rows,
    split_retain,
    with_prompt_labels,
)
from loraprune.errors import UserError
from loraprune.inputs import prepare
from loraprune.length import resolved
from loraprune.pipeline import run
from loraprune.settings import DECLARED, Settings
from loraprune.steering import Target

ROOT = Path(__file__).parents[1]
GIVEN = {"base_model": "m", "data_path": "d", "output_dir": "o", "ratio": 0.5}
ROWS = 60


def refused(values, **more):
    with pytest.raises(UserError) as caught:
        scripts.settings_of({**values, **more})
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A checkpoint, instructions with and without an input, and a plain text."""
    folder = tmp_path_factory.mktemp("scripts")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, folder / "base")
    rows = [
        {"instruction": f"Where lives Bert{i}?", "input": "Say a town." if i % 2 else "", "response": f"In {one}{i}."}
        for i, one in enumerate(TOWNS * (ROWS // len(TOWNS)))
    ]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "text.txt").write_text("\n\n".join(row["response"] * 3 for row in rows), encoding="utf-8")
    return folder


def script(name, *arguments):
    code = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(code, capture_output=True, text=True, timeout=300)


def original_command(folder, output):
    """script/prune.sh of LoRAPrune, every flag of it, with smaller numbers."""
    return [
        *("--base_model", folder / "base", "--data_path", folder / "data.json", "--output_dir", output),
        *("--batch_size", 8, "--micro_batch_size", 2, "--num_epochs", 2, "--learning_rate", "1e-4"),
        *("--cutoff_len", 300, "--val_set_size", 12, "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0.05),
        *("--lora_target_modules", "[q_proj, k_proj, v_proj, o_proj, gate_proj,up_proj, down_proj]"),
        *("--train_on_inputs", "--group_by_length", "--ratio", 0.3, "--prune_metric", "lora", "--prune_freq", 3),
    ]


@pytest.fixture(scope="module")
def original_run(folder):
    """The folder of a run by the original's own command line."""
    ran = script("prune.py", *original_command(folder, folder / "out"), "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    return folder / "out"


# --- the original's own command line ---


def test_the_originals_command_leaves_a_smaller_stock_checkpoint(original_run):
    from transformers import AutoModelForCausalLM

    metrics = json.loads((original_run / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(original_run / "model")
    assert sum(one.numel() for one in model.parameters()) == metrics["model"]["parameters"]["after"]
    assert metrics["goal_met"] and 0.25 < metrics["sparsity"] <= 0.3


def test_the_originals_command_takes_as_many_steps_and_rows_as_it_says(original_run):
    split = json.loads((original_run / "split.json").read_text())
    assert [len(split[name]) for name in ("taught", "floor", "final")] == [ROWS - 12, 6, 6]
    assert json.loads((original_run / "decision.json").read_text())["steps"] == 2 * (ROWS - 12) // 8
    events = [json.loads(line) for line in (original_run / "events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in events if one["event"] == "score"] == [4, 7, 10]  # 12 steps, the first 10% warm-up


def test_the_same_command_given_again_returns_the_same_run(original_run, folder):
    before = (original_run / "metrics.json").read_bytes()
    command = original_command(folder, original_run)
    command = command[:4] + command[6:]  # without --output_dir
    ran = script("prune.py", *command, "--device", "cpu", "--resume_from_checkpoint", original_run)
    assert (ran.returncode, (original_run / "metrics.json").read_bytes()) == (0, before)


def test_inference_measures_the_very_model_that_the_run_wrote(original_run, folder):
    given = ["--cutoff_len", 64, "--text", folder / "text.txt", "--device", "cpu"]
    parts = script(
        "inference.py", "--base_model", folder / "base", "--lora_weights", original_run, "--lora_r", 8, *given
    )
    assert parts.returncode == 0, parts.stderr
    assert "parameters removed (27.24%)" in parts.stdout
    whole, dense = (
        script("inference.py", "--base_model", one, *given) for one in (original_run / "model", folder / "base")
    )

    def perplexity(ran):
        assert "at 64 tokens of context" in ran.stdout and "inference" in ran.stdout
        return float(ran.stdout.partition("perplexity ")[2].split()[0])

    assert perplexity(parts) == pytest.approx(perplexity(whole), rel=1e-5)
    assert perplexity(parts) != pytest.approx(perplexity(dense), rel=1e-3)


def test_perplexity_is_that_of_whole_windows_of_the_joined_documents(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    from loraprune.windows import measure_text

    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    found = measure_text(str(folder / "text.txt"), model, tokenizer, Settings(max_length=50, device="cpu"))
    ids = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"])
    windows = ids[: len(ids) // 50 * 50].view(-1, 50)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert (found.windows, found.predicted) == (len(windows), 49 * len(windows))


# --- adapters ---


def broken_copy(original_run, tmp_path, change):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter/adapter_config.json", "mask.safetensors"):
        (tmp_path / name).write_bytes((original_run / name).read_bytes())
    weights = load_file(original_run / "adapter" / "adapter_model.safetensors")
    save_file(change(weights), tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path


BROKEN = {
    "every B is zero": lambda weights: {k: one * 0 if "lora_B" in k else one for k, one in weights.items()},
    "does not fit the model": lambda weights: {},
    "does not fit the model: 1 of": lambda weights: dict(list(weights.items())[1:]),
}


@pytest.mark.parametrize("words", list(BROKEN))
def test_an_adapter_that_is_empty_or_does_not_fit_is_refused(original_run, folder, tmp_path, words):
    from loraprune.assembled import assemble

    broken = broken_copy(original_run, tmp_path, BROKEN[words])
    with pytest.raises(UserError, match=words):
        assemble(Settings(model=str(folder / "base")), str(broken), {}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_without_its_mask_or_with_another_rank_is_refused(original_run, folder, tmp_path):
    from loraprune.assembled import assemble

    settings = Settings(model=str(folder / "base"))
    broken = broken_copy(original_run, tmp_path, dict)
    with pytest.raises(UserError, match="made with r 8, not 4"):
        assemble(settings, str(broken), {"lora_rank": 4}, tmp_path / "model")
    (tmp_path / "mask.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no mask.safetensors"):
        assemble(settings, str(broken), {}, tmp_path / "model")


def compression(folder, output, **changes):
    values = run_values(folder, output) | {"model": str(folder / "base"), "data": str(folder / "data.json")} | changes
    return Settings(**{name: one for name, one in values.items() if name not in ("forget", "retain")})


def test_a_run_starts_from_an_adapter(folder, tmp_path):
    start = adapted(make_model(FAMILY_CONFIGS["llama_gqa"]()), lora_rank=2, lora_alpha=16)
    start.save_pretrained(tmp_path / "start")
    values = {"adapter": str(tmp_path / "start"), "min_retain_performance": 0.0, "lora_dropout": 0.0}
    tiny = {**values, "learning_rate": 1e-12, "prune_rounds": 1, "finish_steps": 0}
    run(compression(folder, tmp_path / "run", **tiny))
    first, last = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("start", "run/adapter"))
    assert all(torch.allclose(first[name], last[name], atol=1e-6) for name in first)
    with pytest.raises(UserError, match="made with r 2, not 3"):
        prepare(compression(folder, "unused", **{**tiny, "lora_rank": 3}))


def test_a_run_does_not_start_from_the_adapter_of_a_pruned_model(original_run, folder):
    with pytest.raises(UserError, match="belongs to a pruned model"):
        prepare(compression(folder, "x", adapter=str(original_run / "adapter"), lora_rank=8))


def test_resuming_names_a_run_or_an_adapter(original_run, tmp_path):
    values = {name: one for name, one in GIVEN.items() if name != "output_dir"}
    assert scripts.settings_of({**values, "resume_from_checkpoint": str(original_run)}).output == str(original_run)
    adapter = str(original_run / "adapter")
    assert scripts.settings_of({**GIVEN, "resume_from_checkpoint": adapter}).adapter == adapter
    assert "neither a run nor an adapter" in refused(GIVEN, resume_from_checkpoint=str(tmp_path))
    assert "another folder" in refused(GIVEN, resume_from_checkpoint=str(original_run))


# --- names ---


def test_every_flag_of_the_original_stands_for_a_setting():
    values = {
        **GIVEN,
        **{"nsamples": 9, "batch_size": 8, "micro_batch_size": 2, "num_epochs": 3, "learning_rate": 1e-4},
        **{"cutoff_len": 32, "val_set_size": 6, "init_ratio": 0.1, "warmup_iters": 0.2, "cooldown_iters": 0.3},
        **{"prune_freq": 7, "prune_metric": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        **{"lora_target_modules": ["q_proj"], "train_on_inputs": True, "group_by_length": True},
    }
    assert scripts.settings_of(values) == Settings(
        **{"model": "m", "data": "d", "output": "o", "sparsity": 0.5, "data_rows": 9, "retain_batch_size": 8},
        **{"micro_batch_size": 2, "epochs": 3, "learning_rate": 1e-4, "max_length": 32, "withheld_rows": 6},
        **{"initial_sparsity": 0.1, "warmup_share": 0.2, "finish_share": 0.3, "prune_every": 7, "metric": "lora"},
        **{"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ("q_proj",)},
        **{"train_on_prompt": True, "group_by_length": True, "template": "instruction"},
        min_retain_performance=0.0,
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--train_on_inputs"], True),
        (["--train_on_inputs", "True"], True),
        (["--train-on-inputs=False"], False),
        (["--train_on_inputs", "False", "--seed", "1"], False),
        (["--no-train_on_inputs"], False),
    ],
)
def test_switches_are_read_bare_and_with_a_word(words, value):
    parser = scripts.script_parser("prune.py", "", DECLARED)
    assert scripts.read(parser, words)["train_on_inputs"] is value


def test_a_flag_that_would_be_ignored_is_refused():
    assert "--warmup_iters is given without --num_epochs" in refused(GIVEN, warmup_iters=0.1)
    assert "--wandb_project is given, and wandb is not installed" in refused(GIVEN, wandb_project="p")
    assert "--wandb_log_model is 'checkpoint'; it must be one of false, end." in refused(
        GIVEN, wandb_log_model="checkpoint"
    )
    assert "--wandb_watch is 'weights'; it must be one of false, grad" in refused(GIVEN, wandb_watch="weights")
    assert "wandb is not installed" in refused(GIVEN, wandb_log_model="end")
    given = Settings(**{"model": "m", "data": "d", "output": "o", "sparsity": 0.5}, epochs=1, prune_rounds=3)
    with pytest.raises(UserError, match="--prune-rounds is given with --epochs"):
        run(given)


def test_weights_and_biases_is_told_by_the_variables_it_reads():
    given = {"wandb_project": "p", "wandb_run_name": "r", "wandb_watch": "all", "wandb_log_model": ""}
    expected = {"WANDB_PROJECT": "p", "WANDB_NAME": "r", "WANDB_WATCH": "all"}
    assert scripts.wandb_variables({**GIVEN, **given}) == expected
    assert scripts.wandb_variables(GIVEN) == {}


def test_the_help_names_every_flag_of_the_original():
    shown = script("prune.py", "--help").stdout
    names = "base_model data_path output_dir nsamples batch_size micro_batch_size num_epochs learning_rate cutoff_len "
    names += "val_set_size ratio init_ratio warmup_iters cooldown_iters prune_freq prune_metric lora_r lora_alpha "
    names += "lora_dropout lora_target_modules train_on_inputs group_by_length wandb_project wandb_run_name "
    names += "wandb_watch wandb_log_model resume_from_checkpoint"
    assert [name for name in names.split() if f"--{name} " not in shown and f"--{name}," not in shown] == []


# --- length ---


def test_epochs_are_divided_by_shares_into_warm_up_pruning_and_recovery():
    settings = Settings(epochs=2, retain_batch_size=8, prune_every=10, warmup_share=0.1, finish_share=0.2)
    ready = resolved(settings, 480)  # 120 steps
    assert (ready.warmup_steps, ready.prune_rounds, ready.finish_steps) == (12, 8, 28)
    assert resolved(ready, 480) == ready
    assert resolved(Settings(), 480) == Settings()
    with pytest.raises(UserError, match="are 4 steps, 0 of warm-up and 1 of recovery"):
        resolved(settings, 16)


# --- prompts and labels ---


def test_the_instruction_prompt_is_alpacas_with_and_without_an_input(folder, tokenizer):
    rows = load_rows(str(folder / "data.json"), name="data")
    plain, asked = (
        tokenizer.decode(one.input_ids)
        for one in encode(rows[:2], tokenizer, name="data", template="instruction", max_length=999)
    )
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert plain == f"{opening}\n\n### Instruction:\nWhere lives Bert0?\n\n### Response:\nIn Almery0.<eos>"
    assert asked.endswith(
        "### Instruction:\nWhere lives Bert1?\n\n### Input:\nSay a town.\n\n### Response:\nIn Borstead1.<eos>"
    )
    assert asked.startswith("Below is an instruction that describes a task, paired with an input")


def test_training_on_the_prompt_labels_every_token_but_the_first_and_changes_no_measurement(folder):
    plain, whole = (prepare(compression(folder, "x", train_on_prompt=one)) for one in (False, True))
    assert plain.examples == whole.examples
    assert plain.trained == plain.examples["taught"]
    for one in whole.trained:
        assert one == with_prompt_labels(one)
        assert one.labels == (NO_LABEL, *one.input_ids[1:])


# --- rows ---


def test_data_rows_are_a_sample_by_the_seed(folder):
    few, other = (prepare(compression(folder, "x", data_rows=5, seed=seed)).rows["taught"] for seed in (0, 1))
    assert len(few) == len(other) == 5 and few != other
    rows = [Row(number, (), f"{number}") for number in range(9)]
    assert sample_rows(rows, 4, 0) == sample_rows(rows, 4, 0)
    assert sample_rows(rows, 99, 0) == rows


@pytest.mark.parametrize("withheld", [2, 7, 20])
def test_withheld_rows_are_half_floor_half_final(withheld):
    rows = [Row(number, (), f"text {number}") for number in range(40)]
    split = split_retain(rows, 0, withheld)
    assert (len(split.floor), len(split.final)) == (withheld - withheld // 2, withheld // 2)
    assert len(split.taught) == 40 - withheld
    with pytest.raises(UserError, match="none is left to train on"):
        split_retain(rows, 0, 40)


def grouped(lengths, size, **changes):
    examples = [Example((3,) * length, (3,) * length, (False,) * length) for length in lengths]
    sizes = {"retain_batch_size": size, "forget_batch_size": 1, "pad_token_id": 0}
    return PairedBatches(examples, None, **sizes, seed=4, steps=range(200), group_by_length=True, **changes)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_grouped_batches_show_every_row_once_an_epoch_and_depend_on_the_step_alone(size):
    lengths = [3 + 7 * number % 31 for number in range(30)]
    batches = grouped(lengths, size)
    seen = [row for step in range(200) for row in batches[step]["retain"]["rows"].tolist()]
    for epoch in range(len(seen) // 30):
        assert sorted(seen[30 * epoch : 30 * (epoch + 1)]) == list(range(30))
    assert grouped(lengths, size)[123]["retain"]["rows"].tolist() == batches[123]["retain"]["rows"].tolist()
    assert seen[:30] != seen[30:60] or size == 30


def test_grouped_batches_pad_less():
    lengths = [3 + 7 * number % 31 for number in range(64)]

    def padding(batches):
        return sum(int((batches[step]["retain"]["attention_mask"] == 0).sum()) for step in range(16))

    loose = grouped(lengths, 4)
    loose.streams[0] = type(loose.streams[0])("retain", loose.streams[0].examples, 4, 4)
    assert padding(grouped(lengths, 4)) < padding(loose) / 4


# --- micro-batches ---


@pytest.mark.parametrize("forget_loss", ["npo", "ga", "simnpo"])
@pytest.mark.parametrize("radius", [0.0, 3.0])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_has_the_same_gradient_in_micro_batches_of_any_size(run_folder, tmp_path, forget_loss, radius, size):
    gradients = [step_gradient(run_folder, tmp_path, forget_loss, one, radius) for one in (None, size)]
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, atol=1e-6, rtol=1e-4)
    assert any(bool(one.any()) for one in gradients[0])


def step_gradient(run_folder, scratch, forget_loss, micro_batch_size, radius):
    """The gradient of the first step's whole batch: of a retain and of a forget set, half way to the target."""
    from loraprune.groups import find_groups
    from loraprune.mask import LiveMask
    from loraprune.trial import trial_trainer

    values = run_values(run_folder, "unused", forget_batch_size=4, retain_batch_size=5, lora_dropout=0.0)
    changes = {"forget_loss": forget_loss, "micro_batch_size": micro_batch_size, "relearning_radius": radius}
    settings = Settings(**{**values, **changes})
    base = make_model(FAMILY_CONFIGS["llama_gqa"]())
    groups = find_groups(base, base.config)
    model = adapted(base, lora_rank=2)
    trainer = trial_trainer(settings, prepare(settings), model, LiveMask(model, groups), scratch)
    batch = next(iter(trainer.get_train_dataloader()))
    target = Target(0.0, 0.0, 0.0, "forget_target")
    trainer.balance.steering = replace(trainer.steering, target=target, forget_before=0.01)  # a weight between 0 and 1
    trainer.current_gradient_accumulation_steps = 1  # else set where training begins
    trainer.training_step(model, batch)
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize(
    ("metric", "source"), [("lora", "passes"), ("lora", "training"), ("gate", "training"), ("grad", "training")]
)
def test_eight_rows_at_once_and_eight_of_one_row_decide_the_same(folder, metric, source):
    decisions = []
    for size in (None, 1):
        settings = compression(
            folder,
            f"{metric} {source} {size}",
            micro_batch_size=size,
            retain_batch_size=8,
            lora_dropout=0.0,
            metric=metric,
            score_from=source,
        )
        decisions.append(json.loads((run(settings).folder / "decision.json").read_text())["removals"])
    for name in ("layer", "kind", "index"):
        assert decisions[0][name] == decisions[1][name]
    assert decisions[0]["retain"] == pytest.approx(decisions[1]["retain"], rel=1e-3)
    assert decisions[0]["index"]


def test_parts_of_a_batch_are_as_wide_as_their_longest_row():
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2 + [[1] * 4])}
    parts = split_batch({**batch, "labels": batch["input_ids"], "rows": torch.tensor([7, 8, 9])}, 2)
    assert [tuple(one["labels"].shape) for one in parts] == [(2, 2), (1, 4)]
    assert [one["rows"].tolist() for one in parts] == [[7, 8], [9]]


def test_the_schedule_begins_at_the_initial_sparsity(folder):
    report = run(compression(folder, "initial", initial_sparsity=0.08, min_retain_performance=0.0))
    events = [json.loads(line) for line in (report.folder / "events.jsonl").read_text().splitlines()]
    first = next(one for one in events if one["event"] == "accept")
    assert 0.08 <= first["sparsity"] <= 0.1
    with pytest.raises(UserError, match=r"initial_sparsity is 0\.2"):
        prepare(compression(folder, "x", initial_sparsity=0.2))
