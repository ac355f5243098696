"""Words: numbers and outcomes as a person reads them.

Reads    values of metrics.json and events.jsonl
Gives    FORMS, number_text, percent, duration_text, apart, band_texts, position, outcome_text, TARGET_SOURCES, ENDINGS
Source   -
Symbols  P = performance
"""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

TARGET_SOURCES = {
    "reference": "P(forget) of the reference model",
    "holdout": "P(holdout) of the untouched model",
    "forget_target": "set by hand",
    "tenth": "a tenth of P(forget) of the untouched model",
}
FORMS = {
    "stock": "stock, the same widths in every layer",
    "per_layer": "per layer, each layer with its own widths and the modelling code in the folder",
}
ENDINGS = {
    "budget": "all pruning steps were taken",
    "no_candidates": "no group was left that may go",
    "target": "P(forget) had come down to the band",
    "floor": "the next step would have broken the floor",
    "guard": "the next step would have cost more on the guard text than is allowed",
    "ceiling": "the next step would have brought back what an earlier request removed",
    "band": "the next step would have pushed P(forget) below the band",
    "room": "the next step would have taken more than half of the room above the floor, which forgetting needs",
}
BROKEN = {
    "floor": "retention fell below the floor",
    "guard": "the loss on the guard text grew too much",
    "ceiling": "what an earlier request removed came back",
    "room": "a cut would have taken more than half of the room above the floor, which forgetting needs",
}


def number_text(value: float | int | None) -> str:
    """Return a whole number in full, another to three decimals, one below 0.01 to two digits; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def counted(number: int, noun: str) -> str:
    """Return a number of things, as "1 row" or "57 rows"."""
    return f"{number_text(number)} {noun}{'' if number == 1 else 's'}"


def percent(value: float, sign: str = "-") -> str:
    """Return a part of one in per cent; sign "+" also marks what is positive."""
    return f"{100 * value:{sign}.1f} %"


def duration_text(seconds: float) -> str:
    """Return a duration as a person says it: "41 s", "3 min 12 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def apart(*values: float) -> list[str]:
    """Return the values with the fewest decimals, two or more, at which those that differ look different."""
    for digits in range(2, 6):
        texts = [f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [f"{value:g}" for value in values]


def band_texts(target: Values) -> tuple[str, str]:
    low, high = apart(max(target["low"], 0.0), target["high"])
    return low, high


def position(performance: float, target: Values) -> str:
    """Return where P(forget) stands to the target's band: "below", "above" or "inside"; "outside" where it is NaN."""
    if target["low"] <= performance <= target["high"]:
        return "inside"
    return "below" if performance < target["low"] else "above" if performance > target["high"] else "outside"


def outcome_text(metrics: Values) -> str:
    """Return what ended the run and why, as "target_reached: P(forget) 0.47 is inside 0.36 .. 0.60"."""
    breaks = metrics.get("breaks", {})
    reasons = {
        "target_reached": [],
        "budget_spent": [_budget_words(metrics)],
        "no_candidates": [_left_words(metrics)],
        "floor_reached": [_floor_words(metrics), *_broken_words(breaks)],
    }[metrics["outcome"]]
    if metrics.get("target") and metrics.get("forget"):
        reasons = [*reasons, _position_words(metrics["forget"]["after"]["performance"], metrics["target"])]
    return f"{metrics['outcome']}: {'; '.join(reasons)}" if reasons else metrics["outcome"]


def _budget_words(metrics: Values) -> str:
    sparsity = number_text(metrics["sparsity"])
    if metrics.get("sparsity_goal") is None and metrics.get("task") == "unlearn":
        return f"all pruning steps are taken, sparsity {sparsity}"
    return f"sparsity {sparsity} is all that was to be removed"


def _left_words(metrics: Values) -> str:
    sparsity = number_text(metrics["sparsity"])
    if metrics.get("breaks", {}).get("band"):
        return f"at sparsity {sparsity} no step is left that keeps P(forget) above the band's lower end"
    return f"no group is left that may go, at sparsity {sparsity}"


def _broken_words(breaks: Mapping[str, int]) -> list[str]:
    """Return how often the run met each limit that held it back."""
    return [
        f"{words} {breaks[name]} time{'s' if breaks[name] > 1 else ''}"
        for name, words in BROKEN.items()
        if breaks.get(name)
    ]


def _position_words(performance: float, target: Values) -> str:
    low, high = max(target["low"], 0.0), target["high"]
    value_words, low_words, high_words = apart(performance, low, high)
    return f"P(forget) {value_words} is {position(performance, target)} {low_words} .. {high_words}"


def _floor_words(metrics: Values) -> str:
    floor = metrics["floor"]
    if floor.get("retention") is None:
        return f"the floor of retention is {number_text(floor['min_retain_performance'])}"
    kept, least = apart(floor["retention"], floor["min_retain_performance"])
    if not floor["held"]:
        return f"retention on the floor rows is {kept}, below the floor {least}"
    if not floor.get("final_held", True):
        final, least = apart(metrics["retention"], floor["min_retain_performance"])
        return f"retention on the final rows, which steered nothing, is {final}, below the floor {least}"
    further = f"a further step would break the floor {least}; " if metrics.get("ended_by") == "floor" else ""
    return f"{further}retention on the floor rows is {kept}"
