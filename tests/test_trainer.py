"""A run decides the same every time, stopped or not; it says what it did and never what it was to forget."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_CONFIGS, SECRETS, adapted, make_model, make_rows, run_values
from safetensors.torch import load_file

from loraprune import pipeline
from loraprune.balance import TrainingSets
from loraprune.data import Row, encode
from loraprune.errors import UserError
from loraprune.folder import RunFolder
from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask
from loraprune.objectives import answer_log_probabilities, forget_loss, retain_loss, row_sums
from loraprune.pipeline import run
from loraprune.pruning import unlearning_prune
from loraprune.records import Decision, Look
from loraprune.schedule import cubic
from loraprune.settings import Settings
from loraprune.steering import Ceiling, Limits, Probe, Probes, Steering, Target
from loraprune.trainer import LoRAPruneTrainer


@pytest.fixture(scope="module")
def finished(run_folder):
    """A run from beginning to end without a stop: its folder and its report."""
    report = run(Settings(**run_values(run_folder, "uninterrupted")))
    return run_folder / "uninterrupted", report


def decision(folder):
    return (folder / "decision.json").read_bytes()


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def same_outcome(folder, other):
    """Whether both runs made the same decision, byte for byte, and the same adapter and checkpoint, bit for bit."""
    files = ("adapter/adapter_model.safetensors", "model/model.safetensors")
    weights = [[load_file(one / file) for file in files] for one in (folder, other)]
    for one, two in zip(*weights, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    return decision(folder) == decision(other)


# --- invariant 5 ---


def test_the_same_seed_gives_the_same_decision_byte_for_byte(finished, run_folder):
    run(Settings(**run_values(run_folder, "again")))
    assert same_outcome(run_folder / "again", finished[0])


def test_another_seed_gives_another_decision(finished, run_folder):
    run(Settings(**run_values(run_folder, "other_seed", seed=1)))
    assert decision(run_folder / "other_seed") != decision(finished[0])


class Stop:
    """Stands for a person's Ctrl-C at the n-th event, before or after its line is written."""

    def __init__(self, monkeypatch, moment, after):
        self.left, self.after, self.event = moment, after, RunFolder.event
        monkeypatch.setattr(RunFolder, "event", lambda folder, kind, **values: self(folder, kind, values))

    def __call__(self, folder, kind, values):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        self.event(folder, kind, **values)
        if self.left == 0:
            raise KeyboardInterrupt


SCENARIOS = {
    "unlearning": {},
    "early target": {
        "sparsity": None,
        "forget_target": 1.0,
        "band": 0.1,
    },  # P(forget) is there already: recovery begins at once
    "another floor": {"min_retain_performance": 0.9, "seed": 2},
    "adapters": {"sparsity": 0.3, "metric": "lora", "score_power": 2, "recovery_steps": 0},
    "cuts ended early": {"sparsity": 0.3, "recovery_steps": 0, "seed": 3},  # by the floor, P(forget) above its band
}
MOMENTS = random.Random(5)
BETA = Settings().forget_loss_beta
STOPS = [("unlearning", round((part + MOMENTS.random()) / 7, 3)) for part in range(7)] + [("unlearning", 1.0)]
STOPS += [(name, round((part + MOMENTS.random()) / 2, 3)) for name in list(SCENARIOS)[1:] for part in range(2)]
STOPS += [("cuts ended early", 0.86)]  # where no more is cut, and steps are left


@pytest.fixture(scope="module")
def without_a_stop(finished, run_folder):
    """Gives the folder of a scenario's run that nobody stopped."""
    made = {"unlearning": finished[0]}

    def folder(scenario):
        if scenario not in made:
            made[scenario] = run_folder / scenario
            run(Settings(**run_values(run_folder, scenario, **SCENARIOS[scenario])))
        return made[scenario]

    return folder


