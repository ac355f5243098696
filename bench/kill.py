"""Kill: does a run of the demo that is killed at 20 random moments end as one that nobody killed?

Reads    the demo's models and data of seed 0, made when they are not there; run folders are in bench/cache/kill
Gives    bench/results/kill.json and the section of docs/results.md
Source   -
Symbols  -
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from results_page import ROOT, markdown_table, write_results

from loraprune.demo import SETTINGS, make_inputs
from loraprune.setting import flag

WORLD, CACHE = ROOT / "bench" / "cache" / "demo" / "seed-0", ROOT / "bench" / "cache" / "kill"
KILLS, SEED = 20, 0
LONGEST_LIFE = 0.5  # of a whole run, so that most starts are killed
MILESTONES = ("before.json", "decision.json", "after.json", "metrics.json")  # in the order in which a run writes them
STAGES = ("evaluate before", "train", "cut, evaluate after", "evidence", "report")
COMPARED = ("decision.json", "mask.safetensors", "adapter/adapter_model.safetensors", "model/model.safetensors")


def main() -> None:
    """Kill command lines of `unlearn` on the demo's world, and compare what they end in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help=f"how many; {KILLS} unless said otherwise")
    options = parser.parse_args()
    make_inputs(WORLD, 0)
    results = killed_often(flags_of(WORLD), CACHE, options.kills)
    write_results("kill", results, section(results))
    print(section(results))


def flags_of(world: Path) -> list[str]:
    """Return the demo's settings as they are typed, but for the output."""
    values = {name: str(world / f"{name}.jsonl") for name in ("forget", "retain", "bystander", "holdout")}
    values |= {"reference": str(world / "reference"), "seed": "0", **{name: str(one) for name, one in SETTINGS.items()}}
    return [str(world / "untouched"), *(word for name, one in values.items() for word in (flag(name), one))]


def killed_often(flags: Sequence[str], work: Path, count: int = KILLS) -> dict[str, Any]:
    """Return the kills, and whether every run that was killed ended as the one that was not."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    begun = monotonic()
    live(flags, work / "unkilled")
    length, draw = monotonic() - begun, random.Random(SEED)
    kills: list[dict[str, Any]] = []
    runs = 0
    while len(kills) < count:
        output, seconds = work / f"killed-{runs}", LONGEST_LIFE * length * draw.random()
        begins_at = saved_step(output)
        if live(flags, output, seconds) and not finished(output):
            kills.append({"run": runs, "seconds": round(seconds, 1), "began_at": begins_at, **found_in(output)})
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
        else:
            runs += 1
    live(flags, work / f"killed-{runs}")
    same = {name: all(same_file(work, f"killed-{one}", name) for one in range(runs + 1)) for name in COMPARED}
    return {"seconds_of_a_run": round(length, 1), "runs": runs + 1, "kills": kills, "same": same}


def live(flags: Sequence[str], output: Path, seconds: float | None = None) -> bool:
    """Start the command line; return whether it was killed after some seconds, and False when it ended before."""
    command = [sys.executable, "-m", "loraprune", "unlearn", *flags, "--output", str(output)]
    log = output.with_name(output.name + ".log")
    with log.open("ab") as file:
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return True
    if code not in (0, 3):
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {log.read_text(errors='replace')[-2000:]}")
    return False


def finished(folder: Path) -> bool:
    """Whether a run had nothing left to do: such a kill spoils nothing and does not count."""
    return (folder / "report.html").exists() and not (folder / "state").exists()


def found_in(folder: Path) -> dict[str, Any]:
    """Return what a kill left: the stage, the last step with an event, the step that the next start goes on from."""
    log = folder / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []
    steps = [one["step"] for one in events if "step" in one]
    stage = STAGES[sum((folder / name).exists() for name in MILESTONES)]
    return {"stage": stage, "step": max(steps, default=0), "saved": saved_step(folder)}


def saved_step(folder: Path) -> int:
    state = folder / "state" / "state.json"
    return json.loads(state.read_text(encoding="utf-8"))["step"] if state.exists() else 0


def same_file(work: Path, run: str, name: str) -> bool:
    return (work / run / name).read_bytes() == (work / "unkilled" / name).read_bytes()


def section(results: dict[str, Any]) -> str:
    """Return the section of the results page."""
    header = ["kill", "run", "seconds lived", "began at step", "killed in", "step reached", "next start goes on from"]
    names = ("run", "seconds", "began_at", "stage", "step", "saved")
    rows = [[str(number), *(str(one[name]) for name in names)] for number, one in enumerate(results["kills"], start=1)]
    differs = [name for name, same in results["same"].items() if not same]
    verdict = f"not the same as without a kill: {', '.join(differs)}" if differs else "the same byte for byte"
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"The demo's run, {results['seconds_of_a_run']} s long, killed by SIGKILL at {len(results['kills'])} "
            "moments drawn by a seed and started again each time; when it came to its end, the next one was begun: "
            f"{results['runs']} in all. Compared with a run that nobody killed, {', '.join(results['same'])}: "
            f"{verdict}. Made by `python bench/kill.py`.",
        ]
    )


if __name__ == "__main__":
    main()
