"""Log table: the aggregates of an evaluation log, as a table or as JSON.

Reads    what log_aggregates.py counted
Gives    show_aggregates
Source   -
Symbols  -
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraprune.evaluation_log import SIDES

Entries = Mapping[str, Mapping[str, Any]]


def show_aggregates(found: Entries, *, as_json: bool) -> None:
    """Print aggregates on stdout: one line each with rows, interval and what is missing, or JSON alone."""
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        Console().print(aggregates_table(found))


def aggregates_table(found: Entries) -> Table:
    """Return one line an aggregate, and one a side of an attack."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for name in ("value", "rows", "95% interval"):
        table.add_column(name, justify="right")
    table.add_column("to know")
    for name, entry in _lines(found):
        table.add_row(Text(name), *(Text(one) for one in _cells(entry)))
    return table


def _lines(found: Entries) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in found.items():
        yield name, entry
        yield from ((f"  {side}", entry[side]) for side in SIDES if side in entry)


def _cells(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    interval = entry.get("interval")
    between = "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"
    return _number(entry["agg_value"]), str(entry.get("rows", "")), between, _notes(entry)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _notes(entry: Mapping[str, Any]) -> str:
    notes = [entry[name] for name in ("missing", "note", "rouge_type") if name in entry]
    if "left_out" in entry:
        notes.append(f"{entry['left_out']} rows without a value left out")
    if "log_says" in entry:
        notes.append(f"the log says {_number(entry['log_says'])}")
    return "; ".join(notes)
