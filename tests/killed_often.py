"""A run that is killed again and again: one process imports everything once, and every life of the run is a fork of it.

Reads    JSON as the only argument: the settings of a run without their output, a folder, how many kills, a seed
Gives    JSON on stdout: the folder of a run that nobody killed, the finished folders, and what was there at each kill
Source   -
Symbols  -
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # what a run would import late
from rich.console import Console

from loraprune.pipeline import run
from loraprune.settings import Settings

torch.set_num_threads(1)
STAGES = {  # the first of these files that is not there names what the run was at
    "config.toml": "check",
    "before.json": "evaluate before",
    "decision.json": "train",
    "model": "cut",
    "after.json": "evaluate after",
    "metrics.json": "evidence",
}


def main() -> None:
    """Kill runs until the kills are used up, let the last one end, and print what happened."""
    given = json.loads(sys.argv[1])
    work, draw = Path(given["folder"]), random.Random(given["seed"])
    begun = time.monotonic()
    assert live(given["settings"], work / "unkilled") == 0
    length = time.monotonic() - begun
    kills, finished = [], []
    while len(kills) < given["kills"]:
        folder = work / f"killed-{len(finished)}"
        status = live(given["settings"], folder, length * draw.random())
        if nothing_left(folder):
            finished.append(str(folder))
        else:
            assert status == signal.SIGKILL
            kills.append(found_in(folder))
    assert live(given["settings"], folder) == 0
    finished.append(str(folder))
    print(json.dumps({"unkilled": str(work / "unkilled"), "finished": finished, "kills": kills}))


def live(values: dict[str, object], output: Path, seconds: float | None = None) -> int:
    """Run in a fork, killed after some seconds unless it has ended by then, and return how it ended, as waitpid does."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1, (
        "a fork copies the locks of other threads, not the threads"
    )
    child = os.fork()
    if child == 0:
        os._exit(life({**values, "output": str(output)}))
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def life(values: dict[str, object]) -> int:
    try:
        run(Settings(**values), Console(file=sys.stderr))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def nothing_left(folder: Path) -> bool:
    """Whether the run is over; a kill that came only then spoils nothing and does not count."""
    return (folder / "report.html").exists() and not (folder / "state").exists()


def found_in(folder: Path) -> dict[str, object]:
    """Return what a kill left: the stage, the kinds of events written, and the step that the next life goes on from."""
    stage = next((name for file, name in STAGES.items() if not (folder / file).exists()), "report")
    log, state = folder / "events.jsonl", folder / "state" / "state.json"
    events = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    step = json.loads(state.read_text(encoding="utf-8"))["step"] if state.exists() else 0
    return {"stage": stage, "events": [json.loads(one)["event"] for one in events], "step": step}


if __name__ == "__main__":
    main()
