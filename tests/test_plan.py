"""Plan: it refuses what the run would refuse, counts what the run would count, and leaves everything as it is."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, run_values, save_checkpoint, write_rows

from loraprune import cli
from loraprune.data import collate
from loraprune.decision import Rules, decide_unlearning
from loraprune.errors import UserError
from loraprune.estimate import Cost, Held, passes_over, stage_memory
from loraprune.groups import find_groups
from loraprune.inputs import prepare
from loraprune.mask import LiveMask, full_mask
from loraprune.memory import traced
from loraprune.model import attach_lora, load_model, pad_token_id
from loraprune.plan import make_plan
from loraprune.plan_tables import scored_lines, share_lines
from loraprune.records import OF_TRAINING
from loraprune.scoring import score_model
from loraprune.sensitivity import SensitivityDict, update_sensitivity_dict
from loraprune.setting import flag
from loraprune.settings import Settings, as_values
from loraprune.step_scores import StepScores
from loraprune.trial import Trial

SHORT = {"metric": "gate", "unlearning_threshold": 0.45}


def settings_of(folder, **changes):
    return Settings(**{**run_values(folder, "out"), "output": "", **SHORT, **changes})


def command_line(command, settings):
    """The settings as someone would type them."""
    words = []
    for name, value in as_values(settings).items():
        if name != "model" and value != as_values(Settings()).get(name):
            words += [flag(name), str(value)]
    return [command, settings.model, *words]


@pytest.fixture(scope="module")
def values(run_folder):
    return make_plan(settings_of(run_folder))


# --- the run's own checks ---------------------------------------------------------------------------------------------


def spoil_config(folder, **changes):
    path = folder / "checkpoint" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return {}


def spoil_line(folder):
    with (folder / "forget.jsonl").open("a") as file:
        file.write("{oops}\n")
    return {}


def share_a_row(folder):
    first = (folder / "forget.jsonl").read_text().splitlines()[0]
    with (folder / "retain.jsonl").open("a") as file:
        file.write(first + "\n")
    return {}


def empty_retain(folder):
    (folder / "retain.jsonl").write_text("")
    return {}


def lose_tokenizer(folder):
    for file in (folder / "checkpoint").glob("tokenizer*"):
        file.unlink()
    return {}


def other_run(folder):
    (folder / "out").mkdir()
    (folder / "out" / "config.toml").write_text('model = "another"\nseed = 3\n')
    return {}


def something_else(folder):
    (folder / "out" / "model").mkdir(parents=True)
    return {}


BAD = {
    "a missing file": lambda folder: {"forget": str(folder / "nowhere.jsonl")},
    "a malformed line": spoil_line,
    "a row in both sets": share_a_row,
    "an empty set": empty_retain,
    "an unknown architecture": lambda folder: spoil_config(
        folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]
    ),
    "weights that contradict the config": lambda folder: spoil_config(folder, intermediate_size=25),
    "quantised weights": lambda folder: spoil_config(folder, quantization_config={"quant_method": "fp8"}),
    "no tokenizer": lose_tokenizer,
    "a sparsity out of reach": lambda folder: {"sparsity": 0.95},
    "a module that is not there": lambda folder: {"target_modules": ("q_proj", "fc1")},
    "metric lora without adapters": lambda folder: {"metric": "lora", "target_modules": ("q_proj",)},
    "a reporting tool that is not there": lambda folder: {"report_to": ("tensorboardd",)},
    "a reference that is not there": lambda folder: {"reference": str(folder / "nowhere")},
    "a folder with another run": other_run,
    "a folder of something else": something_else,
}


@pytest.mark.parametrize("bad", BAD)
def test_it_ends_with_the_error_of_the_run(bad, run_folder, tmp_path):
    from loraprune.pipeline import run

    for name in ("checkpoint", "forget.jsonl", "retain.jsonl"):
        copy = shutil.copytree if (run_folder / name).is_dir() else shutil.copy
        copy(run_folder / name, tmp_path / name)
    changes = BAD[bad](tmp_path)
    settings = settings_of(tmp_path, **{"output": str(tmp_path / "out"), **changes})
    before = everything_in(tmp_path)
    with pytest.raises(UserError) as planned:
        make_plan(settings)
    assert everything_in(tmp_path) == before
    with pytest.raises(UserError) as ran:
        run(settings)
    assert str(planned.value) == str(ran.value)


def test_data_that_changed_since_a_run_began_are_refused(run_folder, tmp_path):
    from loraprune.pipeline import run

    for name in ("forget", "retain"):
        shutil.copy(run_folder / f"{name}.jsonl", tmp_path)
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    settings = settings_of(run_folder, output=str(tmp_path / "out"), min_retain_performance=0.0, **sets)
    run(settings)
    make_plan(settings)
    text = (tmp_path / "forget.jsonl").read_text()
    (tmp_path / "forget.jsonl").write_text(text.replace("Home", "House"))
    with pytest.raises(UserError, match="forget: the content has changed"):
        make_plan(settings)


def test_the_command_line_ends_with_the_codes_of_a_run(capsys, run_folder, tmp_path):
    good = command_line("plan", settings_of(run_folder))
    assert cli.main([*good, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["task"] == "unlearn"
    assert cli.main([*good, "--holdout", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_the_flags_are_those_of_the_run_without_its_folder():
    sets = ["--forget", "f", "--retain", "r"]
    assert cli.settings_of(["plan", "m", *sets]) == Settings(model="m", forget="f", retain="r")
    same = ["m", "--data", "d", "--sparsity", "0.3"]
    compressing = cli.settings_of(["plan", *same])
    assert compressing == replace(cli.settings_of(["prune", *same, "--output", "o"]), output="")
    for words, told in (
        (["plan", "m", "--forget", "f"], "--retain is missing"),
        (["plan", "m"], "--forget, --retain are missing"),
        (["plan", "m", "--data", "d"], "--sparsity is missing"),
        (["plan", "m", *sets, "--data", "d"], "loraprune unlearn takes no data"),
        (["plan", "m", "--data", "d", "--sparsity", "0.3", "--forget-target", "0.1"], "takes no forget_target"),
    ):
        with pytest.raises(UserError, match=told):
            cli.settings_of(words)


# --- nothing changes --------------------------------------------------------------------------------------------------


def everything_in(folder):
    """Every file with its content's hash and time, every folder by its name."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("metric", ["gate", "lora"])
