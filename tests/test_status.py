"""Status: what a run wrote is all that it takes to say how it stands, and no model is loaded to say it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import run_values

from loraprune import cli
from loraprune.errors import UserError
from loraprune.events import attempts
from loraprune.pipeline import run
from loraprune.settings import Settings
from loraprune.status import Status, read_status, status_of, status_plot, status_text
from loraprune.textplot import Bound, Curve, text_plot

Values = Mapping[str, Any]
BEGIN = {
    "event": "begin",
    "seconds": 2.0,
    "step": 0,
    "task": "unlearn",
    "parameters": 1312768,
    "steps": 90,
    "sparsity_goal": 0.3,
    "target": {"performance": 0.45, "low": 0.34, "high": 0.56, "source": "reference"},
    "min_retain_performance": 0.9,
    "max_guard_loss_ratio": 1.1,
    "floor_rows": 72,
    "floor_facts": 12,
    "ceilings": [0.12],
}


def event(kind: str, step: int, sparsity: float, retention: Any, forget: Any, **others: Any) -> dict[str, Any]:
    """Return a line with a look; the interval of each number reaches 0.02 to both sides."""
    numbers = {"sparsity": sparsity, "retention": retention, "forget": forget}
    intervals = {
        f"{name}_interval": [numbers[name] - 0.02, numbers[name] + 0.02]
        for name in ("retention", "forget")
        if isinstance(numbers[name], float)
    }
    groups = {"kv_group": [4, 4], "ffn_channel": [40, 36]}
    return {"event": kind, "seconds": 2 + step / 4, "step": step, **numbers, **intervals, "groups": groups, **others}


def unlearning() -> list[dict[str, Any]]:
    """Return a run that repairs one step, repairs another in vain and halves it, skips a step and overshoots once."""
    return [
        {"event": "stage", "seconds": 1.5, "name": "evaluate", "duration": 1.4},
        BEGIN,
        event("score", 10, 0.0, 0.99, 0.97, rows={"retain": 64, "forget": 64}, non_finite=[], duration=0.3),
        event("propose", 10, 0.1, 0.86, 0.80, removed=20, allowed=0.1, broken=["floor"]),
        event("recover", 10, 0.1, 0.95, 0.82, steps=5, broken=[]),
        event("accept", 10, 0.1, 0.95, 0.82, removed=20),
        {"event": "train", "seconds": 5.0, "step": 15, "loss": 0.7, "grad_norm": "inf", "learning_rate": 1e-4},
        {"event": "skip", "seconds": 5.0, "step": 15, "reason": "gradient not finite"},
        event("score", 20, 0.1, 0.96, 0.70, rows={"retain": 64}, non_finite=["ffn_channel of layer 1"], duration=0.3),
        event("propose", 20, 0.2, 0.70, 0.30, removed=20, allowed=0.2, broken=["floor", "band"]),
        event("recover", 20, 0.2, 0.85, 0.32, steps=5, broken=["floor", "band"]),
        event("roll_back", 20, 0.1, 0.95, 0.82, broken=["floor", "band"], tried=0.2),
        event("propose", 20, 0.15, 0.93, 0.60, removed=10, allowed=0.15, broken=[]),
        event("accept", 20, 0.15, 0.93, 0.60, removed=10, guard_loss_ratio=1.03, already_forgotten=[0.05]),
        event("evaluate", 60, 0.15, 0.96, 0.20),
        event("roll_back", 60, 0.15, 0.93, 0.60, broken=["band"], tried=0.15),
        {"event": "stage", "seconds": 20.0, "name": "train", "duration": 18.0, "score": 0.6},
        event("stop", 90, 0.15, 0.97, 0.50, outcome="target_reached", ended_by="target", guard_loss_ratio=1.03),
    ]


def compression() -> list[dict[str, Any]]:
    """Return a run that only compresses: no forget set, no floor, no interval."""
    begin = {name: one for name, one in BEGIN.items() if name not in ("max_guard_loss_ratio", "ceilings")}
    looks = [event("accept", step, step / 100, 1 - step / 500, 0.0, removed=9) for step in (10, 20, 30)]
    for one in looks:
        del one["forget"], one["forget_interval"], one["retention_interval"]
    return [begin | {"task": "prune", "target": None, "min_retain_performance": 0.0}, *looks]


def folder_of(path: Path, events: Sequence[Values], tail: str = "") -> Path:
    path.mkdir(exist_ok=True)
    (path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events) + tail, encoding="utf-8")
    return path


def text_of(events: Sequence[Values]) -> str:
    return status_text(status_of(events, 3.0), "runs/one")


def rows_of(text: str) -> dict[str, str]:
    """Return the lines of the table by name, those that go on below being joined."""
    rows: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines()[1:]:
        name = line[:14].strip() or list(rows)[-1]
        rows[name] = f"{rows[name]} {line.strip()}" if name in rows else line[14:]
    return rows


# --- what is read


def test_a_status_counts_the_pruning_steps_that_waited() -> None:
    waits = [event("wait", step, 0.0, 0.8, 0.5, broken=["floor"], forgetting=True) for step in (10, 20)]
    assert rows_of(text_of([BEGIN, *waits]))["waited"].strip() == "2 (floor 2)"
    assert "waited" not in rows_of(text_of(unlearning()))


def test_a_status_counts_what_was_accepted_repaired_rolled_back_and_skipped() -> None:
    status = status_of(unlearning(), 0.0)
    tried = [(one.step, one.accepted, one.repaired, one.broken, one.still_broken) for one in status.attempts]
    assert tried == [
        (10, True, True, ("floor",), ()),
        (20, False, True, ("floor", "band"), ("floor", "band")),
        (20, True, False, (), ()),
        (60, False, False, (), ("band",)),
    ]
    assert status.skipped == {"gradient not finite": 1, "score not finite": 1}
    assert (status.outcome, status.ended_by, status.step, status.seconds) == ("target_reached", "target", 90, 24.5)


def test_a_repaired_step_has_the_retention_it_was_proposed_with_and_a_lost_one_that_it_was_given_up_with() -> None:
    assert [one.retention for one in attempts(unlearning())] == [0.86, 0.85, 0.93, 0.96]


def test_an_attempt_that_a_kill_cut_short_is_not_taken_for_the_next_one() -> None:
    killed = [*unlearning()[:5], BEGIN | {"step": 8}, event("roll_back", 10, 0.0, 0.99, 0.97, broken=["floor"])]
    (only,) = attempts(killed)
    assert (only.repaired, only.retention) == (False, None)


def test_what_was_only_tried_is_no_look_and_what_was_gone_back_to_is() -> None:
    looks = status_of(unlearning(), 0.0).looks
    expected = ["score", "accept", "score", "roll_back", "accept", "evaluate", "roll_back", "stop"]
    assert [one["event"] for one in looks] == expected
    assert rows_of(text_of(unlearning()[:16]))["P(forget)"].startswith("0.600")


def test_a_resumed_run_counts_its_starts_and_the_seconds_of_the_last() -> None:
    resumed = [*unlearning()[:7], BEGIN | {"step": 10, "seconds": 3.0}]
    assert rows_of(text_of(resumed))["step"] == "10 of 90, 3 s after the last of 2 starts"


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    whole = read_status(folder_of(tmp_path / "whole", unlearning()[:6]))
    cut = read_status(folder_of(tmp_path / "cut", unlearning()[:6], tail='{"event": "stop", "outcome": "tar'))
    assert (cut.step, cut.last_event, cut.outcome) == (whole.step, "accept", None)


def test_a_folder_without_events_is_refused_and_the_run_beside_it_named(tmp_path: Path) -> None:
    run_folder = folder_of(tmp_path / "run", unlearning())
    (run_folder / "model").mkdir()
    for place in (run_folder / "model", tmp_path):
        with pytest.raises(UserError, match=r"holds no events\.jsonl") as caught:
            read_status(place)
        assert caught.value.fix == f"did you mean {run_folder}?"
    with pytest.raises(UserError, match="there is no folder") as caught:
        read_status(tmp_path / "none" / "such")
    assert caught.value.fix == "name the folder that the run was given by --output."


# --- what is said


def test_a_finished_run_is_said_with_its_limits_its_last_look_and_its_end() -> None:
    text = text_of(unlearning())
    assert text.splitlines()[0] == "runs/one: unlearning, 1,312,768 parameters"
    assert rows_of(text) == {
        "target": "0.450, P(forget) of the reference model; band 0.34 .. 0.56",
        "goal": "sparsity 0.300",
        "floor": "retention >= 0.900 on 72 rows of 12 facts",
        "guard": "loss ratio <= 1.100",
        "ceilings": "P of what is forgotten already <= 0.120",
        "step": "90 of 90, 24 s after the start",
        "last line": "stop, written 3 s ago",
        "removed": "15.0 % of the parameters",
        "P(forget)": "0.500, 95 % interval 0.480 .. 0.520, inside the band",
        "retention": "0.970, 95 % interval 0.950 .. 0.990",
        "guard loss": "1.030 times that of the original model",
        "kv_groups": "8 kept, 4 in each of 2 layers",
        "ffn_channels": "76 kept, by layer 40 36",
        "accepted": "2",
        "repairs": "2 (floor 2, band 1), 1 in vain",
        "rolled back": "2 (floor 1, band 2)",
        "skipped": "2 (gradient not finite 1, score not finite 1)",
        "outcome": "target_reached",
        "pruning end": "P(forget) had come down to the band",
    }


def test_a_running_run_has_no_outcome_and_says_what_earlier_requests_come_to() -> None:
    rows = rows_of(text_of(unlearning()[:14]))
    assert "outcome" not in rows and rows["step"].startswith("20 of 90") and rows["last line"].startswith("accept")
    assert rows["P(forget)"].endswith("above the band") and rows["forgotten"] == "P 0.050 of earlier requests"


def test_a_compression_has_no_forget_set_no_target_and_no_floor() -> None:
    text = text_of(compression())
    assert not {"target", "floor", "P(forget)", "repairs", "rolled back", "skipped"} & rows_of(text).keys()
    assert rows_of(text)["retention"] == "0.940" and "F P(forget)" not in text and "floor" not in text


def test_a_run_that_has_only_begun_is_shown_without_a_plot() -> None:
    assert text_of([]) == "runs/one: training has not begun\nlast line     none, begun 3 s ago\nlook          none yet"
    assert text_of(unlearning()[:1]).splitlines()[:2] == [
        "runs/one: training has not begun",
        "last line     stage, written 3 s ago",
    ]
    rows = rows_of(text_of(unlearning()[:2]))
    assert (rows["step"], rows["look"], rows["accepted"]) == ("0 of 90, 2 s after the start", "none yet", "0")


def test_numbers_that_are_not_finite_are_said_and_not_drawn() -> None:
    broken = [*unlearning()[:6], event("evaluate", 12, 0.1, "nan", "inf", guard_loss_ratio="inf")]
    rows = rows_of(text_of(broken))
    assert (rows["retention"], rows["guard loss"]) == ("nan", "inf times that of the original model")
    assert rows["P(forget)"] == "inf, above the band"
    assert status_plot(status_of(broken, 0.0)) == status_plot(status_of(broken[:6], 0.0))


def test_a_deep_model_stays_within_80_columns() -> None:
    deep = {"kv_group": [8] * 80, "ffn_channel": list(range(11000, 11080))}
    text = text_of([BEGIN, event("accept", 10, 0.1, 0.95, 0.8) | {"groups": deep}])
    assert max(map(len, text.splitlines())) <= 80
    assert rows_of(text)["ffn_channels"].endswith("11078 11079")


# --- the plot


def test_marks_stand_at_their_values_and_the_way_between_is_dotted() -> None:
    lines = text_plot([Curve("F", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])], [], 1.0, ("0", "half", "1"), 33)
    cells = [line[6:].ljust(33) for line in lines[:-2]]
    assert [(row, cell.index("F")) for row, cell in enumerate(cells) if "F" in cell] == [(0, 0), (8, 16), (16, 32)]
    assert all(cell.strip("F. ") == "" and "." in cell for cell in cells[1:8])
    assert [line[:4] for line in lines[:17:4]] == ["1.00", "0.75", "0.50", "0.25", "0.00"]
    assert lines[-1].split() == ["0", "half", "1"]


def test_band_and_floor_are_named_and_a_cell_of_two_curves_is_marked() -> None:
    curves = [Curve("F", [(0.0, 1.0), (1.0, 0.25)]), Curve("R", [(0.0, 1.0), (1.0, 1.0)])]
    bounds = [Bound(":", -0.1, 0.25, "band"), Bound("-", 0.9, 0.9, "floor"), Bound("-", 7.0, 7.0, "above")]
    lines = text_plot(curves, bounds, 1.0, ("", "", ""), 20)
    assert lines[0][6] == "*" and lines[0][25] == "R"
    assert [row for row, line in enumerate(lines) if line.endswith("- floor")] == [2]
    assert [row for row, line in enumerate(lines[:-2]) if ":" in line] == [12, 13, 14, 15, 16]
    assert sum(line.endswith("band") for line in lines) == 1 and not any("above" in line for line in lines)


@pytest.mark.parametrize("highest", [0.2, 1.0, 1.4, 3.7, 2000.0])
def test_a_plot_holds_its_highest_value_and_stays_small(highest: float) -> None:
    lines = text_plot([Curve("R", [(0.0, 1.0), (1.0, highest)])], [], 1.0, ("0", "", "1"), 30)
    assert sum(line.count("R") for line in lines) == 2 and len(lines) <= 27
    assert len({line.index("|") for line in lines if "|" in line}) == 1


def test_the_plot_shows_how_much_is_still_to_go() -> None:
    status = status_of(unlearning()[:6], 0.0)
    assert "30.0 %" in status_plot(status)
    assert "10.0 %" in status_plot(Status(**{**vars(status), "begin": {**BEGIN, "sparsity_goal": None}}))


def test_a_run_that_removed_nothing_is_drawn() -> None:
    lines = status_plot(status_of([event("evaluate", 1, 0.0, 1.0, 0.9)], 0.0)).splitlines()
    assert lines[1].endswith("|R") and lines[-1].split()[:2] == ["0.0", "%"]


# --- the command

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "rich", "matplotlib")
PROBE = """
import sys
from loraprune.cli import main
code = main(sys.argv[1:])
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def test_a_status_loads_no_library_and_prints_plain_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", unlearning())
    code = [sys.executable, "-c", PROBE.format(heavy=HEAVY), "status", str(folder)]
    ran = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "[]\n")
    assert ran.stdout.isascii() and ran.stdout.replace("\n", "").isprintable()
    assert "outcome       target_reached" in ran.stdout and "F P(forget)" in ran.stdout


def test_json_is_the_status_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [*unlearning(), event("evaluate", 12, 0.1, "nan", "inf")]
    folder = folder_of(tmp_path / "run", events)
    assert cli.main(["status", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    expected = json.loads(json.dumps(asdict(status_of(events, 0.0))))
    assert shown | {"age": 0.0} == expected


def test_the_status_of_a_real_run_says_what_its_results_say(run_folder: Path) -> None:
    folder = run(Settings(**run_values(run_folder, "status"))).folder
    status, metrics = read_status(folder), json.loads((folder / "metrics.json").read_text())
    decision = json.loads((folder / "decision.json").read_text())
    accepted = {one.step for one in status.attempts if one.accepted}
    assert set(decision["removals"]["step"]) <= accepted and accepted
    assert status.outcome == metrics["outcome"]
    assert status.looks[-1]["sparsity"] == pytest.approx(metrics["sparsity"])
    rows = rows_of(status_text(status, "run"))
    for kind, groups in metrics["model"]["groups"].items():
        assert rows[f"{kind}s"].startswith(f"{groups['after']} kept")
