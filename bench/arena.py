"""Arena: does pruning by dual importance unlearn better than forget losses alone, other prunings, masks of equal size?

Reads    nothing; worlds, checkpoints and marks stay in bench/cache/arena under the hash of their content, settings and
         point, and are not made again: empty it when the code has changed. Cells that bench/results/arena.json holds
         count as made where the world comes out the same; --anew takes none from there
Gives    bench/results/arena.json, docs/arena.png, docs/arena_frontier.png, docs/arena_relearning.png and the section
         of docs/results.md. There worlds that are not asked for stay as they are, and so do a world's other
         contestants where its seeds, and the models of each, are the same; else all of it is replaced
Source   arena_contestants.py and arena_rivals.py for the methods, arena_cells.py for how each is run, arena_marks.py
         for the marks
Symbols  a cell = one point of one contestant on one seed of one world
"""

import argparse
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from arena_cells import Cell, Checkpoint, End, fill, made_worlds, put_back, source, take_out
from arena_contestants import CONTESTANTS, QUICK
from arena_marks import judge
from arena_page import draw, draw_frontier, draw_relearning, section, sources
from arena_worlds import BETTER_ON_GPU, CACHE, ON_GPU, TRIED_ON, WORLDS, Values, World
from filelock import FileLock
from results_page import ROOT, results_path, write_results

from loraprune.attacked import Role
from loraprune.folder import write_json
from loraprune.model import quiet_libraries

ENDS: tuple[Role, ...] = ("original", "reference")
SEEDS = (0, 1, 2, 3, 4)
FIGURES = {"arena": draw, "arena_frontier": draw_frontier, "arena_relearning": draw_relearning}


def main() -> None:
    """Run what has not been run yet, print the JSON's place and the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    here = [name for name in WORLDS if has_gpu or name not in ON_GPU]
    usual = [name for name in here if name not in TRIED_ON and (has_gpu or name not in BETTER_ON_GPU)]
    parser.add_argument("--worlds", nargs="+", default=usual, choices=list(WORLDS), help=f"default: {', '.join(usual)}")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help=f"the first chooses the points; default: those of the world's results, or {SEEDS[0]} to {SEEDS[-1]}",
    )
    parser.add_argument("--contestants", nargs="+", default=None, choices=list(CONTESTANTS))
    parser.add_argument("--defaults", action="store_true", help="no grids: each contestant at its default point")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="as --defaults, on the first world and seed, few contestants unless some are named; the page stays",
    )
    parser.add_argument("--anew", action="store_true", help="take no cells from the results of earlier calls")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process of one thread")
    options = parser.parse_args()
    beyond = [name for name in options.worlds if name not in here]
    if beyond:
        parser.error(f"{beyond[0]} is run on a GPU, and torch sees none here")
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    names = options.contestants or (QUICK if options.quick else list(CONTESTANTS))
    worlds = options.worlds[:1] if options.quick else options.worlds
    known = earlier()
    seeds = {name: options.seeds or known.get(name, {}).get("seeds", SEEDS) for name in worlds}
    seeds = {name: one[:1] if options.quick else one for name, one in seeds.items()}
    CACHE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and the processes with it
    with quiet_libraries(), FileLock(CACHE / "arena.lock"):  # two calls would make the same cell
        if options.anew:
            take_out()
        else:
            for name, world in known.items():
                put_back(name, world)
        made = made_worlds(seeds, options.jobs)
        values = compete(made, names, options.quick or options.defaults, options.jobs)
    for name, world in values.items():
        if older := sources(world) - {source()}:
            print(f"{name}: cells of source {', '.join(sorted(older))}; this is {source()}. --anew takes no others")
    values = values if options.quick else with_earlier(values)
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


def earlier() -> Values:
    """Return what earlier calls left in the results."""
    path = results_path("arena")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def with_earlier(values: Values) -> Values:
    """Return these worlds with what earlier calls left in the results, worlds and contestants in order.

    Numbers of earlier calls are made again of their marks, so that the page is of one judgement.
    """
    older = {name: judged_again(world) for name, world in earlier().items()}
    known = {**older, **{name: joined(older.get(name), world) for name, world in values.items()}}
    return {name: known[name] for name in WORLDS if name in known}


def joined(older: Values | None, world: Values) -> Values:
    """Return a world with the other contestants of earlier results, where these are of the same models and settings."""
    if older is None or any(older[name] != world[name] for name in ("sparsity", "relearning_radius", "ends")):
        return world
    known = {**older["contestants"], **world["contestants"]}
    return {**world, "contestants": {name: known[name] for name in CONTESTANTS if name in known}}


def judged_again(world: Values) -> Values:
    """Return an earlier call's world with every cell's numbers made of its marks by this code."""
    contestants = {
        name: {**one, **{part: [_judged_again(world, cell) for cell in one[part]] for part in ("tried", "cells")}}
        for name, one in world["contestants"].items()
    }
    return {**world, "contestants": contestants}


def _judged_again(world: Values, cell: Values) -> Values:
    return {**cell, **judge(cell["marks"], **world["ends"][str(cell["seed"])])}


def compete(worlds: Mapping[str, Mapping[int, World]], names: Sequence[str], defaults: bool, jobs: int) -> Values:
    """Return all cells of every world, and what each contestant's best point is; what is missing is made first."""
    points = {key: [CONTESTANTS[key].default()] if defaults else list(CONTESTANTS[key].points) for key in names}
    contests = {name: Contest(list(seeds.values()), points) for name, seeds in worlds.items()}
    fill([one for contest in contests.values() for one in contest.first()], jobs)
    fill([one for contest in contests.values() for one in contest.second()], jobs)
    return {name: contest.values() for name, contest in contests.items()}


