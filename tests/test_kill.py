"""A run that is killed at any moment, again and again, ends as one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_values

from loraprune.folder import LOCK, OWNER
from loraprune.pipeline import run
from loraprune.settings import Settings

SCRIPT = Path(__file__).with_name("killed_often.py")
# One thread, none of pyarrow's allocator and none of a GPU's driver: the script forks.
ALONE = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "CUDA_VISIBLE_DEVICES": "",
}
OF_THIS_START = {"config.toml", "events.jsonl", "metrics.json", "report.html"}  # they hold the output's name or seconds
KILLS = 20
CLOCKS = ("seconds", "duration", "look_duration")


@pytest.fixture(scope="module")
def found(run_folder):
    """What the script printed of a run killed at 20 seeded random moments of its length."""
    values = run_values(run_folder, "")
    del values["output"]
    given = {"settings": values, "folder": str(run_folder), "kills": KILLS, "seed": 5}
    command = [sys.executable, str(SCRIPT), json.dumps(given)]
    done = subprocess.run(command, env=os.environ | ALONE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files_of(folder):
    """What a run left, by name; a kill after its last file leaves the lock's too, which hold nothing any more."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name not in (LOCK, OWNER))
    return {path.relative_to(folder): path for path in found}


def test_a_run_killed_at_20_random_moments_and_resumed_each_time_decides_as_one_that_nobody_killed(found):
    assert len(found["kills"]) == KILLS
    decision = (Path(found["unkilled"]) / "decision.json").read_bytes()
    assert json.loads(decision)["removals"]["index"]
    for folder in found["finished"]:
        assert (Path(folder) / "decision.json").read_bytes() == decision


def test_mask_adapter_checkpoint_and_every_number_are_the_same_too(found):
    expected = files_of(found["unkilled"])
    assert {"adapter/adapter_model.safetensors", "model/model.safetensors", "mask.safetensors"} <= {*map(str, expected)}
    for folder in found["finished"]:
        files = files_of(folder)
        assert files.keys() == expected.keys()
        for name in files.keys() - {Path(one) for one in OF_THIS_START}:
            assert files[name].read_bytes() == expected[name].read_bytes(), f"{folder}: {name}"


def story(folder):
    """Every event of a step that the saved state covers, without seconds."""
    lines = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]
    told = [one for one in lines if "step" in one and one["event"] not in ("train", "begin")]  # a start is no step
    return [{name: one for name, one in line.items() if name not in CLOCKS} for line in told]


def test_a_killed_run_tells_the_same_story_step_by_step(found):
    expected = story(found["unkilled"])
    assert {"score", "propose", "accept"} <= {one["event"] for one in expected}
    for folder in found["finished"]:
        assert story(folder) == expected


def test_the_kills_met_the_run_at_different_stages_and_some_lives_went_on_from_a_saved_step(found):
    assert len({one["stage"] for one in found["kills"]}) >= 2
    assert len({len(one["events"]) for one in found["kills"]}) >= 5
    assert any(one["step"] > 0 for one in found["kills"])


def test_a_run_killed_between_its_stop_and_its_metrics_tells_the_stop_once(run_folder, tmp_path):
    settings = Settings(**run_values(run_folder, str(tmp_path / "out")))
    first = run(settings)
    for name in ("metrics.json", "report.html"):
        (first.folder / name).unlink()
    assert run(settings).metrics["outcome"] == first.metrics["outcome"]
    lines = (first.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines].count("stop") == 1
