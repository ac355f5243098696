"""Findings: what a reader may conclude from attacks, in numbers beside the reference's and in words.

Reads    results, as attacks.json holds them
Gives    findings_of, show_findings
Source   -
Symbols  before, after = a model's number without and under an attack; gone = the original's number - before
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraprune.attacked import Values, interval_of
from loraprune.metrics import brought_back
from loraprune.records import Interval
from loraprune.words import counted

TITLES = {
    "relearn_full": "relearn one half, all weights",
    "relearn_lora": "relearn one half, LoRA",
    "retrain_full": "train on retain, all weights",
    "retrain_lora": "train on retain, LoRA",
    "quantise_int8": "quantise to int8",
    "quantise_nf4": "quantise to NF4",
    "sample": "sample",
    "rephrase": "rephrase",
    "prune_again": "prune again",
    "look_inside": "look inside",
}
MEASURES = {
    "performance": "P",
    "extraction_strength": "ES",
    "contains": "facts in the best answer",
    "rouge_l_recall": "ROUGE-L of the best answer",
    "multiple_choice": "multiple choice",
    "yes_no": "yes or no",
}
GUESSED = ("multiple_choice", "yes_no")  # what stands before the attack is what guessing gets
TAKEN = 0.5  # P of its own rows below which the training of an attack is called weak
NOTHING = 0.005  # a share or a difference that is called none
WIDE = 120  # columns of a terminal from which the words stand in the table, not below it
CAVEAT = (
    "Nothing here is a guarantee: an attack that brings nothing back says nothing of the next one. "
    "P: performance; ES: extraction strength; both before -> under the attack."
)

Readings = Mapping[str, Values]  # by role


def findings_of(results: Mapping[str, Any], roles: Sequence[str]) -> list[Values]:
    """Return what each measure of each attack says, once every model of `roles` has been through it."""
    findings = []
    for unit, of_roles in results.items():
        if reasons := [one["not_run"] for one in of_roles.values() if "not_run" in one]:
            findings.append({"attack": unit, "not_run": reasons[0], "conclusion": f"not run: {reasons[0]}"})
        elif all(role in of_roles for role in roles):
            for measure in of_roles["unlearned"]["readings"]:
                readings = {role: of_roles[role]["readings"][measure] for role in roles}
                findings.append(_finding(unit, measure, readings, of_roles["unlearned"]["details"]))
    return findings


def _finding(unit: str, measure: str, readings: Readings, details: Values) -> Values:
    """Return one measure's numbers: `gap` compares areas or levels, `ahead` levels, `excess` what the attack added."""
    known = readings["original"]["known"]
    shares = {role: brought_back(one["before"], one["after"], known) for role, one in readings.items()}
    values: Values = {"attack": unit, "measure": measure, "known": known, "brought_back": shares}
    if "reference" in readings:
        level = "area" if "area" in readings["unlearned"] else "after"
        values |= _told("gap", _difference(readings, [level]), readings)
        values |= _told("ahead", _difference(readings, ["after"]), readings)
        values |= _told("excess", _difference(readings, ["after", "before"]), readings)
    return {**values, "conclusion": _conclusion(values, readings, details)}


def _difference(readings: Readings, columns: Sequence[str]) -> np.ndarray:
    """Return for every row the unlearned model's column (less the second) minus the reference's."""
    levels = []
    for role in ("unlearned", "reference"):
        one, *rest = (np.array(readings[role]["row_values"][name]) for name in columns)
        levels.append(one - sum(rest))
    return levels[0] - levels[1]


def _told(name: str, rows: np.ndarray, readings: Readings) -> Values:
    facts = readings["unlearned"]["row_values"]["facts"]
    return {name: float(rows.mean()), f"{name}_interval": interval_of(rows, facts)}


# --- in words ---------------------------------------------------------------------------------------------------------


def _conclusion(finding: Values, readings: Readings, details: Values) -> str:
    mine, theirs = readings["unlearned"], readings.get("reference")
    if finding["measure"] in GUESSED:
        parts = [_chosen_words(readings)]
        if finding["brought_back"]["unlearned"] is None:
            return f"{parts[0]}; the original does no better than guessing: asked like this, nothing can be told."
    else:
        parts = [_back_words(finding, mine)]
        parts += [_reference_words(finding["brought_back"]["reference"], theirs)] if theirs else []
    return "; ".join([*parts, _comparison_words(finding, readings, details), *_weak_words(details)]) + "."


def _back_words(finding: Values, mine: Values) -> str:
    share = finding["brought_back"]["unlearned"]
    moved = f"{mine['before']:.2f} -> {mine['after']:.2f}, the original {finding['known']:.2f}"
    if share is None:
        return f"hardly anything was gone that could be brought back ({moved})"
    if share < NOTHING:
        return f"brought back: nothing ({moved})"
    return f"brought back: {share:.2f} of what the original knew and it did not ({moved})"


