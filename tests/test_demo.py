"""The demo, small: a world, a model that knows it, a run; and the numbers again from stock transformers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loraprune.demo import make_inputs, settings_for
from loraprune.evidence import measure_models, metric_rows
from loraprune.pipeline import run
from loraprune.scratch import Recipe
from loraprune.world import FACT_KINDS, GROUP_SIZES, make_world

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
SHORT = {"warmup_steps": 2, "prune_every": 2, "prune_rounds": 2, "finish_steps": 2, "score_rows": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the demo's inputs; the models are small and know little."""
    folder = tmp_path_factory.mktemp("world") / "runs" / "demo"
    make_inputs(folder, 0, Recipe(vocabulary=320, sizes=SIZES, epochs=1))
    return folder


@pytest.fixture(scope="module")
def finished(world):
    console = Console(record=True, width=200)
    report = run(settings_for(world, 0, show_examples=True, **SHORT), console)
    return report, console.export_text()


def test_every_world_has_its_groups_and_kinds_of_fact():
    world = make_world(0)
    people = {group: {row["fact_id"].split("/")[0] for row in rows} for group, rows in world.items()}
    assert {group: len(one) for group, one in people.items()} == GROUP_SIZES
    assert len(set.union(*people.values())) == sum(GROUP_SIZES.values())
    assert len(FACT_KINDS) >= 6 and all(len(kind.phrasings) >= 3 for kind in FACT_KINDS)


def test_a_world_has_as_many_people_as_it_is_asked_for():
    world = make_world(0, {"forget": 1, "holdout": 2})
    people = {group: {row["fact_id"].split("/")[0] for row in rows} for group, rows in world.items()}
    assert {group: len(one) for group, one in people.items()} == {"forget": 1, "holdout": 2}


def test_every_row_marks_the_words_of_its_fact():
    for rows in make_world(1).values():
        assert all(len(row["facts"]) == 1 and row["facts"][0] in row["answer"] for row in rows)


def test_the_seed_makes_the_world():
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)


def test_a_run_folder_holds_data_models_and_evidence(finished, world):
    names = {"forget.jsonl", "retain.jsonl", "bystander.jsonl", "holdout.jsonl", "untouched", "reference"}
    names |= {"config.toml", "events.jsonl", "decision.json", "mask.safetensors", "adapter", "model"}
    names |= {"metrics.json", "report.html", "reproduce.json", "split.json"}
    assert names <= {one.name for one in world.iterdir()}


def test_stock_transformers_gets_the_very_numbers_of_the_report(finished, world):
    script = [sys.executable, str(ROOT / "tests" / "stock_numbers.py"), str(world / "model")]
    for name in ("forget", "bystander"):
        made = subprocess.run([*script, str(world / f"{name}.jsonl")], check=True, capture_output=True, text=True)
        performance, exact = json.loads(made.stdout)
        reported = finished[0].metrics[name]["after"]
        assert performance == pytest.approx(reported["performance"], abs=1e-6)
        assert exact == reported["exact_match"]


def test_examples_go_to_the_terminal_and_no_answer_into_a_file_of_the_run(finished, world):
    prompt = json.loads((world / "forget.jsonl").read_text().splitlines()[0])["question"]
    assert " ".join(prompt.split()[:4]) in " ".join(finished[1].split())
    people = {json.loads(line)["fact_id"].split("/")[0] for line in (world / "forget.jsonl").read_text().splitlines()}
    given = {"forget.jsonl", "untouched", "reference"}
    files = [one for one in world.rglob("*") if one.is_file() and not given & set(one.relative_to(world).parts)]
    assert len(files) > 10
    for file in files:
        text = file.read_bytes()
        assert not [person for person in people if person.encode() in text], file


def test_a_finished_run_is_read_not_run_again(finished, world):
    before = (world / "events.jsonl").read_text()
    again = run(settings_for(world, 0, show_examples=False, **SHORT), Console(quiet=True))
    assert again.metrics == finished[0].metrics
    assert (world / "events.jsonl").read_text() == before


def test_the_evidence_shows_three_models_and_the_numbers_of_the_run(finished, world):
    measured = measure_models(world, "none")
    rows = {name: cells for name, *cells in metric_rows(measured)}
    forget = finished[0].metrics["forget"]
    for role, part in (("original", "before"), ("reference", "reference"), ("unlearned", "after")):
        assert measured[role]["forget"]["performance"] == pytest.approx(forget[part]["performance"], abs=1e-9)
    assert rows["forget quality, p"][1] == "1.000"  # the reference beside itself
    assert not [cell for cells in rows.values() for cell in cells if "not measured" in cell]
    assert len(rows) == 15


def test_the_readmes_python_example_runs(world):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [example] = [one for one in blocks if "Settings(" in one]
    short = ", ".join(f"{name}={value}" for name, value in SHORT.items())
    shortened = example.replace('output="runs/mine",', f'output="runs/mine", {short},')
    assert shortened != example
    made = subprocess.run(
        [sys.executable, "-c", shortened], cwd=world.parent.parent, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.split()[-2] in ("target_reached", "budget_spent", "no_candidates", "floor_reached")