def test_nothing_is_made_or_changed(metric, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = everything_in(run_folder)
    make_plan(settings_of(run_folder, metric=metric, output=str(tmp_path / "out")))
    assert everything_in(run_folder) == before
    assert list(tmp_path.iterdir()) == []


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(run_folder):
    """The sensitivities of the untouched model, computed here step by step, and its groups."""
    settings = settings_of(run_folder)
    inputs = prepare(settings)
    base = load_model(settings.model, settings)
    groups = find_groups(base, inputs.config)
    model = attach_lora(base, settings)
    live, scores = LiveMask(model, groups), SensitivityDict()
    for name, examples in (("retain", inputs.examples["taught"]), ("forget", inputs.examples["forget"])):
        batch = collate(examples, pad_token_id(inputs.tokenizer))
        new = score_model(model, live, [batch], name, prune_metric="gate", loss=settings.score_loss)
        scores = update_sensitivity_dict(scores, new, name, kept=full_mask(groups), beta=0.5)
    return groups, scores


def test_single_candidates_are_those_above_the_threshold(values, scored):
    groups, scores = scored
    for row in values["shares"]["thresholds"]:
        above = scores.candidates(row["threshold"], 1e-6)
        for kind, one in above.items():
            spare = groups.count(kind) - 1  # every layer keeps one
            assert row["groups"][kind] == int(one.sum(1).clamp(max=spare).sum())
    assert any(row["groups"]["ffn_channel"] for row in values["shares"]["thresholds"])


def test_slices_are_what_the_decision_takes_with_an_unlimited_budget(run_folder, values, scored):
    groups, scores = scored
    rules = Rules.of(settings_of(run_folder))
    for row in values["shares"]["thresholds"]:
        decision = decide_unlearning(
            scores.forget.values(),
            scores.retain.values(),
            full_mask(groups),
            groups,
            budget=groups.total_parameters,
            rules=replace(rules, threshold=row["threshold"], all_may_go=False),
        )
        left = full_mask(groups).without(decision.removals)
        gone = {kind: int((~one[0]).sum()) for kind, one in left.kept.items()}
        assert row["slices"] == gone
        assert row["sparsity"] == left.sparsity(groups)
    counts = [sum(row["slices"].values()) for row in values["shares"]["thresholds"]]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_too_few_candidates_are_said(run_folder):
    few = make_plan(settings_of(run_folder, unlearning_threshold=0.9, sparsity=0.3, order="share"))["shares"]
    assert not few["enough"]
    assert any(line.startswith("warning: threshold 0.9 leaves") for line in share_lines(few))
    enough = make_plan(settings_of(run_folder, unlearning_threshold=0.0, sparsity=0.3, order="share"))["shares"]
    assert enough["enough"] and not any("warning" in line for line in share_lines(enough))


def test_a_size_is_reached_by_difference_whatever_the_shares(run_folder):
    shares = make_plan(settings_of(run_folder, sparsity=0.3))["shares"]
    above = next(row for row in shares["thresholds"] if row["threshold"] == shares["threshold"])
    assert shares["enough"] and shares["all_may_go"] and shares["most"] > above["sparsity"]
    assert any("whatever their share" in line for line in share_lines(shares))


def test_fresh_adapters_are_said_to_see_a_random_projection(run_folder):
    lines = share_lines(make_plan(settings_of(run_folder, metric="lora"))["shares"])
    assert any("B = 0" in line for line in lines)


def test_a_model_whose_scores_are_not_finite_is_refused(run_folder, tokenizer, tmp_path):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    save_checkpoint(model, tokenizer, tmp_path / "broken")
    with pytest.raises(UserError, match="P of the floor rows is nan before anything was done"):
        make_plan(settings_of(run_folder, model=str(tmp_path / "broken")))


def test_groups_and_their_part_are_those_of_the_model(values):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    total = sum(one.numel() for one in model.parameters())
    channel, kv_group = 3 * 32, (2 * 4 + 4 + 4 + 2 * 4) * 32  # head_dim 4, two query heads a key/value head
    assert values["groups"]["total_parameters"] == total
    assert values["groups"]["kinds"]["ffn_channel"]["layers"] == [
        {"first": 0, "last": 1, "groups": 24, "parameters_per_group": channel}
    ]
    assert values["groups"]["kinds"]["kv_group"]["layers"][0]["parameters_per_group"] == kv_group
    assert values["groups"]["prunable"] == pytest.approx((2 * 23 * channel + 2 * 3 * kv_group) / total)


# --- data, checkpoint -------------------------------------------------------------------------------------------------


def test_pairs_are_shown_by_their_numbers_alone(capsys, run_folder, tmp_path):
    rows = [json.loads(line) for line in (run_folder / "forget.jsonl").read_text().splitlines()]
    words = "the lighthouse keeper of the northern cape counts every passing ship"
    forget = [*rows, {"question": "Who counts?", "answer": f"{words} by night"}]
    retain = [json.loads(line) for line in (run_folder / "retain.jsonl").read_text().splitlines()]
    retain.append({"question": "Who counts?", "answer": f"{words} by day"})
    sets = {
        "forget": write_rows(tmp_path / "f.jsonl", forget),
        "retain": write_rows(tmp_path / "r.jsonl", retain),
    }
    settings = settings_of(run_folder, **sets)
    assert cli.main(command_line("plan", settings)) == 0
    printed = capsys.readouterr().out
    assert "forget and retain row 5 and 11 share" in printed
    assert "lighthouse" not in printed and "Prys" not in printed


def test_every_head_count_has_its_class(values):
    checkpoint = values["checkpoint"]
    assert checkpoint["classes"] == {"LlamaForCausalLM": [4, 2, 1], "MistralForCausalLM": [3]}
    assert checkpoint["never"] == []


def test_a_biased_llama_says_which_head_counts_it_never_has(run_folder, tokenizer, tmp_path):
    config = FAMILY_CONFIGS["llama_gqa"]()
    config.attention_bias = True
    save_checkpoint(make_model(config), tokenizer, tmp_path / "biased")
    checkpoint = make_plan(settings_of(run_folder, model=str(tmp_path / "biased")))["checkpoint"]
    assert checkpoint["classes"] == {"LlamaForCausalLM": [4, 2, 1]} and checkpoint["never"] == [3]


# --- memory, time -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0.0, 3.0])
def trial(request, run_folder, tmp_path):
    return trial_of(run_folder, tmp_path, relearning_radius=request.param)


def trial_of(run_folder, folder, **changes):
    settings = settings_of(run_folder, forget_batch_size=4, retain_batch_size=5, evaluate_batch_size=5, **changes)
    return Trial(settings, prepare(settings), folder)


@pytest.mark.parametrize("kind", ["evaluate", "look", "score", "train"])
def test_two_and_three_rows_foretell_a_whole_batch(trial, kind):
    one = trial.trial_passes()[kind]
    rows = {name: [part[0], *[part[-1]] * (len(part) - 1)] for name, part in one.heaviest.items()}
    labels = {name: dict.fromkeys(part, 1) for name, part in one.heaviest.items()}
    same = replace(one, heaviest=rows, labels=labels)
    direct = max(traced(lambda: one.run(rows)))
    assert max(one.counts.values()) == (4 if kind == "look" else 5)  # there are four forget rows
    assert same.footprint().peak(one.counts) == direct


def test_passes_leave_the_model_as_it_is(trial):
    model = trial.trainer.adapted
    before = {name: one.detach().clone() for name, one in model.state_dict().items()}
    for one in trial.trial_passes().values():
        one.run(one.heaviest)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters()) and not model.training