def test_after_a_step_was_halved_no_later_one_tries_more_than_was_accepted(run_folder, monkeypatch):
    def fragile(*arguments, look, step, looked, **others):
        """Prune a model that at step 6 cannot do without another hundredth of its parameters."""

        def seen():
            found = look()
            return replace(found, retention=0.1) if step == 6 and found.sparsity > looked.sparsity + 0.01 else found

        return unlearning_prune(*arguments, look=seen, step=step, looked=looked, **others)

    monkeypatch.setattr("loraprune.trainer.unlearning_prune", fragile)
    calm = {"prune_rounds": 6, "sparsity": 0.3, "min_retain_performance": 0.3, "band": 0.5, "relearning_radius": 0.0}
    rows = events(run(Settings(**run_values(run_folder, "halved", **calm))).folder)
    assert {row["step"] for row in rows if row["event"] == "roll_back"} == {6}
    tried = {row["step"]: row["removed"] for row in rows if row["event"] == "propose"}  # the last try of each step
    later = [removed for step, removed in tried.items() if step > 6]
    assert later and 0 < max(later) <= tried[6]
    accepted = next(row["sparsity"] for row in rows if row["event"] == "accept" and row["step"] == 6)
    planned = 0.3 * cubic(3, 6) - accepted  # after step 8
    assert planned > 2 * later[0] * 96 / 27488  # a channel has 96 parameters: the schedule alone would try more


def test_a_model_that_forgetting_brought_below_the_floor_is_left_to_mend(run_folder, monkeypatch):
    pushed, training_step = [], LoRAPruneTrainer.training_step

    def told(trainer, *arguments, **others):
        pushed.extend([] if trainer.repairing else [trainer.run_state.forgetting])
        return training_step(trainer, *arguments, **others)

    monkeypatch.setattr(LoRAPruneTrainer, "training_step", told)
    report = run(Settings(**run_values(run_folder, "waits", prune_rounds=8)))
    rows = events(report.folder)
    looks = {row["step"]: row["retention"] for row in rows if row["event"] == "score"}
    moves = {
        step: [row["event"] for row in rows if row.get("step") == step and row["event"] != "train"] for step in looks
    }
    assert all(looks[step] < 1.0 for step in (4, 6, 8, 10, 12))
    assert moves[4][:2] == ["score", "propose"]  # from the first look on: it begins anew
    waits = {row["step"]: row["forgetting"] for row in rows if row["event"] == "wait"}
    assert waits == {6: True, 8: True, 10: False}  # of 18 steps before recovery
    assert all(moves[step] == ["score", "wait"] for step in waits)
    assert moves[12][:2] == ["score", "propose"]  # below the floor still: no more waiting
    assert pushed[:14] == [True] * 10 + [False] * 2 + [True] * 2
    assert json.loads(decision(report.folder))["breaks"]["floor"] >= 3


@pytest.mark.parametrize("mends", [True, False])
def test_a_first_look_past_half_way_waits_and_begins_anew_only_where_nothing_mends(run_folder, monkeypatch, mends):
    weights, look, follow = [], LoRAPruneTrainer._look, LoRAPruneTrainer._follow

    def seen(trainer):
        """A model that forgets at once, is below its floor at steps 8 and 10, and then mends or does not."""
        step, found = trainer.run_state.step, look(trainer)
        if step == 0:
            return found
        kept = 0.8 if step < 12 or not mends else 1.1
        return replace(found, retention=kept, forget=0.3 * trainer.steering.forget_before)

    def told(trainer, *arguments):
        follow(trainer, *arguments)
        weights.append(trainer.run_state.forget_weight)

    monkeypatch.setattr(LoRAPruneTrainer, "_look", seen)
    monkeypatch.setattr(LoRAPruneTrainer, "_follow", told)
    far = {"warmup_steps": 6, "prune_rounds": 8, "relearning_radius": 0.0}
    rows = events(run(Settings(**run_values(run_folder, f"far-{mends}", **far))).folder)
    assert [row["step"] for row in rows_of(rows, "wait")] == [8, 10]  # 22 steps before recovery
    moves = [row for row in rows if row.get("step") == 12 and row["event"] in ("accept", "roll_back")]
    if mends:
        assert (moves[0]["event"], weights[0]) == ("accept", 1.0)
    else:  # back at the untouched model
        assert (moves[0]["event"], moves[0]["retention"], moves[0]["sparsity"]) == ("roll_back", 1.0, 0.0)
        assert weights[0] == 0.5


