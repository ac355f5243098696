"""Status: how far a run is and how it stands, from its events alone; loads no model and no library for one.

Reads    events.jsonl of a running, stopped or finished run
Gives    Status, read_status, status_text, status_plot
Source   -
Symbols  P = performance; a look is a line of events.jsonl with the numbers that steer a run
"""

import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune.errors import UserError
from loraprune.events import Attempt, attempts, has_look, read_events
from loraprune.textplot import BOTH, Bound, Curve, text_plot
from loraprune.words import (
    ENDINGS,
    FORMS,
    TARGET_SOURCES,
    Values,
    band_texts,
    counted,
    duration_text,
    number_text,
    percent,
    position,
)

STOOD = ("score", "accept", "roll_back", "evaluate", "stop")  # looks at a state of the run; others were only tried
WIDTH, NAME_WIDTH, PLOT_WIDTH = 80, 14, 54
Row = tuple[str, str]


@dataclass(frozen=True)
class Status:
    """A run as its events tell it; before training begins `begin` is empty and there is no look."""

    begin: Values  # what the latest start of the process said of the run
    starts: int
    step: int
    seconds: float  # on the clock of the process that wrote the last line
    age: float  # seconds since then
    last_event: str | None
    looks: Sequence[Values]  # at the run's states, in order; not at what was only tried
    attempts: Sequence[Attempt]
    waits: Sequence[Sequence[str]]  # limits broken at each pruning step that was left out, for training to mend them
    skipped: Mapping[str, int]  # steps left out, training and scoring, by reason
    outcome: str | None
    ended_by: str | None
    form: str | None = None  # of the written checkpoint


def read_status(folder: Path) -> Status:
    """Return how the run in a folder stands; raises UserError where no run has written an event."""
    path = folder / "events.jsonl"
    if not path.is_file():
        raise _no_run(folder)
    return status_of(read_events(path), max(time.time() - path.stat().st_mtime, 0.0))


def status_of(events: Sequence[Values], age: float) -> Status:
    """Return the status that events tell, the last of them written `age` seconds ago."""
    begins = [one for one in events if one["event"] == "begin"]
    last: Values = events[-1] if events else {}
    return Status(
        begin=begins[-1] if begins else {},
        starts=len(begins),
        step=next((one["step"] for one in reversed(events) if "step" in one), 0),
        seconds=last.get("seconds", 0.0),
        age=age,
        last_event=last.get("event"),
        looks=[one for one in events if has_look(one, STOOD)],
        attempts=attempts(events),
        waits=[one["broken"] for one in events if one["event"] == "wait"],
        skipped=dict(Counter(map(_reason, filter(_was_skipped, events)))),
        outcome=last.get("outcome"),
        ended_by=last.get("ended_by"),
        form=last.get("form"),
    )


def _was_skipped(event: Values) -> bool:
    return event["event"] == "skip" or bool(event.get("non_finite"))


def _reason(event: Values) -> str:
    return event.get("reason", "score not finite")


def _no_run(folder: Path) -> UserError:
    near = (one for one in (folder.parent, *sorted(folder.glob("*"))) if (one / "events.jsonl").is_file())
    close = next(near, None)
    return UserError(
        f"{folder} holds no events.jsonl." if folder.is_dir() else f"there is no folder {folder}.",
        "a run writes there what it does, from its first stage on; nothing else tells how it stands.",
        f"did you mean {close}?" if close else "name the folder that the run was given by --output.",
    )


# --- as text ----------------------------------------------------------------------------------------------------------


def status_text(status: Status, name: str) -> str:
    """Return the status as plain text, at most 80 columns wide; `name` is what the run is called."""
    rows = [
        *_limit_rows(status.begin),
        *_progress_rows(status),
        *(_look_rows(status.looks[-1], status.begin) if status.looks else [("look", "none yet")]),
        *_count_rows(status),
        *_outcome_rows(status),
    ]
    table = "\n".join([f"{name}: {_task_words(status)}", *(_row_text(*row) for row in rows)])
    return f"{table}\n\n{status_plot(status)}" if status.looks else table


def _row_text(name: str, words: str) -> str:
    return textwrap.fill(f"{name:<{NAME_WIDTH}}{words}", WIDTH, subsequent_indent=" " * NAME_WIDTH)


def _task_words(status: Status) -> str:
    if not status.begin:
        return "its events do not say what was asked" if status.looks else "training has not begun"
    what = {"unlearn": "unlearning", "prune": "compression"}[status.begin["task"]]
    return f"{what}, {number_text(status.begin['parameters'])} parameters"


def _limit_rows(begin: Values) -> Iterable[Row]:
    """Give the goal and what may not be broken on the way, as far as the run has them."""
    if target := begin.get("target"):
        source = TARGET_SOURCES.get(target["source"], target["source"])
        yield "target", f"{_number(target['performance'])}, {source}; {_band_words(target)}"
    if begin.get("sparsity_goal") is not None:
        yield "goal", f"sparsity {_number(begin['sparsity_goal'])}"
    if floor := begin.get("min_retain_performance"):
        rows = f"{counted(begin['floor_rows'], 'row')} of {counted(begin['floor_facts'], 'fact')}"
        yield (
            "floor",
            f"retention >= {_number(floor)} on {rows}",
        )
    if "max_guard_loss_ratio" in begin:
        yield "guard", f"loss ratio <= {_number(begin['max_guard_loss_ratio'])}"
    if ceilings := begin.get("ceilings"):
        yield "ceilings", f"P of what is forgotten already <= {', '.join(map(_number, ceilings))}"