def test_the_heaviest_step_is_the_one_with_most_tokens(run_folder, tmp_path):
    trial = trial_of(run_folder, tmp_path, relearning_radius=0.0)
    tokens = [sum(one.values()) for one in trial.passes.step_tokens]
    step = trial.trial_passes()["train"]
    assert sum(len(rows) * step.widths[name] for name, rows in step.heaviest.items()) == max(tokens)
    assert len(tokens) == trial.trainer.args.max_steps


def test_a_step_that_looks_ahead_passes_half_of_the_forget_rows_at_a_time(run_folder, tmp_path):
    one = trial_of(run_folder, tmp_path, relearning_radius=3.0).trial_passes()["train"]
    [(name, rows)] = one.heaviest.items()
    assert (name, len(rows)) == ("retain", 5)
    few = settings_of(run_folder, forget_batch_size=4, retain_batch_size=1, evaluate_batch_size=5)
    [(name, rows)] = Trial(few, prepare(few), tmp_path).trial_passes()["train"].heaviest.items()
    assert (name, len(rows)) == ("forget", 2)


def scored_in_training(folder, **changes):
    """The settings of a compression whose training steps are scored."""
    values = {name: one for name, one in run_values(folder, "out").items() if not name.startswith(("forget", "band"))}
    values |= {"data": values.pop("retain"), "output": "", "sparsity": 0.2, "min_retain_performance": 0.0}
    return Settings(**{**values, "score_from": "training", "score_every": 2, **changes})


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("metric", OF_TRAINING)
def test_a_scored_step_is_foretold_too_and_leaves_nothing(run_folder, tmp_path, metric, most):
    settings = scored_in_training(run_folder, metric=metric, retain_batch_size=5, micro_batch_size=most)
    trial = Trial(settings, prepare(settings), tmp_path)
    passes, model = trial.trial_passes(), trial.trainer.adapted
    one = passes["score"]
    assert one.counts == {"retain": most or 5}
    longest = {"retain": [one.heaviest["retain"][0]] * one.counts["retain"]}
    alike = replace(one, heaviest=longest, labels={"retain": dict.fromkeys(longest["retain"], 1)})
    assert alike.footprint().peak(one.counts) == max(traced(lambda: one.run(longest)))
    if metric in ("gate", "grad"):  # gates, gradients of all frozen weights that may be cut
        assert one.footprint().peak(one.counts) > passes["train"].footprint().peak(one.counts)
    assert trial.passes.read_seconds() > 0
    assert all(weight.grad is None for weight in model.parameters()) and not model.training
    assert trial.trainer.step_scores.gathered is None


