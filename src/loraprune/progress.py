"""Progress: one bar a stage, on stderr, so that stdout stays clean for results.

Reads    the steps that a stage reports
Gives    stage: a bar on a terminal, one plain line at the stage's end anywhere else
Source   -
Symbols  note = a short text on what the stage sees, such as "forget 0.51  retention 0.97"
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loraprune.launch import here
from loraprune.words import duration_text

Advance = Callable[..., None]  # advance(steps=1, note="", new_total=None); an empty note leaves the last one


@contextmanager
def stage(title: str, total: int) -> Iterator[Advance]:
    """Show how far a stage of `total` steps is; the block gets advance(steps=1, note="").

    Of several processes the first one shows it. Without a terminal on stderr one line is printed when the block ends,
    well or not: "train  320/320  41 s  loss 0.9".
    """
    shown = _bar if sys.stderr.isatty() else _line
    with (shown if here().first else _nothing)(title, total) as advance:
        yield advance


def show_nothing(steps: int = 1, note: str = "", new_total: int | None = None) -> None:
    """Stand in for a progress bar."""


@contextmanager
def _nothing(title: str, total: int) -> Iterator[Advance]:
    yield show_nothing


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # Progress would send what others print on stdout to stderr; that is wanted only where both are the terminal.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int = 1, note: str = "", new_total: int | None = None) -> None:
            progress.update(task, advance=steps, total=new_total)  # None leaves the total as it is
            if note:
                progress.update(task, note=note)

        yield advance


@contextmanager
def _line(title: str, total: int) -> Iterator[Advance]:
    begun, done, last_note = monotonic(), 0, ""

    def advance(steps: int = 1, note: str = "", new_total: int | None = None) -> None:
        nonlocal done, last_note, total
        done, last_note, total = done + steps, note or last_note, new_total or total

    try:
        yield advance
    finally:
        parts = (title, f"{done}/{total}", duration_text(monotonic() - begun), last_note)
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
