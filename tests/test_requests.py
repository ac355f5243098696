"""Requests in a row: each continues on the model of the one before, and none brings back what an earlier one removed."""

import itertools
import json
import shutil

import pytest
from conftest import ROWS_PER_PERSON, world_values, write_rows
from safetensors.torch import load_file, save_file

from loraprune.errors import UserError
from loraprune.model import weights_hash
from loraprune.pipeline import run
from loraprune.plan import make_plan
from loraprune.settings import Settings

FLOOR = 0.85
ROOM = {"relearning_radius": 0.0}  # 12 people that stay leave too little room above the floor to look ahead three times


@pytest.fixture(scope="module")
def requests(small_world, tmp_path_factory):
    """Two people at a time, three times: the folders of the runs and their reports, oldest first."""
    folder = tmp_path_factory.mktemp("requests")
    rows = [json.loads(line) for line in (small_world / "forget.jsonl").read_text().splitlines()]
    size = 2 * ROWS_PER_PERSON
    asked = [write_rows(folder / f"ask{i}.jsonl", rows[i * size : (i + 1) * size]) for i in range(3)]
    model, reports = str(small_world / "untouched"), []
    for number, forget in enumerate(asked):
        output = folder / f"out{number}"
        own = {"forget": forget, "already_forgotten": tuple(asked[:number]), "request_id": f"ticket {number}"}
        values = world_values(small_world, output, model=model, min_retain_performance=FLOOR, **ROOM, **own)
        reports.append(run(Settings(**values)))
        model = str(output / "model")
    return reports


def ledger(report):
    return json.loads((report.folder / "reproduce.json").read_text())["ledger"]


def test_after_the_third_request_all_six_people_are_at_the_references_level(requests):
    assert [one.metrics["outcome"] for one in requests] == ["target_reached"] * 3
    last = requests[-1].metrics
    assert last["target"]["low"] <= last["forget"]["after"]["performance"] <= last["target"]["high"]
    assert len(last["already_forgotten"]) == 2
    for one in last["already_forgotten"]:
        reference = one["reference"]["performance"]
        assert one["held"] and one["after"]["performance"] <= one["ceiling"]
        assert one["ceiling"] == pytest.approx(max(reference + max(0.03, reference / 4), one["before"]["performance"]))


def test_the_floor_holds_against_the_first_model_not_against_each_parent(requests):
    first = json.loads((requests[0].folder / "before.json").read_text())
    for number, report in enumerate(requests):
        after = json.loads((report.folder / "after.json").read_text())
        kept = after["floor"]["performance"] / first["floor"]["performance"]
        assert report.metrics["floor"]["retention"] == pytest.approx(kept, abs=1e-9)
        assert kept >= FLOOR
        assert report.metrics["retention_against"] == ("ledger" if number else "given model")
        looks = [json.loads(line) for line in (report.folder / "events.jsonl").read_text().splitlines()]
        assert all(one["retention"] >= FLOOR for one in looks if one["event"] in ("accept", "stop"))


def test_the_ledger_names_every_request_what_it_removed_and_its_data_by_hash_alone(requests):
    entries = ledger(requests[-1])
    assert [one["request_id"] for one in entries] == ["ticket 0", "ticket 1", "ticket 2"]
    assert [one["outcome"] for one in entries] == ["target_reached"] * 3
    for one, other in itertools.pairwise(entries):
        assert other["parent_sha256"] == one["weights_sha256"]
    for report, entry in zip(requests, entries, strict=True):
        assert entry["weights_sha256"] == weights_hash(str(report.folder / "model"))
        decision = json.loads((report.folder / "decision.json").read_text())
        for kind in ("kv_group", "ffn_channel"):
            removed = sum(len(layer) for layer in entry["removed"][kind])
            assert removed == decision["groups"][kind]["before"] - decision["groups"][kind]["after"]
        assert len({entry["data_sha256"][name] for name in ("forget", "taught", "floor", "final")}) == 4
    text = (requests[-1].folder / "reproduce.json").read_text()
    people = {json.loads(line)["fact_id"].split("/")[0] for line in open_rows(requests)}
    assert not [person for person in people if person in text]