def test_the_steps_that_a_run_scores_are_those_that_are_said(run_folder, tmp_path, monkeypatch):
    from loraprune.pipeline import run

    settings, read, reads = scored_in_training(run_folder, metric="lora"), StepScores.read, []
    planned = make_plan(settings)
    monkeypatch.setattr(StepScores, "read", lambda scores: reads.append(scores) or read(scores))
    run(replace(settings, output=str(tmp_path / "out")))
    assert planned["scored"] == {"rows": {"retain": 8}, "run_from": "training", "run_steps": len(reads)}
    [said, _] = scored_lines(planned["scored"])
    assert said.startswith(f"the run scores from training's own gradients, at {len(reads)} of its steps; ")
    assert "by passes over 8 retain rows now" in said
    for part in ("memory", "time"):
        stages = [one["stage"] for one in planned[part]["stages"]]
        assert stages == ["evaluate before", "train", "export", "evaluate after"]


def test_where_passes_score_as_in_the_plan_nothing_is_said(values):
    assert (values["scored"]["run_from"], values["scored"]["run_steps"]) == ("passes", 0)
    assert scored_lines(values["scored"]) == []


@pytest.mark.parametrize(
    ("forget_loss", "ratio", "radius"), [("npo", 1, 0), ("npo", 1, 3), ("none", 1, 3), ("npo", 0, 3)]
)
@pytest.mark.parametrize("most", [None, 1, 3, 64])
def test_a_step_has_the_passes_that_the_trainer_takes(run_folder, tmp_path, most, forget_loss, ratio, radius):
    how = {"forget_batch_size": 32, "retain_batch_size": 32, "relearning_radius": radius}  # more than there are rows
    how |= {"forget_loss": forget_loss, "forget_retain_ratio": ratio}
    settings = settings_of(run_folder, micro_batch_size=most, **how)
    trial = Trial(settings, prepare(settings), tmp_path)
    trial.trainer.current_gradient_accumulation_steps = 1  # else set where training begins
    taken_back = []
    trial.trainer.adapted.register_forward_hook(lambda *_: taken_back.append(torch.is_grad_enabled()))
    trial.trainer.training_step(trial.trainer.adapted, next(iter(trial.trainer.get_train_dataloader())))
    foretold = trial.passes.of_step(trial.passes.step_tokens[0], trial.passes.taken_back)
    if most in (None, 64) and not (radius and settings.pushes_down):  # all sets in one pass
        assert len(foretold) == 1 and sum(taken_back) == len(trial.passes.taken_back)
    else:
        assert len(foretold) == sum(taken_back)


