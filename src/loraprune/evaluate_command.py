"""Evaluate command: what `loraprune evaluate` does with its arguments: sets of rows, a log, or a benchmark.

Reads    checked settings and the arguments that are no settings
Gives    OPTIONS, NEEDS, evaluate
Source   -
Symbols  -
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from loraprune.errors import UserError
from loraprune.setting import flag
from loraprune.settings import Settings

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--from-log": {
        "metavar": "LOG.json",
        "help": "Count every aggregate of an evaluation log again from the values of its rows; the log is "
        "open-unlearning's or the first TOFU code's (a file, or the folder of its four). Needs neither MODEL nor data.",
    },
    "--reference-log": {
        "metavar": "RETAIN.json",
        "help": "With --from-log or --benchmark: the log of a model trained without the forget set, for forget quality "
        "and privleak.",
    },
    "--benchmark": {
        "metavar": "SUITE:SPLIT",
        "help": "Run a suite instead: tofu:forget10 (or forget01, forget05), muse:news (or books), or lm-eval:TASK,... "
        "such as lm-eval:wmdp,mmlu.",
    },
    "--data": {
        "metavar": "DIR",
        "help": "With --benchmark: the folder of the suite's files or its hub data set; for lm-eval, of more tasks.",
    },
    "--output": {
        "metavar": "DIR",
        "help": "With --benchmark: the folder that gets the suite's log, such as TOFU_EVAL.json and TOFU_SUMMARY.json. "
        "The first holds questions, right answers and what the model wrote, in clear.",
    },
}
NEEDS: Mapping[str, tuple[str, ...]] = {"from_log": (), "benchmark": ("model",)}  # instead of MODEL, forget and retain
SETS_OWN = ("forget", "retain", "holdout", "bystander", "guard", "columns")  # a suite reads its own files
HARNESS_OWN = ("compat", "rouge_rows", "reference", "template")  # lm-eval asks and scores in its own way
ONLY_WITH = {"reference_log": ("from_log", "benchmark"), "data": ("benchmark",), "output": ("benchmark",)}


def evaluate(settings: Settings, options: Namespace, given: Sequence[str]) -> None:
    """Print what was asked for; `given` are the settings of the command line as they are written."""
    _refuse_idle(options, given)
    if options.from_log is not None:
        _show_log(options, given)
    elif options.benchmark is not None:
        _show_benchmark(settings, options)
    else:
        _show_sets(settings, as_json=options.json)


def _refuse_idle(options: Namespace, given: Sequence[str]) -> None:
    """Raise UserError for an argument that would be ignored."""
    if options.from_log is not None and options.benchmark is not None:
        raise UserError("--from-log is given with --benchmark.", "the one measures, the other counts.", "give one.")
    for name, with_one in ONLY_WITH.items():
        if getattr(options, name) is not None and not any(getattr(options, one) is not None for one in with_one):
            needed = " or ".join(flag(one) for one in with_one)
            raise UserError(
                f"{flag(name)} is given without {needed}.",
                "it would be ignored.",
                f"add {needed}, or leave {flag(name)} out.",
            )
    if options.benchmark is not None:
        _refuse_idle_in_benchmark(options, given)


def _refuse_idle_in_benchmark(options: Namespace, given: Sequence[str]) -> None:
    """Raise UserError for a setting that says which rows are measured, or how, where the suite itself does."""
    is_harness = options.benchmark.partition(":")[0] == "lm-eval"
    idle = [name for name in (*SETS_OWN, *(HARNESS_OWN if is_harness else ())) if flag(name) in given]
    if is_harness and options.reference_log is not None:
        idle.append("reference_log")
    if idle:
        raise UserError(
            f"{', '.join(map(flag, idle))} {'is' if len(idle) == 1 else 'are'} given with "
            f"--benchmark {options.benchmark}.",
            "the suite has rows and metrics of its own, and this would be ignored.",
            f"leave {'it' if len(idle) == 1 else 'these'} out, or --benchmark.",
        )


def _show_log(options: Namespace, given: Sequence[str]) -> None:
    from loraprune.evaluation_log import read_log
    from loraprune.log_aggregates import aggregates
    from loraprune.log_table import show_aggregates

    if given:
        raise UserError(
            f"--from-log is given with {', '.join(given)}.",
            "a log is counted as it is: no model is asked, and a setting would be ignored.",
            "leave these out, or --from-log.",
        )
    reference = None if options.reference_log is None else read_log(options.reference_log)
    show_aggregates(aggregates(read_log(options.from_log), reference), as_json=options.json)


def _show_benchmark(settings: Settings, options: Namespace) -> None:
    from loraprune.benchmark import read_request, run_benchmark
    from loraprune.log_table import show_aggregates

    request = read_request(options.benchmark, options.data, options.output, options.reference_log)
    show_aggregates(run_benchmark(settings, request), as_json=options.json)


def _show_sets(settings: Settings, *, as_json: bool) -> None:
    from loraprune.evaluation import evaluate_files

    results = evaluate_files(settings)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    from rich.console import Console

    from loraprune.evaluation_table import show_evaluation

    show_evaluation(results, Console())