def open_rows(requests):
    return [line for path in requests[0].folder.parent.glob("ask*.jsonl") for line in path.read_text().splitlines()]


def test_the_ledger_goes_where_the_model_goes(requests):
    alone = json.loads((requests[1].folder / "model" / "reproduce.json").read_text())
    assert alone["ledger"] == ledger(requests[1])


def test_an_id_that_the_ledger_holds_is_refused_and_nothing_is_left(requests, small_world, tmp_path):
    model = str(requests[0].folder / "model")
    values = world_values(small_world, tmp_path / "out", model=model, request_id="ticket 0")
    with pytest.raises(UserError, match="already holds a request ticket 0"):
        run(Settings(**values))
    assert not (tmp_path / "out").exists()


def test_a_model_that_lost_too_much_already_is_refused_before_anything_is_trained(requests, small_world, tmp_path):
    values = world_values(
        small_world, tmp_path / "out", model=str(requests[2].folder / "model"), min_retain_performance=0.999
    )
    with pytest.raises(UserError, match=r"keeps 0\.\d+ of what the original knew of the floor rows"):
        run(Settings(**values))
    assert not (tmp_path / "out").exists()


def test_with_other_floor_rows_the_original_has_to_be_named_to_be_held_against(requests, small_world, tmp_path):
    retain = [json.loads(line) for line in (small_world / "retain.jsonl").read_text().splitlines()]
    fewer = write_rows(tmp_path / "retain.jsonl", retain[: 8 * ROWS_PER_PERSON])
    short = {"prune_rounds": 1, "prune_every": 2, "warmup_steps": 2, "finish_steps": 2, "sparsity": 0.02}
    own = {"model": str(requests[0].folder / "model"), "retain": fewer, "min_retain_performance": 0.5, **short}
    report = run(Settings(**world_values(small_world, tmp_path / "a", **own)))
    assert report.metrics["retention_against"] == "given model"
    named = {**own, "original": str(small_world / "untouched")}
    report = run(Settings(**world_values(small_world, tmp_path / "b", **named)))
    assert report.metrics["retention_against"] == "measured"
    original = json.loads((tmp_path / "b" / "original.json").read_text())["sets"]["floor"]["performance"]
    before = json.loads((tmp_path / "b" / "before.json").read_text())["floor"]["performance"]
    assert original > before
    after = json.loads((tmp_path / "b" / "after.json").read_text())["floor"]["performance"]
    assert report.metrics["floor"]["retention"] == pytest.approx(after / original)


SHORT = {"prune_rounds": 1, "prune_every": 2, "warmup_steps": 2, "finish_steps": 2, "sparsity": 0.02}


def test_a_ledger_of_other_weights_is_left_aside_and_that_is_said(requests, small_world, tmp_path, capsys):
    model = tmp_path / "tuned"
    shutil.copytree(requests[0].folder / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1e-6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    report = run(Settings(**world_values(small_world, tmp_path / "out", model=str(model), **SHORT)))
    assert "of other weights and was left aside" in " ".join(capsys.readouterr().out.split())
    assert [one["request_id"] for one in ledger(report)] == ["request-1"]


def test_what_the_ledger_knows_of_the_rows_in_another_form_is_not_used(requests, small_world, tmp_path):
    own = {"model": str(requests[0].folder / "model"), "template": "Q {prompt} A ", "min_retain_performance": 0.0}
    report = run(Settings(**world_values(small_world, tmp_path / "out", **own, **SHORT)))
    assert report.metrics["floor"]["against"] == "given model"


def test_the_plan_refuses_a_model_that_lost_too_much_in_the_runs_own_words(requests, small_world, tmp_path):
    own = {"model": str(requests[2].folder / "model"), "min_retain_performance": 0.999}
    said = []
    for start in (run, make_plan):
        with pytest.raises(UserError) as caught:
            start(Settings(**world_values(small_world, tmp_path / "out", **own)))
        said.append(str(caught.value))
    assert said[0] == said[1]
