"""Evaluation logs: what an evaluation wrote of every row, read and checked; no error holds a row's text.

Reads    a log of open-unlearning ({metric: {agg_value, value_by_index}}), or the first TOFU code's eval_log.json ..
Gives    EvaluationLog, read_log, log_of
Source   the files of TOFU, arXiv 2401.06121, and of open-unlearning, arXiv 2506.12618
Symbols  row: its number as the log writes it, counted from 0; n rows, k wrong answers a row
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from loraprune.errors import UserError
from loraprune.sources import PLAIN_NAME

Schema = Literal["open-unlearning", "tofu"]
LogRow = Mapping[str, Any]
Table = Mapping[str, LogRow]  # a metric's rows by number, or a task's

SIDES = ("forget", "holdout")  # of a membership attack
TOFU_TASKS = {
    "eval_log.json": "Retain",
    "eval_real_author_wo_options.json": "Real Authors",
    "eval_real_world_wo_options.json": "Real World",
    "eval_log_forget.json": "Forget",
}
TOFU_NUMBERS = ("avg_gt_loss", "rougeL_recall", "average_perturb_loss", "avg_paraphrased_loss")
NUMBERS = ("prob", "avg_loss", "score", "rouge1_recall", "rougeL_recall", "rougeL_f1", *TOFU_NUMBERS)
SHARES = ("prob", "rouge1_recall", "rougeL_recall", "rougeL_f1")  # in [0, 1], as are scores of these metrics:
SHARES_OF_TOKENS = ("exact_memorization", "extraction_strength")
SPARE = 1e-6  # by which rounding may carry a share past its ends
MAY_BE_NULL = "exact_memorization"  # open-unlearning writes null for an answer of no token, and leaves it out


@dataclass(frozen=True)
class EvaluationLog:
    """One log: its rows in tables, which metrics it names, and the aggregates that it states itself.

    A table is called as the metric it belongs to, as "mia_loss forget" and "mia_loss holdout" for the sides of an
    attack, or as the task's file in the first TOFU code.
    """

    path: Path
    schema: Schema
    names: tuple[str, ...]
    tables: Mapping[str, Table]
    stated: Mapping[str, float]

    def find(self, name: str) -> str | None:
        """Return the table of this name, upper and lower case alike, or None."""
        return next((one for one in self.tables if one.lower() == name.lower()), None)

    def numbers(self, table: str, column: str) -> NDArray[np.float64]:
        """Return a table's column, (n,) or (n, k); null is NaN where it may stand. Raises UserError, naming the row."""
        rows = self.tables[table]
        first = next(iter(rows.values())).get(column)
        length = len(first) if isinstance(first, list) else None
        values = [self._value(table, row, column, one.get(column), length) for row, one in rows.items()]
        return np.array(values, dtype=np.float64)

    def _value(self, table: str, row: str, column: str, value: Any, length: int | None) -> Any:
        many = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (length is not None) or len(many) != (length or 1):
            self.refuse_row(table, row, f"has {len(many)} values where the first row has {length or 1}")
        for one in many:
            if one is None and table == MAY_BE_NULL:
                return math.nan
            if isinstance(one, bool) or not isinstance(one, int | float):
                self.refuse_row(table, row, "has no number" if one is None else "holds something that is no number")
            if not math.isfinite(one):
                self.refuse_row(table, row, "is NaN" if math.isnan(one) else "is infinite")
            if _is_share(table, column) and not -SPARE <= one <= 1 + SPARE:
                self.refuse_row(table, row, f"has a {column} outside 0 to 1")
        return value

    def refuse_row(self, table: str, row: str, what: str) -> NoReturn:
        """Raise UserError about one row, named by table and number."""
        raise UserError(
            f"row {row} of {table} {what}, in {self.path}.",
            "an aggregate over such a row, or without it, would not be the one that the log's metric means.",
            "evaluate that model again, or take the row out of every metric of both logs.",
        )


def columns_of(rows: Table) -> tuple[str, ...]:
    """Return the columns that any row has: a row that lacks one is refused by number, whichever it is."""
    return tuple(dict.fromkeys(column for row in rows.values() for column in row))


def _is_share(table: str, column: str) -> bool:
    return column in SHARES or (column == "score" and table.lower() in SHARES_OF_TOKENS)


def read_log(source: str) -> EvaluationLog:
    """Return the log in a file of either schema, or in a folder of the first TOFU code's; every row is checked."""
    path = Path(source)
    return log_of(path, _read_folder(path) if path.is_dir() else _read_json(path))


def log_of(path: Path, content: Mapping[str, Any]) -> EvaluationLog:
    """Return the log that a file of this content is; every row is checked."""
    if path.name in TOFU_TASKS and "avg_gt_loss" in content:
        content = {path.name: content}
    is_tofu = any(task in content for task in TOFU_TASKS)
    log = _tofu(path, content) if is_tofu else _open_unlearning(path, content)
    if not log.tables or not all(log.tables.values()):
        raise _no_log(path, "it names metrics, but holds no values of single rows")
    for table, rows in log.tables.items():
        for column in columns_of(rows):
            if column in NUMBERS:
                log.numbers(table, column)
    return log


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the log {path} cannot be read: {error.strerror}.", "its rows are what is counted.", "correct the path."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _no_log(path, "it is not JSON") from None
    if not isinstance(content, dict):
        raise _no_log(path, "it is no JSON object")
    return content


