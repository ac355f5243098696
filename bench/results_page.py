"""Results page: each bench owns one section of docs/results.md and one file of bench/results.

Reads    a bench's numbers
Gives    bench/results/NAME.json, and the section NAME of docs/results.md between its two marks
Source   -
Symbols  -
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"


def write_results(name: str, values: Any, section: str, mark: str = "") -> None:
    """Write a bench's JSON and put its section, made of these very numbers, into the page; `mark`: by default, name."""
    path = results_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    put_section(PAGE, mark or name, section)


def results_path(name: str) -> Path:
    """Return the file of a bench's numbers."""
    return ROOT / "bench" / "results" / f"{name}.json"


def put_section(path: Path, mark: str, section: str) -> None:
    """Put a section into a page of docs between its two marks, in place of the one before."""
    page = path.read_text(encoding="utf-8")
    marks = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    found = re.search(re.escape(marks[0]) + ".*" + re.escape(marks[1]), page, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{path} has no section {marks[0]} ... {marks[1]}")
    path.write_text(
        page[: found.start()] + f"{marks[0]}\n{section}\n{marks[1]}" + page[found.end() :], encoding="utf-8"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


RUN_HEADER = (
    *("P(forget) before", "after", "reference", "band", "exact after", "exact reference", "retention (95 % interval)"),
    *("retention, floor rows", "retention taught", "bystanders before", "after", "removed", "outcome"),
)


def run_cells(metrics: Any) -> list[str]:
    """Return one run of `unlearn` with a reference and bystanders as the cells under RUN_HEADER."""
    forget, target, bystander = metrics["forget"], metrics["target"], metrics["bystander"]
    low, high = metrics["retention_interval"]
    return [
        f"{forget['before']['performance']:.3f}",
        f"{forget['after']['performance']:.3f}",
        f"{forget['reference']['performance']:.3f}",
        f"{max(0.0, target['low']):.3f} to {target['high']:.3f}",
        f"{forget['after']['exact_match']:.3f}",
        f"{forget['reference']['exact_match']:.3f}",
        f"{metrics['retention']:.3f} ({low:.3f} to {high:.3f})",
        f"{metrics['floor']['retention']:.3f}",
        f"{metrics['retention_taught']:.3f}",
        f"{bystander['before']['performance']:.3f}",
        f"{bystander['after']['performance']:.3f}",
        f"{metrics['sparsity']:.1%}",
        metrics["outcome"],
    ]
