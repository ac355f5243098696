"""Attacks: they bring back what is only hidden, not what a model never knew, and a kill or a seed changes no number."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import tomli_w
import torch
from conftest import FAMILY_CONFIGS, make_model, save_checkpoint, world_values, write_rows

from loraprune import attack, cli
from loraprune.attack import ALL_UNITS, ROLES, UNITS, attack_run
from loraprune.attack_findings import findings_of
from loraprune.attacked import AttackedModel, AttackRows
from loraprune.batches import PairedBatches
from loraprune.data import load_rows
from loraprune.errors import UserError
from loraprune.evaluate import answer_values
from loraprune.metrics import mean_over_steps
from loraprune.model import attach_lora, load_model, load_tokenizer
from loraprune.objectives import answer_log_probabilities, forget_loss, logits_of, retain_loss, row_sums
from loraprune.settings import Settings, as_values

QUICK = {"attack_steps": 10, "attack_samples": 8, "attack_rows": 12}
COMMON = {"device": "cpu", "attack_learning_rate": 1e-3}


def suppress(world, path):
    """Write the untouched model after NPO on adapters alone: nothing is cut, the answers are hidden only."""
    settings = Settings(**world_values(world, path, lora_rank=4))
    tokenizer = load_tokenizer(settings.model, settings)
    attacked = {
        name: AttackedModel("original", settings.model, settings, tokenizer, AttackRows([], [], [], [])).examples(
            load_rows(getattr(settings, name), name=name)
        )
        for name in ("forget", "retain")
    }
    model = attach_lora(load_model(settings.model, settings), settings)
    sizes = {"batch_size": 64, "pad_token_id": 0}
    base = answer_values(model, attacked["forget"], **sizes).log_probability.float()
    batches = PairedBatches(
        attacked["retain"],
        attacked["forget"],
        retain_batch_size=32,
        forget_batch_size=32,
        pad_token_id=0,
        seed=0,
        steps=range(40),
    )
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    for step in range(len(batches)):
        forget, retain = batches[step]["forget"], batches[step]["retain"]
        values, counted = answer_log_probabilities(logits_of(model, forget), forget["labels"])
        rows, tokens = row_sums(values, counted), counted.sum(1)
        beta = 3.0  # soon flat: it hides, and takes away little
        hidden = forget_loss("npo", rows, tokens, base[forget["rows"]], beta)
        (hidden + retain_loss(logits_of(model, retain), retain["labels"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(model.merge_and_unload(), tokenizer, path)


def make_run(folder, world, model, **changes):
    """A run's folder as far as attacks read it: config.toml and the model that came out."""
    settings = Settings(**world_values(world, folder, **changes))
    folder.mkdir()
    (folder / "config.toml").write_text(tomli_w.dumps(as_values(settings)), encoding="utf-8")
    shutil.copytree(model, folder / "model")
    return folder


@pytest.fixture(scope="module")
def suppressed(small_world, tmp_path_factory):
    path = tmp_path_factory.mktemp("suppressed") / "model"
    suppress(small_world, path)
    return path


@pytest.fixture(scope="module")
def report(small_world, suppressed, tmp_path_factory):
    """All attacks on the model whose answers are hidden only, once."""
    folder = make_run(tmp_path_factory.mktemp("attacks") / "run", small_world, suppressed)
    return attack_run(folder, {**QUICK, **COMMON, "attack_steps": 20})