def _band_words(target: Values) -> str:
    return f"band {' .. '.join(band_texts(target))}"


def _progress_rows(status: Status) -> Iterable[Row]:
    start = f"the last of {status.starts} starts" if status.starts > 1 else "the start"
    if status.begin:
        yield "step", f"{status.step} of {status.begin['steps']}, {duration_text(status.seconds)} after {start}"
    written = f"{duration_text(status.age)} ago"
    yield "last line", f"{status.last_event}, written {written}" if status.last_event else f"none, begun {written}"


def _look_rows(look: Values, begin: Values) -> Iterable[Row]:
    yield "removed", f"{percent(look['sparsity'])} of the parameters"
    if "forget" in look:
        value, target = _interval_words(look, "forget"), begin.get("target")
        yield "P(forget)", f"{value}, {position(float(look['forget']), target)} the band" if target else value
    yield "retention", _interval_words(look, "retention")
    if "guard_loss_ratio" in look:
        yield "guard loss", f"{_number(look['guard_loss_ratio'])} times that of the original model"
    if already := look.get("already_forgotten"):
        yield "forgotten", f"P {', '.join(map(_number, already))} of earlier requests"
    for kind, kept in look.get("groups", {}).items():
        yield f"{kind}s", _kept_words(kept)


def _interval_words(look: Values, name: str) -> str:
    interval = look.get(f"{name}_interval")
    return _number(look[name]) + (f", 95 % interval {' .. '.join(map(_number, interval))}" if interval else "")


def _number(value: Any) -> str:
    return number_text(float(value))  # what is not finite stands in the file as text


def _kept_words(kept: Sequence[int] | int) -> str:
    """Return how many groups are kept; layer by layer where layers differ."""
    if isinstance(kept, int):  # the first runs wrote the sum alone
        return f"{number_text(kept)} kept"
    if len(set(kept)) == 1:
        return f"{number_text(sum(kept))} kept, {number_text(kept[0])} in each of {len(kept)} layers"
    return f"{number_text(sum(kept))} kept, by layer {' '.join(map(str, kept))}"


def _count_rows(status: Status) -> Iterable[Row]:
    """Give how many attempts were accepted, repaired and rolled back, with the limits that they broke."""
    repaired = [one for one in status.attempts if one.repaired]
    given_up = [one for one in status.attempts if not one.accepted]
    if status.begin:
        yield "accepted", f"{len(status.attempts) - len(given_up)}"
    if repaired:
        in_vain = sum(not one.accepted for one in repaired)
        broken = Counter(name for one in repaired for name in one.broken)
        yield "repairs", _counted(len(repaired), broken) + (f", {in_vain} in vain" if in_vain else "")
    if status.waits:
        yield "waited", _counted(len(status.waits), Counter(name for broken in status.waits for name in broken))
    if given_up:
        yield "rolled back", _counted(len(given_up), Counter(name for one in given_up for name in one.still_broken))
    if status.skipped:
        yield "skipped", _counted(sum(status.skipped.values()), status.skipped)


def _counted(number: int, parts: Mapping[str, int]) -> str:
    """Return a number and what it is made of; one attempt may break several limits."""
    return f"{number}" + (f" ({', '.join(f'{name} {count}' for name, count in parts.items())})" if parts else "")


def _outcome_rows(status: Status) -> Iterable[Row]:
    if status.outcome:
        yield "outcome", status.outcome
    if status.ended_by:
        yield "pruning end", ENDINGS.get(status.ended_by, status.ended_by)
    if status.form:
        yield "checkpoint", FORMS[status.form]


# --- as a plot --------------------------------------------------------------------------------------------------------


def status_plot(status: Status) -> str:
    """Return P(forget) and retention over the removed share; at least one look must be there."""
    goal = float(status.begin.get("sparsity_goal") or 0.0)
    right = max([goal, *(float(one["sparsity"]) for one in status.looks)]) or 0.01
    marks = {"F": "forget", "R": "retention"}
    curves = [Curve(mark, points) for mark, name in marks.items() if (points := _points(status.looks, name))]
    ticks = (percent(0.0), percent(right / 2), percent(right))
    lines = text_plot(curves, _bounds(status.begin), right, ticks, PLOT_WIDTH)
    key = f"F P(forget)   R retention   {BOTH} both" if len(curves) == 2 else "R retention"
    return "\n".join([f"{key}   over the removed share", *lines])


def _points(looks: Sequence[Values], name: str) -> list[tuple[float, float]]:
    return [(float(one["sparsity"]), float(one[name])) for one in looks if name in one]


def _bounds(begin: Values) -> list[Bound]:
    bounds = []
    if target := begin.get("target"):
        bounds.append(Bound(":", target["low"], target["high"], _band_words(target)))
    if floor := begin.get("min_retain_performance"):
        bounds.append(Bound("-", floor, floor, f"floor {floor:.2f}"))
    return bounds