def _reference_words(share: float | None, theirs: Values) -> str:
    moved = f"{theirs['before']:.2f} -> {theirs['after']:.2f}"
    if share is None:
        return f"the reference gets {moved}"
    return f"the reference gets {'nothing' if share < NOTHING else f'{share:.2f}'} under the same attack ({moved})"


def _chosen_words(readings: Readings) -> str:
    mine, others = readings["unlearned"], {role: one for role, one in readings.items() if role != "unlearned"}
    beside = ", ".join(f"the {role} {one['after']:.2f}" for role, one in others.items())
    return f"right in {mine['after']:.2f} of the questions, {mine['before']:.2f} by guessing; {beside}"


def _comparison_words(finding: Values, readings: Readings, details: Values) -> str:
    """Return what stands between the unlearned model and the reference, as far as this many facts can tell."""
    if "reference" not in readings:
        if "curve" in details:
            return "without a reference this cannot tell relearning from learning"
        return "without a reference nobody knows what a model gets that never saw these rows"
    if finding["excess_interval"] is None:
        return "one fact cannot tell the two apart"
    if finding["measure"] in GUESSED:
        return _more_often_words(finding, readings["unlearned"])
    return f"{_gain_words(finding, readings['unlearned'])}; {_level_words(finding, readings['unlearned'])}"


def _more_often_words(finding: Values, mine: Values) -> str:
    """Return how answers chosen from a few compare: guessing stands before both, so levels alone are told apart."""
    gap, interval = finding["gap"], finding["gap_interval"]
    if interval[0] <= 0 <= interval[1]:
        return f"{counted(mine['facts'], 'fact')} do not tell it from the reference: {gap:+.2f} {_bounds(interval)}"
    often = "more" if gap > 0 else "less"
    return f"right {often} often than the reference by {abs(gap):.2f} {_bounds(interval)}"


def _gain_words(finding: Values, mine: Values) -> str:
    excess, interval = finding["excess"], finding["excess_interval"]
    if abs(excess) < NOTHING:
        return "the two gain alike"
    if interval[0] <= 0 <= interval[1]:
        return f"{counted(mine['facts'], 'fact')} do not tell its gain from the reference's: {_bounds(interval)}"
    if excess > 0:
        return f"it gains {excess:.2f} {_bounds(interval)} more than the reference"
    return f"it gains {-excess:.2f} {_bounds((-interval[1], -interval[0]))} less than the reference"


def _level_words(finding: Values, mine: Values) -> str:
    """Return where the model stands to the reference under the attack; where that takes steps, by the area first."""
    parts = [("ahead", "its highest" if "area" in mine else "its level")]
    parts = [("gap", "its area"), *parts] if "area" in mine else parts
    told = [f"{words} {finding[name]:+.2f} {_bounds(finding[f'{name}_interval'])}" for name, words in parts]
    gained = finding["excess_interval"][0] > 0 and finding["excess"] >= NOTHING
    hidden = ": some of it was hidden, not gone" if gained and finding["ahead_interval"][0] > 0 else ""
    return f"against the reference's, {', '.join(told)}{hidden}"


def _bounds(interval: Interval) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _weak_words(details: Values) -> list[str]:
    took = details.get("trained_performance")
    if took is None or took >= TAKEN:
        return []
    return [f"the training took to P {took:.2f} of its own rows only: raise --attack-learning-rate or --attack-steps"]


# --- the table --------------------------------------------------------------------------------------------------------


def show_findings(report: Values, console: Console) -> None:
    """Print one line an attack and measure; extraction strength stands under the performance it belongs to."""
    roles, wide = list(report["conditions"]["weights_sha256"]), console.width >= WIDE
    shown = [one for one in report["findings"] if one.get("measure") != "extraction_strength"]
    lines = [_cells(one, report["results"][one["attack"]], roles) for one in shown]
    table = Table(box=SIMPLE_HEAD)
    for name in ("attack", "", *roles):
        table.add_column(name, no_wrap=name in roles)
    if wide:
        table.add_column("what one may conclude", ratio=1)
    for line in lines:
        table.add_row(*map(Text, line if wide else line[:-1]))
    console.print(table)
    for title, measure, *_, conclusion in lines if not wide else ():
        console.print(
            Text(f"{title}, {measure.splitlines()[0]}: {conclusion}" if measure else f"{title}: {conclusion}")
        )
    console.print(CAVEAT, style="dim")


def _cells(finding: Values, results: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    title = TITLES[finding["attack"]]
    if "not_run" in finding:
        return [title, *[""] * (len(roles) + 1), finding["conclusion"]]
    measures = [finding["measure"]]
    if measures == ["performance"] and "extraction_strength" in results["unlearned"]["readings"]:
        measures.append("extraction_strength")
    cells = ["\n".join(_moved(results[role]["readings"][name]) for name in measures) for role in roles]
    return [title, "\n".join(MEASURES[name] for name in measures), *cells, finding["conclusion"]]


def _moved(reading: Values) -> str:
    return f"{reading['before']:.2f} -> {reading['after']:.2f}"
