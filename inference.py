"""Inference: the plan's evaluation of forget and retain set apart, before and after where the original is given.

Reads    --base_model, --forget_dataset, --retain_dataset, --original_model and the settings of `loraprune evaluate`
Gives    tables on stdout and the plan's three metrics
Source   the unlearning plan, section 6
Symbols  P = performance, in [0, 1]
"""

import sys
from collections.abc import Mapping
from typing import Any

from loraprune.cli import COMMANDS, GOAL_MET, exit_code
from loraprune.metrics import forget_drop, retention, unlearning_efficiency
from loraprune.scripts import read, script_parser, settings_of

Results = Mapping[str, Mapping[str, Any]]


def evaluate(original_model: str = "", **values: Any) -> int:
    """Print each set's numbers, and what changed since the original model where there is one; return the exit code."""
    after = measured(values)
    show("the model", after)
    if original_model:
        before = measured({**values, "base_model": original_model})
        show("the original model", before)
        print("\n".join(changes(before, after)))
    return GOAL_MET


def measured(values: Mapping[str, Any]) -> Results:
    """Return every set's numbers for the model and the sets that the values name."""
    settings = settings_of(values, "evaluate")
    from loraprune.evaluate import evaluate_files

    return evaluate_files(settings)


def show(title: str, results: Results) -> None:
    """Print one model's numbers as a table under its title."""
    from rich.console import Console

    from loraprune.report import evaluation_table

    console = Console()
    console.print(f"\n{title}")
    console.print(evaluation_table(results))


def changes(before: Results, after: Results) -> list[str]:
    """Return the plan's metrics as lines: the drop on forget, the retention on retain, and their quotient."""
    drop = forget_drop(before["forget"]["performance"], after["forget"]["performance"])
    kept = retention(before["retain"]["performance"], after["retain"]["performance"])
    per_retain = unlearning_efficiency(drop, kept, None, None)["forget_per_retain"]
    return [
        f"performance drop on forget  {drop:8.4f}   P before - P after",
        f"retention on retain         {kept:8.4f}   P after / P before",
        f"unlearning efficiency       {per_retain:8.4f}   drop / max(1 - retention, 0.01)",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code; None takes the process's own arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: _call(given), debug="--debug" in given)


def _call(arguments: list[str]) -> int:
    text = "Measure a model on the forget set and the retain set."
    parser = script_parser("inference.py", text, COMMANDS["evaluate"].settings)
    parser.add_argument("--original_model", default="", help="The model before unlearning; adds what changed.")
    return evaluate(**read(parser, arguments))


if __name__ == "__main__":
    raise SystemExit(main())