def test_the_sample_is_scored_alike_in_batches_of_any_size(trial):
    examples = trial.sample["forget"]
    whole, single = (trial.passes.score("forget", examples, size) for size in (len(examples), 1))
    for kind, one in whole.values.items():
        torch.testing.assert_close(one, single.values[kind], rtol=1e-3, atol=1e-6)


def need(stage, **parts):
    return {"stage": stage, "weights": 0, "adapters": 0, "optimizer": 0, "activations": 0, **parts}


def test_on_a_cpu_a_stage_holds_what_an_earlier_one_needed():
    needs = [
        need("before", weights=100, activations=10),
        need("train", weights=100, adapters=5, optimizer=25, activations=200),
        need("after", weights=60, activations=10),
    ]
    on_cpu = stage_memory(needs, Held(process=1000, allocator=1.5))
    assert [one.resident for one in on_cpu] == [1000 + 100 + 15, 1000 + 100 + 330, 1000 + 60 + 330]
    on_gpu = stage_memory(needs, None)
    assert [one.resident for one in on_gpu] == [one.needed for one in on_gpu] == [110, 330, 70]


def test_memory_is_made_of_the_models_own_bytes(run_folder, values):
    stages = {one["stage"]: one for one in values["memory"]["stages"]}
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    inputs, outputs = (32, 32, 32, 32, 32, 32, 24), (32, 16, 16, 32, 24, 24, 32)  # of q, k, v, o, gate, up, down
    adapters = 2 * 4 * 2 * (sum(inputs) + sum(outputs))  # two layers, float32, rank 2
    assert stages["train"]["weights"] == sum(one.nbytes for one in model.parameters())
    assert stages["train"]["adapters"] == adapters
    assert stages["evaluate after"]["weights"] < stages["evaluate before"]["weights"]
    assert list(stages) == ["evaluate before", "train", "score", "export", "evaluate after"]
    assert values["memory"]["peak"] == max(one["resident"] for one in stages.values())
    for one in stages.values():
        parts = ("weights", "adapters", "optimizer", "activations")
        assert one["needed"] == sum(one[name] for name in parts) <= one["resident"]


