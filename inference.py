"""Inference: the plan's evaluation of forget and retain set apart, before and after where the original is given.

Reads    --base_model, --forget_dataset, --retain_dataset, --original_model and the settings of `loraprune evaluate`
Gives    tables on stdout and the plan's three metrics
Source   the unlearning plan, section 6
Symbols  P = performance, in [0, 1]
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraprune.cli import COMMANDS, GOAL_MET, exit_code
from loraprune.scripts import read, script_parser, settings_of

if TYPE_CHECKING:
    from loraprune.evaluation import Evaluation
    from loraprune.records import Interval


def evaluate(original_model: str = "", **values: Any) -> int:
    """Print each set's numbers, and what changed since the original model where there is one; return the exit code."""
    after = measured(values)
    show("the model", after)
    if original_model:
        before = measured({**values, "base_model": original_model})
        show("the original model", before)
        print("\n".join(changes(performances(before), performances(after))))
    return GOAL_MET


def measured(values: Mapping[str, Any]) -> "Evaluation":
    """Return the evaluation of the model on the sets that the values name, as `loraprune evaluate` makes it."""
    settings = settings_of(values, "evaluate")
    from loraprune.evaluation import evaluate as evaluate_settings

    return evaluate_settings(settings)


def show(title: str, evaluation: "Evaluation") -> None:
    """Print one model's numbers as a table under its title."""
    from rich.console import Console

    from loraprune.evaluation_table import show_evaluation

    console = Console()
    console.print(f"\n{title}")
    show_evaluation(evaluation.values, console)


Rows = Mapping[str, tuple[Sequence[float], Sequence[int]]]  # of each set: P of every row, and its fact


def performances(evaluation: "Evaluation") -> Rows:
    """Return P of every row of every set, and its fact."""
    return {name: (one.teacher_forced["probability"], one.encoded.facts) for name, one in evaluation.scored.items()}


def changes(before: Rows, after: Rows) -> list[str]:
    """Return the plan's metrics as lines: the drop on forget, the retention on retain, and their quotient."""
    from loraprune.interval import mean_interval, ratio_interval
    from loraprune.metrics import forget_drop, retention, unlearning_efficiency

    (known, facts), (left, _) = before["forget"], after["forget"]
    (had, kept_facts), (has, _) = before["retain"], after["retain"]
    drop, kept = forget_drop(mean(known), mean(left)), retention(mean(had), mean(has))
    drops = [forget_drop(*pair) for pair in zip(known, left, strict=True)]
    per_retain = unlearning_efficiency(drop, kept, None, None)["forget_per_retain"]
    of_drop, of_kept = said(mean_interval(drops, facts)), said(ratio_interval(has, had, kept_facts))
    return [
        f"performance drop on forget  {drop:8.4f}   {of_drop}P before - P after, {size(facts)}",
        f"retention on retain         {kept:8.4f}   {of_kept}P after / P before, {size(kept_facts)}",
        f"unlearning efficiency       {per_retain:8.4f}   drop / max(1 - retention, 0.01)",
        "Rows of the retain set that were trained on show less of a loss than rows that nothing was trained on.",
    ]


def size(facts: Sequence[int]) -> str:
    """Return on what a number stands: the rows given, and how many facts they are."""
    rows, different = len(facts), len(set(facts))
    return f"on the rows given: {rows:,} ({different:,} {'fact' if different == 1 else 'facts'})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def said(interval: "Interval | None") -> str:
    """Return a 95% interval as words in front of others; nothing where there is none."""
    return "" if interval is None else f"({interval[0]:.4f} to {interval[1]:.4f})  "


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
