"""A run's folder belongs to one process at a time, which leaves its name while it is there and nothing afterwards."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import tomli_w
from conftest import run_values
from rich.console import Console

from loraprune.cli import main
from loraprune.errors import UserError
from loraprune.folder import RunFolder, whole_folder
from loraprune.pipeline import run
from loraprune.settings import Settings, as_values

HOLDER = """
import json, signal, sys, time
from pathlib import Path
from loraprune.folder import RunFolder
from loraprune.settings import Settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background ignores it
settings = Settings(**json.loads(sys.argv[1]))
with RunFolder(Path(settings.output), settings).held(print):
    print("held", flush=True)
    time.sleep(600)
"""
LOCKS = {"run.lock", "owner.json"}


@pytest.fixture
def holder():
    """Starts another process that holds the folder of these settings; ends what is left of it."""
    started = []

    def start(values):
        child = subprocess.Popen([sys.executable, "-c", HOLDER, json.dumps(values)], stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


def ended(child, how):
    child.send_signal(how)
    return child.wait(timeout=60)


def names(folder):
    return {one.name for one in folder.iterdir()}


def test_a_second_process_is_refused_with_the_name_of_the_first_and_writes_nothing(run_folder, holder):
    values = run_values(run_folder, "in_use")
    child = holder(values)
    with pytest.raises(UserError) as caught:
        run(Settings(**values))
    since = json.loads((run_folder / "in_use" / "owner.json").read_text())["since"]
    assert caught.value.what == (
        f"{run_folder / 'in_use'} is in use by process {child.pid} on {platform.node()} since {since}."
    )
    assert "--output" in caught.value.fix
    assert names(run_folder / "in_use") == LOCKS


def test_the_command_line_refuses_it_as_a_users_error(run_folder, holder, tmp_path, capsys):
    values = run_values(run_folder, "in_use_too")
    child = holder(values)
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(as_values(Settings(**values))))
    assert main(["unlearn", "--config", str(tmp_path / "settings.toml")]) == 2
    assert f"in use by process {child.pid} on {platform.node()}" in capsys.readouterr().err


def test_a_process_that_was_killed_frees_its_folder_and_the_next_one_says_whose_it_was(run_folder, holder):
    values = run_values(run_folder, "stale")
    child = holder(values)
    assert ended(child, signal.SIGKILL) == -signal.SIGKILL
    assert names(run_folder / "stale") == LOCKS
    console = Console(record=True, width=300)
    report = run(Settings(**values), console)
    text = console.export_text()
    assert text.count(f"process {child.pid} on {platform.node()} since ") == 1
    assert "ended without finishing; the run goes on where it was" in text
    assert report.metrics["outcome"]
    assert not LOCKS & names(run_folder / "stale")
    again = Console(record=True, width=300)
    run(Settings(**values), again)
    assert "ended without finishing" not in again.export_text()


def test_ctrl_c_frees_the_folder_and_leaves_no_name(run_folder, holder):
    values = run_values(run_folder, "interrupted")
    child = holder(values)
    assert ended(child, signal.SIGINT) not in (0, -signal.SIGKILL)
    assert not (run_folder / "interrupted").exists()
    said = []
    with RunFolder(run_folder / "interrupted", Settings(**values)).held(said.append):
        assert json.loads((run_folder / "interrupted" / "owner.json").read_text())["process"] == os.getpid()
    assert said == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_an_error_frees_the_folder(tmp_path, error):
    folder = RunFolder(tmp_path / "run", Settings())
    with pytest.raises(error), folder.held(print):
        raise error("what", "why", "fix")
    assert not (tmp_path / "run").exists()
    with folder.held(print):
        assert names(tmp_path / "run") == LOCKS


def test_a_run_that_another_process_began_since_the_first_look_is_looked_at_again(tmp_path):
    mine, other = Settings(output=str(tmp_path), seed=1), Settings(output=str(tmp_path), seed=2)
    folder = RunFolder(tmp_path, mine)
    folder.check()
    RunFolder(tmp_path, other).open()
    with pytest.raises(UserError, match="seed was 2, now 1"), folder.held(print):
        pytest.fail("went on in a run with other settings")
    assert names(tmp_path) == {"config.toml"}


def test_a_refused_folder_says_every_setting_that_would_have_to_be_as_it_was(tmp_path):
    RunFolder(tmp_path, Settings(output=str(tmp_path))).open()
    with pytest.raises(UserError, match="use the old value of --lora-rank, --seed, or choose another --output"):
        RunFolder(tmp_path, Settings(output=str(tmp_path), seed=1, lora_rank=4)).check()


def test_a_compression_from_before_is_gone_on_with_whatever_its_forget_loss_was_set_to(tmp_path):
    for name, forget in (("prune", None), ("unlearn", "forget.jsonl")):
        settings = Settings(output=str(tmp_path / name), retain="retain.jsonl", forget=forget)
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name, settings).open()
        config = tmp_path / name / "config.toml"
        config.write_text(config.read_text().replace("forget_loss_beta = 1.0", "forget_loss_beta = 0.1"))
    RunFolder(tmp_path / "prune", Settings(output=str(tmp_path / "prune"), retain="retain.jsonl")).check()
    with pytest.raises(UserError, match=r"forget_loss_beta was 0\.1, now 1"):
        RunFolder(tmp_path / "unlearn", settings).check()


def test_a_setting_that_nobody_gave_is_called_unset_in_a_refused_folder(tmp_path):
    RunFolder(tmp_path, Settings(output=str(tmp_path), round_to=8)).open()
    with pytest.raises(UserError, match="round_to was 8, now unset"):
        RunFolder(tmp_path, Settings(output=str(tmp_path))).check()


@pytest.fixture(scope="module")
def finished(run_folder):
    run(Settings(**run_values(run_folder, "kept_locked")))
    return run_folder / "kept_locked"


def test_a_finished_run_holds_no_lock_and_needs_none(finished, run_folder):
    assert not LOCKS & names(finished)
    before = finished.stat().st_mtime_ns  # a file made and taken away again would change it
    with RunFolder(finished, Settings(**run_values(run_folder, "kept_locked"))).held(print):
        assert not LOCKS & names(finished)
    run(Settings(**run_values(run_folder, "kept_locked")))
    assert finished.stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["state", "run.lock", "owner.json"])
def test_what_a_kill_in_the_last_moment_left_in_a_finished_run_is_taken_away(finished, tmp_path, left):
    shutil.copytree(finished, tmp_path / "copy")
    if left == "state":
        (tmp_path / "copy" / left).mkdir()
    else:
        (tmp_path / "copy" / left).write_text('{"process": 1, "host": "elsewhere", "since": "2026-01-01 12:00"}')
    values = run_values(finished.parent, "kept_locked")
    run(Settings(**{**values, "output": str(tmp_path / "copy")}))
    assert names(tmp_path / "copy") == names(finished)


def test_an_event_that_a_kill_cut_short_is_dropped_before_the_next_is_written(tmp_path):
    folder = RunFolder(tmp_path, Settings())
    folder.open()
    folder.event("score", step=1)
    whole = (tmp_path / "events.jsonl").read_bytes()
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "prop')
    folder.open()
    assert (tmp_path / "events.jsonl").read_bytes() == whole
    folder.event("accept", step=1)
    assert [one["event"] for one in folder.events()] == ["score", "accept"]
    folder.open()
    assert [one["event"] for one in folder.events()] == ["score", "accept"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "model") as part:
        (part / "deep").mkdir()
        (part / "deep" / "one").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model") as part:
        (part / "two").write_text("2")
        raise KeyboardInterrupt
    assert [one.relative_to(tmp_path).as_posix() for one in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/deep",
        "model/deep/one",
    ]
