"""Evidence: what the benches report of a run's three models, by the field's metrics and under all attacks.

Reads    a finished run of `unlearn` with a reference; what was measured before is kept in bench/cache/evaluations
Gives    evidence, and evidence_section for docs/results.md
Source   loraprune.evidence and loraprune.attack, whose numbers these are
Symbols  cells of metrics: value (95% interval); cells of attacks: before -> under the attack
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results_page import ROOT, markdown_table

from loraprune.attack import attack_run
from loraprune.attack_findings import MEASURES, TITLES
from loraprune.evidence import ROLES, measure_models, metric_rows

CACHE = ROOT / "bench" / "cache" / "evaluations"
Values = dict[str, Any]


def evidence(folder: Path, **attack_settings: Any) -> Values:
    """Return what the three models know by every metric, and what every attack brings back of it."""
    metrics, report = measure_models(folder, str(CACHE)), attack_run(folder, attack_settings)
    return {"metrics": metrics, "findings": report["findings"], "readings": _readings(report["results"])}


def _readings(results: Values) -> Values:
    """Return the attacks' numbers without those of single rows."""
    return {
        unit: {role: _without_rows(one.get("readings", {})) for role, one in of_roles.items()}
        for unit, of_roles in results.items()
    }


def _without_rows(readings: Mapping[str, Any]) -> Values:
    return {
        measure: {name: value for name, value in one.items() if name != "row_values"}
        for measure, one in readings.items()
    }


def evidence_section(values: Values) -> str:
    """Return both tables; the last column of the attacks says in words what a reader may conclude."""
    metrics = markdown_table(["metric", *ROLES], list(metric_rows(values["metrics"])))
    attacks = markdown_table(["attack", "of", *ROLES, "what one may conclude"], list(_attack_rows(values)))
    return f"{metrics}\n\n{attacks}"


def _attack_rows(values: Values) -> Iterator[list[str]]:
    for one in values["findings"]:
        title = TITLES[one["attack"]]
        if "not_run" in one:
            yield [title, *[""] * (len(ROLES) + 1), one["conclusion"]]
        else:
            of_roles = values["readings"][one["attack"]]
            readings = [of_roles[role][one["measure"]] for role in ROLES]
            moved = (f"{reading['before']:.2f} -> {reading['after']:.2f}" for reading in readings)
            yield [title, MEASURES[one["measure"]], *moved, one["conclusion"]]
