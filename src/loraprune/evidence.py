"""Evidence: original, reference and unlearned model of a run side by side, by the metrics of the field.

Reads    the folder of a finished run of `unlearn` with a reference
Gives    measure_models, metric_rows, evidence_table
Source   evaluation.py, whose numbers these are
Symbols  a cell = value (95% interval), or what is missing
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loraprune.evaluation import evaluate_files
from loraprune.evaluation_table import cell
from loraprune.settings_file import settings_from

ROLES = ("original", "reference", "unlearned")
# What is to be trusted first stands first.
OF_SETS = {
    "extraction_strength": "extraction strength",
    "probability": "P",
    "truth_ratio": "truth ratio",
    "rougeL_recall": "ROUGE-L recall",
}
SETS = ("forget", "retain", "bystander")
Values = Mapping[str, Any]


def measure_models(folder: Path, cache: str) -> dict[str, Values]:
    """Return what `evaluate_files` gives of each of the run's three models; `cache` as the setting of that name."""
    begun = settings_from(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    if begun.reference is None:
        raise ValueError("without a reference there are two models, and nothing to compare the second with")
    names = (begun.model, begun.reference, str(folder / "model"))
    return {
        role: evaluate_files(replace(begun, model=name, cache=cache)) for role, name in zip(ROLES, names, strict=True)
    }


def metric_rows(measured: Mapping[str, Values]) -> Iterator[list[str]]:
    """Give the lines of a table: a metric's name and its cell under each of ROLES."""
    for name in SETS:
        for metric, words in OF_SETS.items():
            if all(name in one for one in measured.values()):
                yield [f"{words}, {name}", *(_cell(measured[role][name]["metrics"][metric]) for role in ROLES)]
    of_model = [measured[role]["model"] for role in ROLES]
    yield ["forget quality, p", *(_cell(one["forget_quality"]) for one in of_model)]
    yield ["min-k AUC, forget against holdout", *(_cell(one["membership"]["min_k"]) for one in of_model)]
    yield ["privleak, %", *(_cell(one["privleak"]) for one in of_model)]


def _cell(entry: Values) -> str:
    return cell(entry) or f"not measured: {entry['missing']}"


def evidence_table(measured: Mapping[str, Values]) -> Table:
    """Return the three models' numbers as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("metric", *ROLES):
        table.add_column(name)
    for row in metric_rows(measured):
        table.add_row(*map(Text, row))
    return table
