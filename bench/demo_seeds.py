"""Demo on five worlds: does the demo hold its promises on seeds 0 to 4?

Reads    nothing; run folders are kept in bench/cache/demo
Gives    bench/results/demo.json and the section of docs/results.md; from seed 0 docs/demo.png and demo_evidence.json
Source   -
Symbols  P = performance
"""

import json
from typing import Any

from evidence import evidence, evidence_section
from results_page import ROOT, RUN_HEADER, markdown_table, run_cells, write_results

from loraprune.demo import run_demo
from loraprune.figure import draw_result

SEEDS = range(5)
CACHE = ROOT / "bench" / "cache" / "demo"


def main() -> None:
    """Run the demo on every seed (finished ones are read) and write the table."""
    folders = {seed: CACHE / f"seed-{seed}" for seed in SEEDS}
    results = {seed: dict(run_demo(folder, seed, show_examples=False).metrics) for seed, folder in folders.items()}
    events = [json.loads(line) for line in (folders[0] / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    draw_result(results[0], events, ROOT / "docs" / "demo.png")
    write_results("demo", results, section(results))
    shown = evidence(folders[0])
    write_results("demo_evidence", shown, evidence_section(shown))


def promises(metrics: Any) -> dict[str, bool]:
    """Return which of the demo's promises a run kept."""
    forget = metrics["forget"]
    return {
        "exact": forget["after"]["exact_match"] <= forget["reference"]["exact_match"] + 0.10,
        "band": metrics["target"]["low"] <= forget["after"]["performance"] <= metrics["target"]["high"],
        "retention": metrics["retention"] >= 0.90,
        "taught": metrics["retention_taught"] >= 0.97,
        "sparsity": metrics["sparsity"] >= 0.25,
    }


def section(results: dict[int, Any]) -> str:
    """Return the section of the results page."""
    rows = []
    for seed, one in results.items():
        missed = ", ".join(name for name, held in promises(one).items() if not held)
        rows.append([str(seed), *run_cells(one), f"all but {missed}" if missed else "all"])
    header = ["seed", *RUN_HEADER, "promises kept"]
    held = sum(all(promises(one).values()) for one in results.values())
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"{held} of {len(results)} seeds keep every promise: exact match on the forget set at most the "
            "reference's + 0.10, P(forget) inside the band, retention at least 0.90 on final rows and 0.97 on taught "
            "rows, at least 25% of all parameters removed. Retention is P after / P before; final rows are touched by "
            "nothing before the last evaluation. Made by `python bench/demo_seeds.py`.",
        ]
    )


if __name__ == "__main__":
    main()
