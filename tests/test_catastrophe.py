"""Every way a run can go wrong ends with a model that holds the floor, and with a report that says what happened."""

import io
import json
import random

import pytest
import torch
from conftest import ROWS_PER_PERSON, run_values, world_values, write_rows
from rich.console import Console
from safetensors.torch import load_file

from loraprune import cli, pipeline
from loraprune.data import PLAIN_TEMPLATE
from loraprune.pipeline import _say_next, run
from loraprune.settings import Settings

FLOOR = 0.9


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_floor_held(report, floor=FLOOR):
    """The written model holds the floor, and so did every accepted step."""
    metrics = report.metrics
    assert metrics["floor"]["held"] and metrics["floor"]["retention"] >= floor
    assert all(one["retention"] >= floor for one in events(report.folder) if one["event"] == "accept")
    weights = load_file(report.folder / "model" / "model.safetensors")
    assert all(one.isfinite().all() for one in weights.values())


def assert_missed_at_the_floor(report):
    assert_floor_held(report)
    metrics = report.metrics
    assert (metrics["outcome"], metrics["goal_met"]) == ("floor_reached", False)
    assert metrics["forget"]["after"]["performance"] > metrics["target"]["high"]
    assert metrics["breaks"]["floor"] > 0


OPENINGS = ("Now", "Well", "Please", "Then", "So", "Say", "Here", "Again", "Friend", "Today", "Look", "Listen")


def said_twice(row, draw):
    """The same question and answer behind two different words; nothing but chance says which set has which word."""
    one, other = draw.sample(OPENINGS, 2)
    return tuple({**row, "question": f"{word}: {row['question']}"} for word in (one, other))


@pytest.mark.parametrize(
    ("settings", "end", "said"),
    [
        ({}, {}, True),
        ({"relearning_radius": 0.0}, {}, False),
        ({"forget_loss": "none"}, {}, False),
        ({}, {"breaks": {"guard": 2}}, False),
        ({}, {"outcome": "budget_spent"}, False),
        ({}, {"forget": {"after": {"performance": 0.2}}}, False),
    ],
)
def test_only_a_run_that_looked_ahead_and_was_short_of_room_is_told_not_to(settings, end, said):
    metrics = {
        "sparsity": 0.1,
        "outcome": "floor_reached",
        "breaks": {"floor": 1},
        "target": {"low": 0.1, "high": 0.3},
        "forget": {"after": {"performance": 0.5}},
    }
    console = Console(file=io.StringIO())
    _say_next(Settings(forget="forget.jsonl", **settings), {**metrics, **end}, console)
    assert ("--relearning-radius 0" in console.file.getvalue()) == said


def test_forget_and_retain_say_the_same_in_other_words(small_world, tmp_path, capsys):
    rows = [json.loads(line) for line in (small_world / "retain.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    forget, retain = zip(*(said_twice(row, draw) for row in rows), strict=True)
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", one) for name, one in (("forget", forget), ("retain", retain))
    }
    values = world_values(small_world, tmp_path / "out", **files, reference=None)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if name != "model"]
    assert cli.main(["unlearn", values["model"], *flags]) == 3
    said = capsys.readouterr().out
    assert "floor_reached" in said and "--relearning-radius 0 leaves it to forgetting" in " ".join(said.split())
    assert_missed_at_the_floor(run(Settings(**values)))
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "floor_reached" in card


def test_gradient_ascent_without_an_end(small_world, tmp_path):
    endless = {"forget_loss": "ga", "forget_retain_ratio": 10.0, "reference": None, "forget_target": 0.0}
    report = run(Settings(**world_values(small_world, tmp_path / "out", **endless)))
    assert_missed_at_the_floor(report)
    assert any(one["event"] == "roll_back" for one in events(report.folder))


def test_a_learning_rate_a_hundred_times_too_high(small_world, tmp_path):
    report = run(Settings(**world_values(small_world, tmp_path / "out", learning_rate=0.1)))
    assert_missed_at_the_floor(report)


def test_a_threshold_that_selects_everything(small_world, tmp_path):
    report = run(Settings(**world_values(small_world, tmp_path / "out", unlearning_threshold=0.0, sparsity=0.5)))
    assert_floor_held(report)
    assert not report.goal_met
    kept = json.loads((tmp_path / "out" / "decision.json").read_text())["kept_by_layer"]
    assert all(min(one) >= 1 for one in kept.values())