def rows_of(rows, kind):
    return [row for row in rows if row["event"] == kind]


def test_every_cut_is_told_how_the_model_came_in_and_above_what_forgetting_needs_room(run_folder, monkeypatch):
    told = []

    def prune(*arguments, **others):
        told.append(others)
        return unlearning_prune(*arguments, **others)

    monkeypatch.setattr("loraprune.trainer.unlearning_prune", prune)
    rows = events(run(Settings(**run_values(run_folder, "told", min_retain_performance=0.5))).folder)
    looks = [row for row in rows if row["event"] == "score"]
    assert told and len(told) == len(looks)
    for one, row in zip(told, looks, strict=True):
        assert (one["looked"].retention, one["looked"].forget) == (row["retention"], row["forget"])
        assert one["limits"].forget_high == pytest.approx(1e-6)


def test_a_run_from_before_there_were_such_defaults_is_not_gone_on_with_by_them(run_folder):
    values = run_values(run_folder, "older")
    folder = run(Settings(**values)).folder
    config = folder / "config.toml"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(("order", "relearning_radius"))]
    config.write_text("\n".join(kept))
    with pytest.raises(UserError, match="order was share, now difference") as refused:
        run(Settings(**values))
    assert "relearning_radius was 0, now 2" in str(refused.value)


def test_the_tiny_runs_meet_what_a_stop_could_spoil(without_a_stop):
    folders = [without_a_stop(name) for name in SCENARIOS]
    kinds = [one["event"] for folder in folders for one in events(folder)]
    assert {"accept", "recover", "roll_back", "wait", "evaluate", "train"} <= set(kinds)
    assert len({one["step"] for one in events(folders[0]) if one["event"] == "accept"}) > 1
    assert json.loads(decision(folders[0]))["removals"]["index"]
    early = events(without_a_stop("cuts ended early"))
    assert max(one["step"] for one in early if one["event"] == "score") == 4  # of 4, 6, 8 and 10
    assert [one["step"] for one in early if one["event"] == "evaluate"] == [0, 6, 8, 10, 12, 14]  # no step is left out
    assert next(one for one in early if one["event"] == "stop")["ended_by"] == "floor"


@pytest.mark.parametrize(("scenario", "moment"), STOPS)
def test_a_run_stopped_at_any_event_and_resumed_decides_as_one_without_a_stop(
    without_a_stop, run_folder, monkeypatch, scenario, moment
):
    expected = without_a_stop(scenario)
    number = max(1, round(moment * len(events(expected))))
    output = f"{scenario} stopped at {moment}"
    settings = Settings(**run_values(run_folder, output, **SCENARIOS[scenario]))
    with monkeypatch.context() as patch:
        Stop(patch, number, after=number % 2 == 0)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert not (run_folder / output / "metrics.json").exists()
    run(settings)
    assert same_outcome(run_folder / output, expected)


