"""Three requests in a row: two people of the demo's world at a time, each on the model of the request before.

Reads    the demo's models and data of each seed, made when they are not there; run folders are in bench/cache/requests
Gives    bench/results/three_requests.json and the section of docs/results.md
Source   -
Symbols  P = performance; level = where P of two people stands to the reference's band on them
"""

from pathlib import Path
from typing import Any

from results_page import ROOT, markdown_table, write_results

from loraprune.demo import make_inputs, settings_for
from loraprune.pipeline import run
from loraprune.settings import Settings
from loraprune.steering import half_band
from loraprune.world import GROUP_SIZES

SEEDS = range(3)
REQUESTS = 3
SPARSITY = 0.08  # of each request; the demo removes 0.26 for all six people at once
FORGET_RETAIN_RATIO = 0.3  # two people are 36 rows, of which every step sees 32: they are pushed three times as often
PUSH = {"sparsity": SPARSITY, "forget_retain_ratio": FORGET_RETAIN_RATIO}
DEMO, CACHE = ROOT / "bench" / "cache" / "demo", ROOT / "bench" / "cache" / "requests"


def main() -> None:
    """Run the requests on every seed (finished ones are read) and write the table."""
    results = {seed: three_requests(seed) for seed in SEEDS}
    write_results("three_requests", results, section(results))


def three_requests(seed: int) -> list[dict[str, Any]]:
    """Return the metrics of the three runs, oldest first."""
    world, folder = DEMO / f"seed-{seed}", CACHE / f"seed-{seed}"
    make_inputs(world, seed)
    folder.mkdir(parents=True, exist_ok=True)
    asked, model, results = split(world, folder), world / "untouched", []
    for number, forget in enumerate(asked):
        output = folder / f"request-{number + 1}"
        own: dict[str, Any] = {"model": str(model), "forget": forget, "already_forgotten": tuple(asked[:number])}
        settings = settings_for(world, seed, output=str(output), **PUSH, **own)
        results.append(dict(run(settings).metrics))
        model = output / "model"
    return results


def split(world: Path, folder: Path) -> list[str]:
    """Write the forget set in three files of two people each; return their names."""
    lines = (world / "forget.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    size = len(lines) // GROUP_SIZES["forget"] * (GROUP_SIZES["forget"] // REQUESTS)
    names = []
    for number in range(REQUESTS):
        path = folder / f"forget-{number + 1}.jsonl"
        path.write_text("".join(lines[number * size : (number + 1) * size]), encoding="utf-8")
        names.append(str(path))
    return names


def section(results: dict[int, list[dict[str, Any]]]) -> str:
    """Return the section of the results page."""
    header = ["seed", "request", "outcome", "P of this request's people (band)", "P of the earlier ones (ceiling)"]
    header += ["retention, floor rows", "retention, final rows", "held against", "bystanders", "removed"]
    rows = [request_row(seed, n, one) for seed, runs in results.items() for n, one in enumerate(runs, start=1)]
    runs = [one for ones in results.values() for one in ones]
    reached = sum(one["outcome"] == "target_reached" for one in runs)
    held = sum(one["floor"]["held"] for one in runs)
    levels = [level(one["after"], one["reference"]) for ones in results.values() for one in forgotten(ones[-1])]
    counts = ", ".join(f"{levels.count(name)} {name}" for name in ("inside", "below", "above"))
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"{reached} of {len(runs)} requests reach their target; the floor holds in {held} of {len(runs)}, always "
            f"against the first model. After the third request, of {len(levels)} pairs of people {counts} the band "
            "around what the reference has of them. Made by `python bench/three_requests.py`.",
        ]
    )


def forgotten(metrics: Any) -> list[Any]:
    """Return all sets that are forgotten after a request, those of earlier ones first."""
    return [*metrics["already_forgotten"], metrics["forget"]]


def level(after: Any, reference: Any) -> str:
    """Return where P stands to the reference's band."""
    value, half = reference["performance"], half_band(reference["performance"], Settings())
    difference = after["performance"] - value
    return "inside" if abs(difference) <= half else "below" if difference < 0 else "above"


def request_row(seed: int, number: int, metrics: Any) -> list[str]:
    """Return one line of the table."""
    target, earlier = metrics["target"], metrics["already_forgotten"]
    low, high = metrics["floor"]["interval"]
    return [
        *(str(seed), str(number), metrics["outcome"]),
        f"{metrics['forget']['after']['performance']:.3f} ({target['low']:.3f} to {target['high']:.3f})",
        ", ".join(f"{one['after']['performance']:.3f} ({one['ceiling']:.3f})" for one in earlier) or "-",
        f"{metrics['floor']['retention']:.3f} ({low:.3f} to {high:.3f})",
        f"{metrics['retention']:.3f}",
        metrics["retention_against"],
        f"{metrics['bystander']['after']['performance']:.3f}",
        f"{metrics['sparsity']:.1%}",
    ]


if __name__ == "__main__":
    main()