def poison(monkeypatch, first, last):
    """Make the training passes from the first to the last of these give NaN, as one bad batch does."""
    passes, attach = [], pipeline.attach_lora

    def attached(model, settings):
        adapted = attach(model, settings)

        def spoil(module, arguments, output):
            if module.training and torch.is_grad_enabled():
                passes.append(1)
                return output * float("nan") if first <= len(passes) <= last else output
            return output

        adapted.get_base_model().model.embed_tokens.register_forward_hook(spoil)
        return adapted

    monkeypatch.setattr(pipeline, "attach_lora", attached)


def test_a_nan_in_one_batch_costs_that_step_and_nothing_else(small_world, tmp_path, monkeypatch):
    poison(monkeypatch, 31, 31)
    report = run(Settings(**world_values(small_world, tmp_path / "out", finish_steps=80)))
    assert report.metrics["steps_left_out"] == 1
    assert [one["reason"] for one in events(report.folder) if one["event"] == "skip"] == ["the gradient was not finite"]
    assert_floor_held(report)
    assert report.metrics["forget_drop"] > 0.2  # the run went on as if nothing had been: without the batch 0.31


def test_nothing_but_nan_leaves_the_model_as_it_was(run_folder, monkeypatch):
    poison(monkeypatch, 1, 10**9)
    report = run(Settings(**run_values(run_folder, "all_nan", sparsity=None, lora_dropout=0.0)))
    assert report.metrics["steps_left_out"] == 14 + 2 * report.metrics["breaks"].get("floor", 0)
    assert_floor_held(report, floor=1.0)
    assert not report.goal_met


def test_every_candidate_in_one_layer(small_world, tmp_path, monkeypatch):
    """Scores are made so that nothing but layer 0 serves the forget set; its width may not fall alone."""
    from loraprune import trainer
    from loraprune.records import Sensitivity

    score = trainer.score_model

    def one_layer(model, live, batches, dataset_type, **others):
        values = {kind: one.clone() for kind, one in score(model, live, batches, dataset_type, **others).values.items()}
        for one in values.values():
            one[1:] = 0.0 if dataset_type == "forget" else one.max()
        return Sensitivity(values)

    monkeypatch.setattr(trainer, "score_model", one_layer)
    report = run(Settings(**world_values(small_world, tmp_path / "out", sparsity=0.4)))
    assert_floor_held(report)
    kept = json.loads((tmp_path / "out" / "decision.json").read_text())["kept_by_layer"]
    assert all(len(set(one)) == 1 and min(one) >= 1 for one in kept.values())


def test_a_retain_set_of_three_rows(small_world, tmp_path):
    rows = [json.loads(line) for line in (small_world / "retain.jsonl").read_text().splitlines()]
    retain = write_rows(tmp_path / "retain.jsonl", rows[::ROWS_PER_PERSON][:3])
    report = run(Settings(**world_values(small_world, tmp_path / "out", retain=retain)))
    assert_floor_held(report)
    floor = report.metrics["floor"]
    assert (floor["rows"], floor["facts"], floor["interval"]) == (1, 1, None)


@pytest.mark.parametrize("kind", ["guard", "ceiling"])
def test_another_limit_that_cannot_be_kept_ends_the_run_at_it(small_world, tmp_path, kind):
    rows = [json.loads(line) for line in (small_world / "forget.jsonl").read_text().splitlines()]
    if kind == "guard":  # the other text is what is to be forgotten
        texts = [{"text": PLAIN_TEMPLATE.format(prompt=row["question"]) + row["answer"]} for row in rows]
        own = {"guard": write_rows(tmp_path / "guard.jsonl", texts), "max_guard_loss_ratio": 1.05}
    else:  # the retain set says what is to stay forgotten, in other words
        retain = [json.loads(line) for line in (small_world / "retain.jsonl").read_text().splitlines()]
        own = {
            "forget": write_rows(tmp_path / "forget.jsonl", rows[ROWS_PER_PERSON:]),
            "already_forgotten": (write_rows(tmp_path / "already.jsonl", rows[:ROWS_PER_PERSON:3]),),
            "retain": write_rows(tmp_path / "retain.jsonl", retain + rows[1:ROWS_PER_PERSON:3]),
        }
    report = run(Settings(**world_values(small_world, tmp_path / "out", min_retain_performance=0.5, **own)))
    metrics = report.metrics
    if kind == "guard":
        assert metrics["guard"]["held"] and metrics["guard"]["loss_ratio"] <= 1.05
        assert metrics["breaks"]["guard"] > 0
        assert metrics["outcome"] == "floor_reached"
    else:
        [earlier] = metrics["already_forgotten"]
        assert earlier["held"] and earlier["after"]["performance"] <= earlier["ceiling"]