def test_a_run_stopped_between_its_metrics_and_its_report_gets_the_report(finished, run_folder, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    settings = Settings(**run_values(run_folder, "no_report"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    run(settings)
    assert (run_folder / "no_report" / "report.html").exists()
    assert not (run_folder / "no_report" / "state").exists()


def test_a_run_stopped_again_and_again_decides_as_one_without_a_stop(finished, run_folder, monkeypatch):
    settings, stops = Settings(**run_values(run_folder, "stopped_often")), 0
    for moment in (9, 7, 5, 8):
        with monkeypatch.context() as patch:
            Stop(patch, moment, after=False)
            with pytest.raises(KeyboardInterrupt):
                run(settings)
            stops += 1
    run(settings)
    assert stops == 4
    assert same_outcome(run_folder / "stopped_often", finished[0])
    steps = [one["step"] for one in events(run_folder / "stopped_often") if one["event"] in ("accept", "evaluate")]
    assert steps == [one["step"] for one in events(finished[0]) if one["event"] in ("accept", "evaluate")]


def test_a_state_that_was_lost_while_it_was_replaced_costs_time_and_changes_nothing(finished, run_folder, monkeypatch):
    settings = Settings(**run_values(run_folder, "lost_state"))
    with monkeypatch.context() as patch:
        Stop(patch, 16, after=True)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    state = run_folder / "lost_state" / "state"
    assert state.exists()
    state.replace(state.with_name("state.part"))  # as between the two moves of a folder that takes another's place
    run(settings)
    assert same_outcome(run_folder / "lost_state", finished[0])


# --- the run's folder ---


def test_a_finished_run_returns_its_report_at_once_and_writes_nothing(finished, run_folder):
    folder, report = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run(Settings(**run_values(run_folder, "uninterrupted")))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert dict(again.metrics) == json.loads(json.dumps(dict(report.metrics)))
    assert again.goal_met == report.goal_met


def test_changed_settings_are_refused_by_name_with_both_values(finished, run_folder):
    with pytest.raises(UserError) as caught:
        run(Settings(**run_values(run_folder, "uninterrupted", prune_rounds=5, seed=3)))
    assert "prune_rounds was 4, now 5" in caught.value.what
    assert "seed was 0, now 3" in caught.value.what
    assert caught.value.why == "going on would mix two runs, and the evidence would belong to neither."
    assert "--prune-rounds" in caught.value.fix


def test_a_folder_of_something_else_is_not_written_into(run_folder):
    folder = run_folder / "taken"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds metrics\.json, but no run that could go on"):
        run(Settings(**run_values(run_folder, "taken")))
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


def test_no_file_of_the_run_holds_what_was_to_be_forgotten(finished):
    files = [path for path in finished[0].rglob("*") if path.is_file()]
    assert len(files) > 12
    words = [*SECRETS, *(row["question"] for row in make_rows()["forget"])]
    for path in files:
        content = path.read_bytes()
        for word in words:
            assert word.encode() not in content, f"{path.name} holds {word}"


def test_there_is_no_pickle_and_nothing_half_written_in_the_runs_folder(finished):
    files = [path for path in finished[0].rglob("*") if path.is_file()]
    allowed = {".json", ".jsonl", ".safetensors", ".toml", ".html", ".md"}
    assert {path.suffix for path in files} <= allowed
    assert not (finished[0] / "state").exists()


def test_every_event_is_one_line_of_json_with_its_kind_and_time(finished):
    found = events(finished[0])
    assert {one["event"] for one in found} >= {"stage", "train", "score", "propose", "accept", "evaluate", "stop"}
    assert all(one["seconds"] >= 0 for one in found)
    accepted = [one for one in found if one["event"] == "accept"]
    gone = [one["sparsity"] for one in accepted]
    assert gone == sorted(gone)
    assert all(one["retention"] >= 1.0 for one in accepted)
    assert sum(accepted[-1]["groups"]["ffn_channel"]) < 48
    looks = [one for one in found if one["event"] in ("score", "propose", "accept", "roll_back", "recover", "evaluate")]
    assert {"score", "propose", "accept", "recover", "evaluate"} <= {one["event"] for one in looks}
    numbers = {"step", "seconds", "sparsity", "forget", "forget_interval", "retention", "groups"}
    assert all(numbers <= one.keys() for one in [*looks, found[-1]])
    assert found[-1]["event"] == "stop"


def test_the_last_event_holds_the_numbers_of_the_written_model(finished):
    last, metrics = events(finished[0])[-1], finished[1].metrics
    assert last["forget"] == metrics["forget"]["after"]["performance"]
    assert last["forget_interval"] == list(metrics["forget"]["after"]["performance_interval"])
    assert last["retention"] == metrics["floor"]["retention"]
    assert last["outcome"] == metrics["outcome"]


def test_the_decision_names_every_removed_group_once_and_agrees_with_the_mask_and_the_checkpoint(finished):
    folder, report = finished
    value = json.loads(decision(folder))
    places = list(zip(*(value["removals"][name] for name in ("kind", "layer", "index")), strict=True))
    mask = load_file(folder / "mask.safetensors")
    assert len(set(places)) == len(places) == sum(int((~one).sum()) for one in mask.values())
    assert all(not mask[kind][layer, index] for kind, layer, index in places)
    assert value["sparsity"] == pytest.approx(report.metrics["sparsity"], abs=1e-12)
    assert "seconds" not in value


def test_metrics_have_the_keys_of_schema_1(finished):
    metrics = finished[1].metrics
    assert metrics["schema"] == 1
    assert {"model", "forget", "retain", "holdout", "bystander", "retention", "retention_taught", "forget_drop"} <= set(
        metrics
    )
    assert {"unlearning_efficiency", "floor", "outcome", "seconds", "peak_memory_bytes"} <= set(metrics)
    assert {"forget_per_retain", "forget_per_second", "forget_per_removed_parameter"} == set(
        metrics["unlearning_efficiency"]
    )
    assert set(metrics["seconds"]) == {"score", "train", "evaluate", "total"}
    stages = [one["name"] for one in events(finished[0]) if one["event"] == "stage"]
    assert stages == ["evaluate", "evaluate", "train", "evaluate"]  # the model, the original, and what was written
    for part in ("before", "after"):
        assert {"performance", "loss", "exact_match", "fact_performance"} <= set(metrics["forget"][part])
    assert metrics["floor"]["min_retain_performance"] == 1.0


def test_compression_runs_without_a_forget_set_and_reaches_its_sparsity(run_folder):
    values = run_values(run_folder, "compressed", sparsity=0.2, min_retain_performance=0.0, metric="lora")
    values["data"] = values.pop("retain")
    del values["forget"]
    report = run(Settings(**values))
    assert report.metrics["sparsity"] == pytest.approx(0.2, abs=0.02)
    assert report.metrics["forget"] is None
    assert report.metrics["outcome"] == "budget_spent"
    assert set(json.loads(decision(run_folder / "compressed"))["removals"]["share"]) == {None}


# --- the trainer alone ---


def rows(kind):
    return [Row(i, (("user", one["question"]),), one["answer"]) for i, one in enumerate(make_rows()[kind], start=1)]


def make_trainer(tmp_path, tokenizer, target, *, forget=True, already=(), **changes):
    """A trainer on the tiny model; `already`: (rest, ceiling) of a forget set of its own, the holdout of an earlier request."""
    values = run_values(tmp_path, "trainer", **{"lora_dropout": 0.0, **changes})
    settings = Settings(**values)
    config = FAMILY_CONFIGS["llama_gqa"]()
    base = make_model(config)
    groups = find_groups(base, config)
    model = adapted(base, lora_rank=2)
    sets = {name: encode(rows(name), tokenizer, name=name, template="{prompt} ") for name in ("forget", "retain")}
    earlier = (sets["forget"][:3],) if already else ()
    probes = Probes(
        floor=Probe(sets["retain"][:2], [0, 1]),
        floor_before=[0.001, 0.003],
        pad_token_id=0,
        batch_size=64,
        forget=Probe(sets["forget"], range(4)) if forget else None,
        already_forgotten=earlier,
    )
    ceilings = (Ceiling(*already),) if already else ()
    limits = Limits(settings.min_retain_performance, ceilings=tuple(one.high for one in ceilings))
    events = []
    trainer = LoRAPruneTrainer(
        model,
        settings,
        TrainingSets(sets["retain"][2:], sets["forget"] if forget else None, 0, earlier),
        live=LiveMask(model, groups),
        steering=Steering(probes, limits, target, ceilings, 0.002 if forget else None),
        folder=tmp_path,
        event=lambda kind, **values: events.append({"event": kind, **values}),
    )
    trainer.seen = events
    return trainer


def target(performance):
    return Target(performance, performance - 1e-6, performance + 1e-6, "forget_target")


@torch.no_grad()
def plain_losses(trainer, batch):
    retain, forget = (
        trainer.adapted(input_ids=batch[name]["input_ids"], attention_mask=batch[name]["attention_mask"]).logits
        for name in ("retain", "forget")
    )
    values, counted = answer_log_probabilities(forget, batch["forget"]["labels"])
    return retain_loss(retain, batch["retain"]["labels"]), row_sums(values, counted), counted.sum(1)


@torch.no_grad()
def untouched_rows(batch):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return row_sums(*answer_log_probabilities(logits, batch["labels"]))


@pytest.mark.parametrize("kind", ["npo", "simnpo", "ga"])
def test_the_loss_is_retain_plus_ratio_times_forget_against_the_untouched_model(tmp_path, tokenizer, kind):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), forget_loss=kind, forget_retain_ratio=0.25)
    batch = next(iter(trainer.get_train_dataloader()))
    retain, row, tokens = plain_losses(trainer, batch)
    performance = (row / tokens).exp().mean().item()
    left = trainer.steering.target.way_left(performance, 0.002)
    assert 0 < left <= 1
    expected = retain + 0.25 * left * forget_loss(kind, row, tokens, untouched_rows(batch["forget"]), BETA)
    assert trainer.compute_loss(trainer.adapted, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_forget_loss_fades_from_the_untouched_models_performance_to_the_target():
    goal = target(0.4)
    assert [goal.way_left(one, 0.9) for one in (0.95, 0.9, 0.65, 0.4, 0.1)] == pytest.approx([1, 1, 0.5, 0, -0.6])


def test_the_forget_loss_fades_near_a_low_target_only():
    ways = [target(0.1).way_left(one, 0.9) for one in (0.9, 0.25, 0.175, 0.1, 0.025)]  # from 1.5 targets above it
    assert ways == pytest.approx([1, 1, 0.5, 0, -0.5])
    ways = [target(0.002).way_left(one, 0.9) for one in (0.9, 0.062, 0.032, 0.002)]  # two of the narrowest half bands
    assert ways == pytest.approx([1, 1, 0.5, 0])


def test_the_untouched_model_is_the_one_without_adapters_and_mask(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0))
    live = trainer.live
    mask = full_mask(live.groups)
    mask.kept["ffn_channel"][:, :12] = False
    live.set(mask)
    found = trainer.balance.untouched_log_probability(trainer.adapted, live)["forget"]
    batch = next(iter(trainer.get_train_dataloader()))["forget"]
    assert torch.allclose(found[batch["rows"]], untouched_rows(batch), atol=1e-4)
    assert live.value is mask


@pytest.mark.parametrize("goal", [0.9, None])
def test_the_forget_loss_is_off_for_a_batch_at_or_below_the_target_and_never_without_a_target(
    tmp_path, tokenizer, goal
):
    trainer = make_trainer(tmp_path, tokenizer, None if goal is None else target(goal))
    batch = next(iter(trainer.get_train_dataloader()))
    retain, _, _ = plain_losses(trainer, batch)
    loss = trainer.compute_loss(trainer.adapted, batch)
    assert (loss.item() == pytest.approx(retain.item(), rel=1e-6)) == (goal is not None)
    loss.backward()
    assert all(
        one.grad is not None and one.grad.isfinite().all() for one in trainer.adapted.parameters() if one.requires_grad
    )


def test_the_forget_loss_can_be_none(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), forget_loss="none")
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.adapted, batch).item() == pytest.approx(plain_losses(trainer, batch)[0].item())