def test_a_larger_reference_is_what_the_first_stage_holds(run_folder, tokenizer, tmp_path, values):
    config = FAMILY_CONFIGS["llama_gqa"]()
    config.intermediate_size = 480
    reference = make_model(config)
    save_checkpoint(reference, tokenizer, tmp_path / "reference")
    planned = make_plan(settings_of(run_folder, reference=str(tmp_path / "reference")))
    first, train = planned["memory"]["stages"][:2]
    assert first["weights"] == sum(one.nbytes for one in reference.parameters())
    assert train["weights"] == values["memory"]["stages"][1]["weights"]


def test_time_is_so_much_a_pass_and_so_much_a_token():
    assert Cost(each=2.0, token=0.5).seconds([10, 20]) == 2 * 2.0 + 30 * 0.5


def test_tokens_of_passes_count_their_padding(trial):
    examples = sorted(trial.inputs.examples["taught"], key=lambda one: len(one.input_ids))
    lengths = [len(one.input_ids) for one in examples]
    assert passes_over(examples, 3)[0] == 3 * lengths[2]
    assert passes_over(examples, 1) == lengths


def test_compression_is_planned_as_well(capsys, run_folder):
    settings = settings_of(run_folder)
    common = {"model": settings.model, "device": "cpu", "template": settings.template, "prune_rounds": 2}
    data = Settings(**common, data=settings.retain, sparsity=0.2, min_retain_performance=0.0)
    assert cli.main([*command_line("plan", data), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["task"], planned["shares"], planned["overlap"]) == ("prune", None, None)
    assert 0.1 < planned["checkpoint"]["goal"]["sparsity"] <= 0.2


def test_a_pipe_of_80_columns_gets_every_heading_whole(capsys, run_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(command_line("plan", settings_of(run_folder))) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    order = ["prunable", "candidates", "overlap", "checkpoint", "memory on cpu", "evaluate after", "total", "assumed"]
    places = [printed.index(word) for word in order]
    assert places == sorted(places)
