"""Benchmark: one of the field's suites on one model, by name.

Reads    a name such as tofu:forget10, muse:news or lm-eval:wmdp; the suite's data, a folder or a hub data set
Gives    Request, run_benchmark
Source   TOFU, arXiv 2401.06121; MUSE, arXiv 2407.06460; lm-evaluation-harness
Symbols  -
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune.errors import UserError, nearest
from loraprune.settings import Settings

SPLITS = {"tofu": ("forget01", "forget05", "forget10"), "muse": ("news", "books")}
SUITES = ("tofu", "muse", "lm-eval")


@dataclass(frozen=True)
class Request:
    """What is asked of a model: suite and split (or tasks), where the data are, where the log goes."""

    suite: str
    split: str
    data: str | None
    output: Path | None
    reference_log: str | None


def read_request(benchmark: str, data: str | None, output: str | None, reference_log: str | None) -> Request:
    """Return the checked request; raise UserError for a suite or split that is not known, or what is missing."""
    suite, _, split = benchmark.partition(":")
    if suite not in SUITES or not split or split not in SPLITS.get(suite, (split,)):
        raise _not_known(benchmark, suite)
    if suite != "lm-eval":
        for name, value in (("--data", data), ("--output", output)):
            if not value:
                raise UserError(
                    f"{name} is missing.",
                    "a suite reads a folder (or a hub data set) and writes its log into another.",
                    f"give {name} DIR.",
                )
    return Request(suite, split, data, Path(output) if output else None, reference_log)


def _not_known(benchmark: str, suite: str) -> UserError:
    forms = [f"{one}:{split}" for one, splits in SPLITS.items() for split in splits]
    close = nearest(benchmark, forms) or (nearest(suite, SUITES) if suite not in SUITES else None)
    return UserError(
        f"there is no benchmark {benchmark}.",
        f"known are {', '.join(forms)} and lm-eval:TASK[,TASK].",
        f"did you mean {close}?" if close else "write it as suite:split.",
    )


def run_benchmark(settings: Settings, request: Request) -> Mapping[str, Mapping[str, Any]]:
    """Return a suite's aggregates; TOFU and MUSE also write their log into the request's output folder."""
    return _runner(request.suite)(settings, request)


def _runner(suite: str) -> Callable[[Settings, Request], Mapping[str, Mapping[str, Any]]]:
    if suite == "tofu":
        from loraprune.tofu_suite import run_tofu

        return run_tofu
    if suite == "muse":
        from loraprune.muse_suite import run_muse

        return run_muse
    from loraprune.harness import run_harness

    return run_harness