def test_evaluation_names_both_sets_and_retention_and_metrics_add_the_trade_off(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0))
    numbers = trainer.evaluate_forget_retain()
    assert set(numbers) == {"forget", "retain", "retention"}
    assert numbers["retention"] == pytest.approx(numbers["retain"] / 0.002)
    metrics = trainer.compute_unlearning_metrics()
    assert {"forget", "retain", "retention", "sparsity", "forget_drop", "forget_per_retain"} <= set(metrics)
    assert {"retention_interval/0", "forget_interval/1", "groups/kv_group/0", "groups/ffn_channel/1"} <= set(metrics)
    assert metrics["forget_drop"] == 0.002 - numbers["forget"]
    assert metrics["sparsity"] == 0.0


def test_without_a_forget_set_nothing_is_said_of_one(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, None, forget=False)
    assert set(trainer.evaluate_forget_retain()) == {"retain", "retention"}
    assert not [name for name in trainer.compute_unlearning_metrics() if "forg" in name]


def test_the_floor_counts_the_floor_rows_and_no_taught_one(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0))
    before = trainer.evaluate_forget_retain()["retain"]
    trainer.sets.taught.clear()
    assert trainer.evaluate_forget_retain()["retain"] == before


def with_already(tmp_path, tokenizer, rest, high, **changes):
    trainer = make_trainer(tmp_path, tokenizer, target(0.9), already=(rest, high), **changes)
    return trainer, next(iter(trainer.get_train_dataloader()))