@pytest.fixture
def tiny_run(run_folder, tmp_path):
    """The run of an untrained model: quick to attack, nothing to bring back. Its original is another one."""
    rows = [json.loads(line) for line in (run_folder / "forget.jsonl").read_text().splitlines()]
    rows[0] |= {"paraphrased_question": "Where lives Prys0?", "perturbed_answer": ["In Almery.", "In Kelst."]}
    values = {
        "model": str(run_folder / "checkpoint"),
        "output": str(tmp_path / "run"),
        "forget": write_rows(tmp_path / "forget.jsonl", rows),
        "retain": str(run_folder / "retain.jsonl"),
        "template": "{prompt} ",
        "device": "cpu",
        "lora_rank": 2,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    model = make_model(FAMILY_CONFIGS["llama_gqa"](), seed=3)
    save_checkpoint(model, load_tokenizer(values["model"], Settings()), tmp_path / "run" / "model")
    return tmp_path / "run"


TINY = {"attack_steps": 2, "attack_samples": 3, "attack_rows": 2}


def finding(report, unit, measure="performance"):
    return next(one for one in report["findings"] if (one["attack"], one["measure"]) == (unit, measure))


# --- what is only hidden comes back ---


@pytest.mark.parametrize("unit", ["relearn_full", "relearn_lora", "retrain_full", "retrain_lora"])
def test_training_brings_back_what_is_only_hidden_and_not_what_the_reference_never_knew(report, unit):
    found = finding(report, unit)
    assert found["brought_back"]["unlearned"] > 0.15
    assert found["brought_back"]["reference"] < 0.1
    assert found["excess_interval"][0] > 0
    ahead = found["ahead_interval"][0] > 0
    assert ("some of it was hidden, not gone" in found["conclusion"]) == ahead
    assert ahead or unit == "retrain_lora"  # which leaves it level with the reference: that may be learning


def test_the_area_between_the_curves_is_the_headline_of_relearning(report):
    readings = {role: one["readings"]["performance"] for role, one in report["results"]["relearn_full"].items()}
    between = readings["unlearned"]["area"] - readings["reference"]["area"]
    assert finding(report, "relearn_full")["gap"] == pytest.approx(between, abs=1e-5)
    curve = report["results"]["relearn_full"]["unlearned"]["details"]["curve"]
    assert [one["step"] for one in curve] == [0, 1, 2, 5, 10, 20]
    heights = [[one["performance"]] for one in curve]
    area = mean_over_steps([one["step"] for one in curve], heights)[0]
    assert readings["unlearned"]["area"] == pytest.approx(area)
    assert readings["unlearned"]["after"] == max(one["performance"] for one in curve)


def test_every_attack_ran_on_every_model(report):
    assert list(report["results"]) == list(ALL_UNITS)
    for of_roles in report["results"].values():
        assert list(of_roles) == list(ROLES)
        assert all(one["device"] == "cpu" for one in of_roles.values())


def test_the_training_took_on_all_three_models(report):
    for unit in ("relearn_full", "retrain_full"):
        for role in ROLES:
            assert report["results"][unit][role]["details"]["trained_performance"] > 0.8


def test_the_original_is_high_and_the_reference_low_in_the_lens(report):
    levels = {role: one["readings"]["performance"]["after"] for role, one in report["results"]["look_inside"].items()}
    assert levels["original"] > 0.9
    assert levels["reference"] < 0.4


def test_a_choice_between_answers_tells_who_knows_them(report):
    right = {role: one["readings"]["multiple_choice"] for role, one in report["results"]["rephrase"].items()}
    assert right["original"]["after"] > 0.8
    assert right["reference"]["after"] < 0.5
    assert right["original"]["before"] == pytest.approx(0.25)


def test_the_worst_wording_is_never_better_than_the_plain_question(report):
    for one in report["results"]["rephrase"].values():
        row_values = one["readings"]["performance"]["row_values"]
        assert np.all(np.array(row_values["after"]) >= np.array(row_values["before"]) - 1e-6)
        forms = one["details"]["forms"]
        assert set(forms) == {"question", "paraphrase", "plain_text", "statement", "jailbreak"}


def test_more_samples_find_more(report):
    for one in report["results"]["sample"].values():
        for drawn in one["details"]["best_of"].values():
            values = [point["value"] for point in drawn]
            assert [point["drawn"] for point in drawn] == [1, 8]
            assert values == sorted(values)
    assert report["results"]["sample"]["original"]["readings"]["contains"]["after"] > 0.9


def test_a_quantised_model_really_is_quantised(report):
    for unit, share in (("quantise_int8", 0.45), ("quantise_nf4", 0.35)):
        for one in report["results"][unit].values():
            details = one["details"]
            assert details["quantised_modules"] == 2 * 7
            assert details["bytes"]["quantised"] < share * details["bytes"]["plain"]


def test_no_text_of_the_forget_set_stands_in_the_file(report, small_world):
    written = json.dumps(report)
    for row in load_rows(str(small_world / "forget.jsonl"), name="forget"):
        assert row.prompt not in written
        assert row.answer not in written
        assert not any(fact in written for fact in row.facts)


def test_a_hidden_model_is_not_judged_without_a_reference(report):
    results = {
        unit: {role: one for role, one in of.items() if role != "reference"} for unit, of in report["results"].items()
    }
    found = {one["attack"]: one for one in findings_of(results, ["unlearned", "original"])}
    assert "cannot tell relearning from learning" in found["relearn_lora"]["conclusion"]
    assert "gap" not in found["relearn_lora"]


def test_nothing_gone_is_not_called_brought_back(report):
    of_roles = dict(report["results"]["relearn_full"])
    of_roles["unlearned"] = of_roles["original"]
    [found, *_] = findings_of({"relearn_full": of_roles}, list(ROLES))
    assert found["brought_back"]["unlearned"] is None
    assert found["conclusion"].startswith("hardly anything was gone")


# --- what cannot be had ---


def test_an_attack_that_cannot_be_had_says_why_and_is_tried_again(tiny_run, monkeypatch):
    monkeypatch.setattr("loraprune.attack_weights.find_spec", lambda name: None)
    found = attack_run(tiny_run, {**TINY, "attacks": ("quantise",)})
    assert found["findings"][0]["conclusion"].startswith("not run: bitsandbytes is not installed: pip install")
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    again = attack_run(tiny_run, {**TINY, "attacks": ("quantise",)})
    assert "readings" in again["results"]["quantise_int8"]["unlearned"]


def test_a_set_of_plain_texts_is_not_asked_questions(tiny_run, tmp_path):
    text = write_rows(tmp_path / "texts.jsonl", [{"text": f"Prys{i} lives in a far away town."} for i in range(3)])
    found = attack_run(tiny_run, {**TINY, "forget": text, "attacks": ("sample", "rephrase", "look_inside")})
    told = {one["attack"]: one["conclusion"] for one in found["findings"]}
    assert told["sample"].startswith("not run: no row of the forget set has a question")
    assert told["rephrase"].startswith("not run: no row of the forget set has a question")
    assert not told["look_inside"].startswith("not run")


# --- a run of attacks ---


def test_the_same_seed_gives_the_same_file_and_another_one_another(tiny_run, tmp_path):
    files = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        folder = shutil.copytree(tiny_run, tmp_path / name)
        attack_run(folder, {**TINY, "seed": seed, "attacks": ("relearn", "sample", "rephrase")})
        files.append((folder / "attacks.json").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_killed_call_is_taken_up_where_it_was_and_ends_with_the_same_file(tiny_run, tmp_path, monkeypatch):
    whole, given = shutil.copytree(tiny_run, tmp_path / "whole"), {**TINY, "attacks": ("relearn", "prune_again")}
    attack_run(whole, given)
    ran, one = [], attack._attack_one

    def dies(unit, model):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((unit, model.role))
        return one(unit, model)

    monkeypatch.setattr(attack, "_attack_one", dies)
    with pytest.raises(KeyboardInterrupt):
        attack_run(tiny_run, given)
    done = list(ran)
    written = json.loads((tiny_run / "attacks.json").read_text())["results"]
    assert [(unit, role) for unit, of in written.items() for role in of] == done
    monkeypatch.setattr(attack, "_attack_one", lambda unit, model: ran.append((unit, model.role)) or one(unit, model))
    attack_run(tiny_run, given)
    assert ran == list(product(["relearn_full", "relearn_lora", "prune_again"], ["unlearned", "original"]))
    assert (tiny_run / "attacks.json").read_bytes() == (whole / "attacks.json").read_bytes()
    assert not list(tiny_run.glob("*.lock"))


def test_attacks_in_another_order_end_with_the_same_file(tiny_run, tmp_path):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    attack_run(tiny_run, {**TINY, "attacks": ("prune_again", "look_inside")})
    for name in ("look_inside", "prune_again"):
        attack_run(other, {**TINY, "attacks": (name,)})
    assert (tiny_run / "attacks.json").read_bytes() == (other / "attacks.json").read_bytes()


def test_a_reference_may_be_given_later(tiny_run, run_folder):
    values = {**TINY, "attacks": ("prune_again",)}
    assert "gap" not in attack_run(tiny_run, values)["findings"][0]
    found = attack_run(tiny_run, {**values, "reference": str(run_folder / "checkpoint")})
    assert "gap" in found["findings"][0]
    assert list(found["results"]["prune_again"]) == list(ROLES)


def test_results_under_other_settings_are_not_mixed(tiny_run):
    attack_run(tiny_run, {**TINY, "attacks": ("prune_again",)})
    with pytest.raises(UserError) as caught:
        attack_run(tiny_run, {**TINY, "attacks": ("prune_again",), "attack_sparsity": 0.5})
    assert "attack_sparsity was 0.3, now 0.5" in caught.value.what
    assert "move attacks.json away" in caught.value.fix


def test_what_has_moved_is_named_and_a_flag_overrides_it(tiny_run, run_folder, tmp_path):
    config = tiny_run / "config.toml"
    text = config.read_text()
    config.write_text(text.replace(str(run_folder / "checkpoint"), str(tmp_path / "gone")))
    with pytest.raises(UserError) as caught:
        attack_run(tiny_run, TINY)
    assert caught.value.what.startswith("the original model of the run cannot be had: there is no model")
    assert caught.value.fix == "give --model the place where it is now."
    given = {**TINY, "attacks": ("look_inside",), "model": str(run_folder / "checkpoint")}
    assert attack_run(tiny_run, given)["findings"]
    config.write_text(text.replace(str(tmp_path / "forget.jsonl"), str(tmp_path / "gone.jsonl")))
    with pytest.raises(UserError, match=r"the forget set's file .*gone\.jsonl does not exist"):
        attack_run(tiny_run, TINY)


@pytest.mark.parametrize(("name", "what"), [("forget", "forget is not what"), ("model", "model is not what")])
def test_other_rows_or_another_original_than_the_runs_are_refused(tiny_run, run_folder, name, what):
    from loraprune.data import data_hash
    from loraprune.inputs import split_kept
    from loraprune.model import weights_hash

    rows = {one: load_rows(str(run_folder / f"{one}.jsonl"), name=one) for one in ("forget", "retain")}
    data = {"forget": data_hash(rows["forget"]), "taught": data_hash(split_kept(Settings(), rows["retain"])["taught"])}
    hashes = {"data_sha256": data, "weights_sha256": weights_hash(str(run_folder / "checkpoint"))}
    (tiny_run / "inputs.json").write_text(json.dumps(hashes))
    attack_run(tiny_run, {**TINY, "attacks": ("look_inside",)})  # a paraphrase that was added makes it no other set
    other = {"forget": str(run_folder / "retain.jsonl"), "model": str(tiny_run / "model")}[name]
    with pytest.raises(UserError, match=what):
        attack_run(tiny_run, {**TINY, name: other})


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda run: (run / "config.toml").unlink(), "is no run: it holds no config.toml"),
        (lambda run: shutil.rmtree(run / "model"), "is not finished: it holds no model"),
        (lambda run: (run / "config.toml").write_text('model = "m"\ndata = "d.txt"\n'), "forgot nothing"),
    ],
)
def test_a_folder_that_cannot_be_attacked_is_refused(tiny_run, spoil, what):
    spoil(tiny_run)
    with pytest.raises(UserError, match=what):
        attack_run(tiny_run, TINY)


