"""Arena: does pruning by dual score unlearn better than forget losses alone, other prunings, and masks of equal size?

Reads    nothing; worlds, checkpoints and marks stay in bench/cache/arena under the hash of their content, settings and
         point, and are not made again: empty it when the code has changed
Gives    bench/results/arena.json, docs/arena.png, docs/arena_relearning.png and the section of docs/results.md
Source   arena_contestants.py and arena_rivals.py for the methods, arena_marks.py for the marks
Symbols  a cell = one point of one contestant on one seed of one world
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from arena_contestants import CONTESTANTS, QUICK, Contestant
from arena_marks import judge, marks_key, measure_marks
from arena_page import draw, draw_relearning, section
from arena_worlds import CACHE, WORLDS, Values, World
from filelock import FileLock
from results_page import ROOT, write_results

from loraprune.folder import write_json
from loraprune.model import quiet_libraries

SEEDS = (0, 1, 2, 3, 4)
FIGURES = {"arena": draw, "arena_relearning": draw_relearning}


def main() -> None:
    """Run what has not been run yet, print the JSON's place and the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="the first one chooses the points")
    parser.add_argument("--contestants", nargs="+", default=None, choices=list(CONTESTANTS))
    parser.add_argument("--defaults", action="store_true", help="no grids: each contestant at its default point")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="as --defaults, on the first world and seed, few contestants unless some are named; the page stays",
    )
    options = parser.parse_args()
    names = options.contestants or (QUICK if options.quick else list(CONTESTANTS))
    worlds = options.worlds[:1] if options.quick else options.worlds
    seeds = options.seeds[:1] if options.quick else options.seeds
    CACHE.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(), FileLock(CACHE / "arena.lock"):  # two processes would make the same cell
        values: Values = {world: one_world(world, names, seeds, options.quick or options.defaults) for world in worlds}
    text = section(values)
    print(text)
    folder = CACHE / "quick" if options.quick else ROOT / "docs"
    folder.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        make(values, folder / f"{name}.png")
    if options.quick:
        write_json(folder / "arena.json", values)
        print(f"JSON and figures: {folder}")
    else:
        write_results("arena", values, text)


def one_world(name: str, names: Sequence[str], seeds: Sequence[int], defaults: bool) -> Values:
    """Return all cells of one world, and what each contestant's best point is."""
    made = {seed: WORLDS[name](seed) for seed in seeds}
    ends = {seed: {role: given(world, role) for role in ("original", "reference")} for seed, world in made.items()}

    def cells(contestant: Contestant, key: str, point: Values, seeds: Sequence[int]) -> Iterator[Values]:
        for seed in seeds:
            cell = one_cell(made[seed], key, contestant, point)
            yield {"seed": seed, "point": point, **cell, **judge(cell["marks"], **ends[seed])}

    contestants: Values = {}
    for key in names:
        one = CONTESTANTS[key]
        tried = [
            found
            for point in ([one.default()] if defaults else one.points)
            for found in cells(one, key, point, seeds[:1])
        ]
        best = max(tried, key=lambda cell: cell["composite_relearning"])
        contestants[key] = {
            "role": one.role,
            "tried": tried,
            "point": best["point"],
            "cells": [best, *cells(one, key, best["point"], seeds[1:])],
        }
    world = made[seeds[0]]
    return {"sparsity": world.sparsity, "seeds": list(seeds), "ends": ends, "contestants": contestants}


# --- cells ------------------------------------------------------------------------------------------------------------


def one_cell(world: World, name: str, contestant: Contestant, point: Values) -> Values:
    """Return a cell's marks and the seconds that making it took; a cell that is there already is read."""
    folder = CACHE / f"{world.name}-{world.seed}" / world.key(name, point)
    made = folder / "made.json"
    if not made.exists():
        print(f"{world.name} {world.seed}: {name} {point}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        begun = monotonic()
        contestant.make(world, point, folder)
        write_json(made, {"contestant": name, "point": point, "seconds": round(monotonic() - begun, 1)})
    return {"seconds": read(made)["seconds"], "marks": marked(world, folder, folder / "model", "unlearned")}


def given(world: World, role: str) -> Values:
    """Return the marks of one of the models that a world begins with."""
    settings = world.settings
    folder = CACHE / f"{world.name}-{world.seed}" / world.key(role)
    folder.mkdir(parents=True, exist_ok=True)
    return marked(world, folder, Path(settings.model if role == "original" else str(settings.reference)), role)


def marked(world: World, folder: Path, model: Path, role: Any) -> Values:
    """Return a checkpoint's marks, measured once."""
    kept = folder / f"marks-{marks_key()}.json"
    if not kept.exists():
        write_json(kept, measure_marks(world, str(model), role))
    return read(kept)


def read(path: Path) -> Values:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