def test_what_was_forgotten_before_is_pushed_down_only_above_where_it_rests(tmp_path, tokenizer):
    trainer, batch = with_already(tmp_path, tokenizer, 0.5, 0.6)
    assert set(batch) == {"retain", "forget", "already_forgotten"}
    retain, _, _ = plain_losses(trainer, batch)
    assert trainer.compute_loss(trainer.adapted, batch).item() == pytest.approx(retain.item(), rel=1e-6)


@pytest.mark.parametrize("forgetting", [True, False])
def test_it_is_pushed_down_at_full_weight_at_its_ceiling_also_during_recovery(tmp_path, tokenizer, forgetting):
    trainer, batch = with_already(tmp_path, tokenizer, 0.0, 1e-9, forget_retain_ratio=0.25)
    trainer.run_state.forgetting = forgetting
    one = batch["already_forgotten"]
    with torch.no_grad():
        logits = trainer.adapted(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
        values, counted = answer_log_probabilities(logits, one["labels"])
    pushed = forget_loss("npo", row_sums(values, counted), counted.sum(1), untouched_rows(one), BETA)
    expected = plain_losses(trainer, batch)[0] + 0.25 * pushed
    assert trainer.compute_loss(trainer.adapted, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_push_is_as_strong_as_the_state_says(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0))
    batch = next(iter(trainer.get_train_dataloader()))
    retain = plain_losses(trainer, batch)[0].item()
    whole = trainer.compute_loss(trainer.adapted, batch).item() - retain
    trainer.run_state.forget_weight = 0.5
    assert trainer.compute_loss(trainer.adapted, batch).item() - retain == pytest.approx(whole / 2, rel=1e-4)


@pytest.mark.parametrize("retention, weight", [(0.95, 1.0), (0.85, 0.5)])
def test_a_step_undone_makes_the_push_gentler_only_where_training_broke_the_limit(
    tmp_path, tokenizer, retention, weight
):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0))
    trainer.steering = replace(trainer.steering, limits=Limits(0.9))
    trainer.undone_by = {"floor"}
    looked = Look.from_values({"sparsity": 0.0, "retention": retention, "groups": {}, "forget": 0.5})
    trainer._follow(Decision((), "floor"), looked)
    assert trainer.run_state.forget_weight == weight


