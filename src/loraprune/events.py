"""Events: what a run wrote down step by step, read back.

Reads    events.jsonl
Gives    read_events, has_look, Attempt, attempts
Source   -
Symbols  a limit is what an accepted step may not break: floor, guard, band, ceiling
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from loraprune.words import Values


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events, none where there is no file; a line that was cut short when a run was killed is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def has_look(event: Values, kinds: Collection[str]) -> bool:
    """Return whether an event is of one of these kinds and tells how the model stood."""
    return event["event"] in kinds and {"sparsity", "retention"} <= event.keys()


@dataclass(frozen=True)
class Attempt:
    """One state that was tried: whether it was accepted, and what stood in its way."""

    step: int
    accepted: bool
    repaired: bool  # a repair was tried
    broken: tuple[str, ...]  # limits, as it was proposed
    still_broken: tuple[str, ...]  # limits, after the repair where there was one
    retention: float | None  # as it was proposed, or when it was given up; None where it was not finite


def attempts(events: Iterable[Values]) -> list[Attempt]:
    """Return every attempt that came to its end, in order.

    A state is tried where it is proposed, or where it is looked at during recovery and then rolled back.
    """
    ended: list[Attempt] = []
    tried: Values = {}
    repair: Values | None = None
    for event in events:
        match event["event"]:
            case "begin" | "propose" | "evaluate":
                tried, repair = event, None
            case "recover":
                repair = event
            case "accept" | "roll_back":
                ended.append(_attempt(tried, repair, event))
                tried, repair = {}, None
    return ended


def _attempt(tried: Values, repair: Values | None, end: Values) -> Attempt:
    accepted = end["event"] == "accept"
    shown = tried if accepted or repair is None else repair
    retention = float(shown.get("retention", "nan"))
    return Attempt(
        end["step"],
        accepted,
        repair is not None,
        tuple(tried.get("broken", ())),
        tuple(end.get("broken", ())),
        retention if isfinite(retention) else None,
    )