@dataclass(frozen=True)
class Contest:
    """One world's seeds, the first of which chooses each contestant's point among these."""

    worlds: Sequence[World]
    points: Mapping[str, Sequence[Values]]

    @cached_property
    def ends(self) -> dict[int, dict[str, End]]:
        return {world.seed: {role: End(world, role) for role in ENDS} for world in self.worlds}

    @cached_property
    def tried(self) -> dict[str, list[Cell]]:
        """Return the cells that choose a contestant's point."""
        return {
            key: [Cell(self.worlds[0], "unlearned", key, point) for point in points]
            for key, points in self.points.items()
        }

    def first(self) -> Iterator[Checkpoint]:
        """Give what can be made before the points are chosen."""
        for ends in self.ends.values():
            yield from ends.values()
        for cells in self.tried.values():
            yield from cells

    @cached_property
    def chosen(self) -> dict[str, list[Cell]]:
        """Return every contestant's cells at its best point, the first seed's first."""
        found = {}
        for key, cells in self.tried.items():
            best = max(cells, key=lambda cell: self.judged(cell)["composite_relearning"])
            found[key] = [best, *(replace(best, world=world) for world in self.worlds[1:])]
        return found

    def second(self) -> Iterator[Cell]:
        """Give what can be made once they are."""
        for cells in self.chosen.values():
            yield from cells[1:]

    def judged(self, cell: Cell) -> Values:
        """Return a cell's numbers beside the marks that they are made of, and what making it took."""
        marks, ends = cell.marks(), self.ends[cell.world.seed]
        spent = {name: one for name, one in cell.made().items() if name != "contestant"}
        numbers = judge(marks, **{role: end.marks() for role, end in ends.items()})
        return {"seed": cell.world.seed, **cell.known_by(), **spent, "marks": marks, **numbers}

    def values(self) -> Values:
        """Return what the page shows of this world."""
        contestants = {
            key: {
                "role": CONTESTANTS[key].role,
                "tried": [self.judged(cell) for cell in self.tried[key]],
                "point": cells[0].point,
                "cells": [self.judged(cell) for cell in cells],
            }
            for key, cells in self.chosen.items()
        }
        ends = {str(seed): {role: end.marks() for role, end in ends.items()} for seed, ends in self.ends.items()}
        seeds = [world.seed for world in self.worlds]
        first = self.worlds[0]
        asked = {"sparsity": first.sparsity, "relearning_radius": first.settings.relearning_radius}
        return {**asked, "seeds": seeds, "ends": ends, "contestants": contestants}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that make and measure
    main()