LIMITS = Limits(0.9, max_guard_loss_ratio=1.1, ceilings=(0.2,), min_forget=0.3, forget_high=0.45)
WITHIN = {"retention": 0.95, "guard_loss_ratio": 1.0, "already_forgotten": (0.1,), "forget": 0.5}


@pytest.mark.parametrize(
    ("values", "step", "changes", "forgetting"),  # forgetting: None where the model is not left to mend
    [
        ({"retention": 0.8}, 4, {}, True),
        ({"guard_loss_ratio": 1.2}, 4, {}, True),
        ({"already_forgotten": (0.3,)}, 4, {}, True),
        ({"retention": 0.8}, 6, {}, False),  # in the second half
        ({"retention": 0.8, "forget": 0.4}, 4, {}, False),  # in the band
        ({"retention": 0.8}, 10, {}, None),  # no later step could cut
        ({"forget": 0.2}, 4, {}, None),  # the band's lower end alone
        ({}, 4, {}, None),
        ({"retention": 0.8}, 4, {"forget_loss": "none"}, None),
        ({"retention": 0.8}, 4, {"began_well": False}, True),  # P is past half of its way from 0.9 to 0.4
        ({"retention": 0.8, "forget": 0.66}, 4, {"began_well": False}, None),
        ({"retention": 0.8}, 6, {"began_well": False}, None),  # past half of its way, but in the second half
    ],
)
def test_what_forgetting_broke_is_left_to_mend_and_when_the_push_goes_on(
    tmp_path, tokenizer, values, step, changes, forgetting
):
    began_well = changes.get("began_well", True)
    changes = {name: one for name, one in changes.items() if name != "began_well"}
    trainer = make_trainer(tmp_path, tokenizer, Target(0.4, 0.3, 0.45, "forget_target"), **changes)
    trainer.steering = replace(trainer.steering, limits=LIMITS, forget_before=0.9)
    trainer.run_state.step, trainer.run_state.began_well = step, began_well
    looked = Look.from_values({"sparsity": 0.0, "groups": {}, **WITHIN, **values})
    assert trainer._wait(looked, pushed=True) is (forgetting is not None)
    assert trainer.run_state.forgetting is (forgetting is not False)
    assert [one["event"] for one in trainer.seen] == ["wait"] * (forgetting is not None)
    for_forgetting = looked.forget > 0.45 and looked.retention < 0.9  # the guard and ceilings say nothing of room
    assert trainer.run_state.lacks_room is (forgetting is not None and for_forgetting)
    assert not trainer._wait(looked, pushed=False)  # twice without the push, it does not
    trainer.steering = replace(trainer.steering, target=None)
    assert not trainer._wait(looked, pushed=True)