def test_a_misspelt_attack_is_refused_with_the_nearest_one(tiny_run):
    with pytest.raises(UserError) as caught:
        attack_run(tiny_run, {"attacks": ("quantize",)})
    assert caught.value.fix == "did you mean quantise?"
    assert set(Settings().attacks) == set(UNITS)


def test_two_attacks_on_one_folder_are_refused(tiny_run, monkeypatch):
    monkeypatch.setattr(attack, "PATIENCE", 0.05)
    with attack._alone(tiny_run), pytest.raises(UserError, match="under attack by another process"):
        attack_run(tiny_run, TINY)


# --- the command ---


def test_the_command_prints_a_table_whose_words_stand_beside_or_below(tiny_run, capsys, monkeypatch):
    command = ["attack", str(tiny_run), "--attacks", "prune_again,look_inside"]
    for columns in ("160", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(command) == cli.GOAL_MET
        printed = " ".join(capsys.readouterr().out.split())
        assert "prune again" in printed
        assert "hardly anything was gone" in printed or "brought back" in printed
        assert "Nothing here is a guarantee" in printed


def test_the_command_prints_json_alone(tiny_run, capsys):
    assert cli.main(["attack", str(tiny_run), "--attacks", "look_inside", "--json"]) == cli.GOAL_MET
    assert json.loads(capsys.readouterr().out) == json.loads((tiny_run / "attacks.json").read_text())


def test_the_command_takes_settings_of_attacks_and_no_others(tmp_path):
    with pytest.raises(UserError, match="takes no --sparsity"):
        cli.settings_of(["attack", str(tmp_path), "--sparsity", "0.5"])
    with pytest.raises(UserError, match="takes no --attack-steps"):
        cli.settings_of(["unlearn", "m", "--attack-steps", "3"])