def _read_folder(path: Path) -> Mapping[str, Any]:
    content = {task: _read_json(path / task) for task in TOFU_TASKS if (path / task).is_file()}
    if not content:
        raise _no_log(path, f"it is a folder without {', '.join(TOFU_TASKS)}")
    return content


def _no_log(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is no evaluation log: {what}.",
        "known are open-unlearning's {metric: {agg_value, value_by_index}} and the first TOFU code's eval_log.json, "
        "eval_log_forget.json, eval_real_author_wo_options.json, eval_real_world_wo_options.json.",
        "give the _EVAL.json (not the _SUMMARY.json), eval_log_aggregated.json, or the folder of the four files.",
    )


def _open_unlearning(path: Path, content: Mapping[str, Any]) -> EvaluationLog:
    tables: dict[str, Table] = {}
    stated: dict[str, float] = {}
    for name, metric in content.items():
        if not PLAIN_NAME.fullmatch(name) or not isinstance(metric, dict):
            shown = name if PLAIN_NAME.fullmatch(name) else "an entry without a plain name"
            raise _no_log(path, f"{shown} is no metric with values by row")
        sides = {f"{name} {side}": metric[side] for side in SIDES if isinstance(metric.get(side), dict)}
        for table, one in (sides or {name: metric}).items():
            if one.get("value_by_index"):
                tables[table] = _table(path, table, one["value_by_index"])
        stated |= {one: part["agg_value"] for one, part in {name: metric, **sides}.items() if _is_number(part)}
    _refuse_unequal(path, tables)
    return EvaluationLog(path, "open-unlearning", tuple(content), tables, stated)


def _is_number(metric: Mapping[str, Any]) -> bool:
    return isinstance(metric.get("agg_value"), int | float)


def _table(path: Path, table: str, values: Any) -> Table:
    rows = _by_row(path, table, values)
    if wrong := next((row for row, one in rows.items() if not isinstance(one, dict)), None):
        raise UserError(
            f"row {wrong} of {table} has no values, in {path}.",
            "an aggregate without it would not be that of the whole set.",
            "evaluate that model again, or take the row out of every metric of both logs.",
        )
    return rows


def _by_row(path: Path, name: str, values: Any) -> Mapping[str, Any]:
    """Return values by row number, in its order, from what logs write: an object with numbers as keys, or a list."""
    if isinstance(values, list):
        return {str(row): one for row, one in enumerate(values)}
    if not isinstance(values, dict) or not all(row.isdecimal() for row in values):
        raise _no_log(path, f"the rows of {name} are not numbered")
    return {row: values[row] for row in sorted(values, key=int)}


def _refuse_unequal(path: Path, tables: Mapping[str, Table]) -> None:
    """Raise UserError where two metrics of one set have not the same rows."""
    firsts: dict[str, str] = {}
    for table in tables:
        first = firsts.setdefault(_set_of(table), table)
        refuse_other_rows(tables[first], tables[table], f"{first} of {path}", f"{table} of {path}")


def _set_of(table: str) -> str:
    """Return which set a metric's rows are of: those of one set are counted against each other."""
    name = table.lower()
    if name.startswith("mia_"):
        return f"mia {name.split()[-1]}"
    if name in SHARES_OF_TOKENS:
        return "memorization"
    for part in ("_q_a_", "_truth_ratio"):
        if part in name:
            return name.split(part)[0]
    return table


def refuse_other_rows(ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str) -> None:
    """Raise UserError where two tables have not the same row numbers, naming the first that only one of them has."""
    if ours.keys() == theirs.keys():
        return
    row = next(iter([*(row for row in ours if row not in theirs), *(row for row in theirs if row not in ours)]))
    holder, other = (our_name, their_name) if row in ours else (their_name, our_name)
    raise UserError(
        f"row {row} stands in {holder} but not in {other}: {len(ours)} rows against {len(theirs)}.",
        "numbers of different rows are not of one split, and a comparison of them means nothing.",
        "give logs of the same split, of the same length.",
    )


def _tofu(path: Path, content: Mapping[str, Any]) -> EvaluationLog:
    tables = {task: _tofu_table(path, task, content[task]) for task in TOFU_TASKS if task in content}
    return EvaluationLog(path, "tofu", tuple(tables), tables, {})


def _tofu_table(path: Path, task: str, columns: Any) -> Table:
    """Return a task's columns, each by row, as rows."""
    if not isinstance(columns, dict) or not columns.get("avg_gt_loss"):
        raise _no_log(path, f"{task} has no avg_gt_loss")
    kept = {name: values for name, values in columns.items() if PLAIN_NAME.fullmatch(name)}
    by_row = {
        name: _by_row(path, f"{name} of {task}", one) for name, one in kept.items() if isinstance(one, list | dict)
    }
    first = by_row.get("avg_gt_loss", {})
    for name, values in by_row.items():
        refuse_other_rows(first, values, f"avg_gt_loss of {task} of {path}", f"{name} of {task} of {path}")
    return {row: {name: values[row] for name, values in by_row.items()} for row in first}