@pytest.mark.parametrize(("lacks_room", "floor", "room"), [(True, 0.9, 0.94), (False, 0.9, None), (True, 0.0, None)])
def test_a_cut_in_the_band_leaves_room_only_where_forgetting_lacked_it(
    tmp_path, tokenizer, monkeypatch, lacks_room, floor, room
):
    trainer, told = make_trainer(tmp_path, tokenizer, Target(0.4, 0.3, 0.45, "forget_target")), {}
    monkeypatch.setattr("loraprune.trainer.unlearning_prune", lambda *_, **others: told.update(others))
    limits = replace(LIMITS, min_retain_performance=floor, forget_high=0.45 if floor else None)
    trainer.steering = replace(trainer.steering, limits=limits)
    trainer.run_state.lacks_room = lacks_room
    scored = SimpleNamespace(values=dict)
    trainer.run_state.sensitivities = SimpleNamespace(forget=scored, retain=scored)
    in_band = Look.from_values({"sparsity": 0.0, "groups": {}, **WITHIN, "retention": 0.98, "forget": 0.4})
    trainer._step_of(0.1, in_band)
    assert told["limits"].of_cut(in_band).room == (room and pytest.approx(room))


def seen(forget):
    return Look.from_values({"sparsity": 0.0, "retention": 1.0, "groups": {}, "forget": forget})


@pytest.mark.parametrize(
    ("before", "known", "decision", "end"),
    [
        (0.5, 0.5, Decision((), "floor"), 14),
        (0.2, 0.5, Decision((), "floor"), 14),  # undone: known again
        (0.5, 0.3, Decision((), "floor"), 8),  # in the band
        (0.5, 0.5, Decision((), "target", seen(0.2)), 8),
    ],
)
def test_a_run_that_can_cut_no_more_takes_its_other_steps_where_the_forget_set_is_still_known(
    tmp_path, tokenizer, before, known, decision, end
):
    trainer = make_trainer(tmp_path, tokenizer, target(0.3))
    trainer.create_optimizer()
    trainer.run_state.good_look = seen(known)
    assert (trainer.run_state.main_end, trainer.run_state.end) == (10, 14)
    trainer.run_state.step = 4
    trainer._follow(decision, seen(before))
    assert (trainer.run_state.main_end, trainer.run_state.end) == (4, end)
    factor = trainer.create_scheduler(14).lr_lambdas[0]
    factors = [factor(step) for step in (4, end - 1)]
    assert factors == pytest.approx([1.0, 1 / (end - 4)])
