"""Evaluation table: an evaluation's numbers for the terminal, and in sentences what could not be measured.

Reads    what `evaluate_files` gives
Gives    evaluation_table, missing_lines, show_evaluation; cell
Source   -
Symbols  a cell = value (95% interval); where a metric stands on fewer rows than its set has, they are named
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraprune.words import number_text

Entry = Mapping[str, Any]
Results = Mapping[str, Any]

# What is to be trusted first stands first.
OF_SETS = {
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "probability": "probability P",
    "exact_match": "exact match",
    "fact_performance": "fact performance",
    "loss": "loss, nats a token",
    "truth_ratio": "truth ratio",
    "probability_with_options": "probability with options",
    "rougeL_recall": "ROUGE-L recall",
    "rougeL_f1": "ROUGE-L F1",
    "rouge1_recall": "ROUGE-1 recall",
    "rouge1_f1": "ROUGE-1 F1",
}
OF_FORGET = {"forget_quality": "forget quality, p", "privleak": "privleak, %"}
ATTACKS = {
    "loss": "loss",
    "zlib": "zlib",
    "min_k": "min-k",
    "min_k_plus_plus": "min-k++",
    "reference": "reference",
    "gradient_norm": "gradient norm",
}


def show_evaluation(results: Results, console: Console) -> None:
    """Print the table, and below it what is not in it and why."""
    console.print(evaluation_table(results))
    for line in missing_lines(results):
        console.print(Text(line))


def evaluation_table(results: Results) -> Table:
    """Return one line a metric and one column a set; what no set has is left out of the table."""
    sets = {name: one for name, one in results.items() if name != "model"}
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric")
    for name in sets:
        table.add_column(Text("forget, reference" if name == "reference" else name), justify="right")
    table.add_row("rows (facts)", *(f"{one['rows']:,} ({one['facts']:,})" for one in sets.values()), end_section=True)
    for name, words in OF_SETS.items():
        _add(table, words, [cell(one["metrics"].get(name, {}), one["rows"]) for one in sets.values()])
    for name, words, entry, rows in _model_lines(results):
        _add(table, words, [cell(entry, rows) if one == name else "" for one in sets])
    return table


def _model_lines(results: Results) -> Iterator[tuple[str, str, Entry, int]]:
    """Give what is said of the model: the set under which it stands, words, entry and that set's rows."""
    model, rows = results["model"], {name: one["rows"] for name, one in results.items() if name != "model"}
    for name, words in OF_FORGET.items():
        yield "forget", words, model[name], rows.get("forget", 0)
    for name, words in ATTACKS.items():
        yield "forget", f"membership AUC, {words}", model["membership"][name], rows.get("forget", 0)
    perplexity = model["perplexity"]
    context = f", context {perplexity['context']}" if "context" in perplexity else ""
    yield "guard", f"perplexity{context}", perplexity, rows.get("guard", 0)


def _add(table: Table, words: str, cells: list[str]) -> None:
    if any(cells):
        table.add_row(words, *cells)


def cell(entry: Entry, rows: int | None = None) -> str:
    """Return the value with its interval, and on how many rows it stands where these are not `rows`; "" for none."""
    if "value" not in entry:
        return ""
    told = [" to ".join(map(number_text, entry["interval"]))] if "interval" in entry else []
    if rows is not None and (stood := entry.get("rows", entry.get("members", rows))) != rows:
        told.append(f"{stood:,} rows")
    return f"{number_text(entry['value'])}{' (' + '; '.join(told) + ')' if told else ''}"


def missing_lines(results: Results) -> list[str]:
    """Return a sentence for everything that could not be measured, metrics with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for name, one in results.items():
        if name != "model":
            for metric, words in OF_SETS.items():
                if why := one["metrics"].get(metric, {}).get("missing"):
                    reasons.setdefault(why, []).append(f"{words} of {_said(name)}")
    for _, words, entry, _ in _model_lines(results):
        if why := entry.get("missing"):
            reasons.setdefault(why, []).append(words)
    return [f"not measured: {'; '.join(what)}. Why: {why}." for why, what in reasons.items()]


def _said(name: str) -> str:
    return "forget under the reference" if name == "reference" else name
