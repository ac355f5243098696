"""Arena: does pruning by dual importance unlearn better than forget losses alone, other prunings, masks of equal size?

Reads    nothing; worlds, checkpoints and marks stay in bench/cache/arena under the hash of their content, settings and
         point, and are not made again: empty it when the code has changed. Cells that bench/results/arena.json holds
         count as made where the world comes out the same; --anew takes none from there
Gives    bench/results/arena.json, docs/arena.png, docs/arena_frontier.png, docs/arena_relearning.png and the section
         of docs/results.md. There worlds that are not asked for stay as they are, and so do a world's other
         contestants; a call of other seeds, other models or fewer points than theirs is refused, unless --replace
Source   arena_contestants.py and arena_rivals.py for the methods, arena_cells.py for how each is run, arena_marks.py
         for the marks
Symbols  a cell = one point of one contestant on one seed of one world
"""

import argparse
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from arena_cells import Cell, End, fill, made_worlds, put_back, source, take_out
from arena_contestants import CONTESTANTS, QUICK, Grid
from arena_marks import judge
from arena_page import draw, draw_frontier, draw_relearning, section, sources
from arena_worlds import BETTER_ON_GPU, CACHE, ON_GPU, TRIED_ON, WORLDS, Values, World
from filelock import FileLock, Timeout
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
    parser.add_argument("--replace", action="store_true", help="let a world's results go where they do not fit these")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process of one thread")
    options = parser.parse_args()
    beyond = [name for name in options.worlds if name not in here]
    if beyond:
        parser.error(f"{beyond[0]} is run on a GPU, and torch sees none here")
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    names = options.contestants or (QUICK if options.quick else list(CONTESTANTS))
    worlds = options.worlds[:1] if options.quick else options.worlds
    CACHE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and the processes with it
    with quiet_libraries(), only_call():
        known = earlier()
        seeds = {name: options.seeds or known.get(name, {}).get("seeds", SEEDS) for name in worlds}
        seeds = {name: list(one[:1] if options.quick else one) for name, one in seeds.items()}
        kept = {} if options.quick or options.replace else known
        for name in worlds:
            check_points(name, kept.get(name), seeds[name], names, options.defaults)
        if options.anew:
            take_out(seeds)
        else:
            for name, world in known.items():
                put_back(name, world)
        made = made_worlds(seeds, options.jobs)
        values = compete(made, names, options.quick or options.defaults, options.jobs, kept)
        for name, world in values.items():
            if older := sources(world) - {source()}:
                print(f"{name}: cells of source {', '.join(sorted(older))}; this is {source()}. --anew takes no others")
        values = values if options.quick else with_earlier(values, options.replace)
        publish(values, CACHE / "quick" if options.quick else None)


@contextmanager
def only_call() -> Iterator[None]:
    """Wait until no other call is at work: two would make the same cell, and write over each other's results."""
    lock = FileLock(CACHE / "arena.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another call is at work and holds {lock.lock_file}: this one waits for its end", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def publish(values: Values, quick: Path | None) -> None:
    """Print the section; write figures and JSON, into the page's places or those of the quick form."""
    text = section(values)
    print(text)
    folder = quick or ROOT / "docs"
    folder.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        make(values, folder / f"{name}.png")
    if quick:
        write_json(folder / "arena.json", values)
        print(f"JSON and figures: {folder}")
    else:
        write_results("arena", values, text)


def earlier() -> Values:
    """Return what earlier calls left in the results."""
    path = results_path("arena")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check_points(
    name: str, older: Values | None, seeds: Sequence[int], contestants: Sequence[str], defaults: bool
) -> None:
    """Refuse a call that would take the place of a world's results with less, or with what these do not fit."""
    if older is None:
        return
    if older["seeds"] != seeds:
        refuse(name, f"they are of seeds {_listed(older['seeds'])}, this call is of {_listed(seeds)}")
    known = older["contestants"]
    searched = [key for key in contestants if key in known and len(known[key]["tried"]) > 1]
    if defaults and searched:
        refuse(name, f"the points of {', '.join(searched)} were searched there, --defaults searches none")


def check_models(name: str, older: Values | None, asked: Values, ends: Values) -> None:
    """Refuse a call whose models, or what is asked of ours, are not those of a world's results."""
    if older is None:
        return
    if changed := [f"{setting} {older[setting]:g}" for setting in asked if older[setting] != asked[setting]]:
        refuse(name, f"they are by {' and '.join(changed)}, this call is not")
    if others := [seed for seed in ends if ends[seed] != older["ends"].get(seed)]:
        refuse(name, f"the models of seeds {_listed(others)} came out otherwise here, or are measured otherwise")


def refuse(name: str, why: str) -> NoReturn:
    raise SystemExit(
        f"The results of {name} stay as they are\n  why: {why}\n"
        "  fix: leave --seeds and --defaults out, or give --replace to let all of its results go"
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def with_earlier(values: Values, replace_them: bool) -> Values:
    """Return these worlds with what earlier calls left in the results, worlds and contestants in order.

    Numbers of earlier calls are made again of their marks, so that the page is of one judgement.
    """
    older = {name: judged_again(world) for name, world in earlier().items()}
    joined_ = values if replace_them else {name: joined(older.get(name), world) for name, world in values.items()}
    known = {**older, **joined_}
    return {name: known[name] for name in WORLDS if name in known}


def joined(older: Values | None, world: Values) -> Values:
    """Return a world with the other contestants of its earlier results."""
    known = {**(older or world)["contestants"], **world["contestants"]}
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


def compete(
    worlds: Mapping[str, Mapping[int, World]], names: Sequence[str], defaults: bool, jobs: int, kept: Values
) -> Values:
    """Return all cells of every world, and what each contestant's best point is; what is missing is made first.

    `kept`: the results that these are to stand beside, which are of the same models.
    """
    grids = {key: CONTESTANTS[key].grid for key in names}
    grids = {key: Grid((grid.default(),)) if defaults else grid for key, grid in grids.items()}
    contests = {name: Contest(list(seeds.values()), grids) for name, seeds in worlds.items()}
    fill([one for contest in contests.values() for one in contest.all_ends()], jobs)
    for name, contest in contests.items():
        check_models(name, kept.get(name), contest.asked(), contest.marks_of_ends())
    fill([one for contest in contests.values() for one in contest.first()], jobs)
    fill([one for contest in contests.values() for one in contest.beyond()], jobs)
    fill([one for contest in contests.values() for one in contest.others()], jobs)
    return {name: contest.values() for name, contest in contests.items()}


@dataclass(frozen=True)
class Contest:
    """One world's seeds, the first of which chooses each contestant's point of its grid."""

    worlds: Sequence[World]
    grids: Mapping[str, Grid]

    @cached_property
    def ends(self) -> dict[int, dict[str, End]]:
        return {world.seed: {role: End(world, role) for role in ENDS} for world in self.worlds}

    def all_ends(self) -> Iterator[End]:
        for ends in self.ends.values():
            yield from ends.values()

    def marks_of_ends(self) -> Values:
        return {str(seed): {role: end.marks() for role, end in ends.items()} for seed, ends in self.ends.items()}

    def asked(self) -> Values:
        first = self.worlds[0]
        return {"sparsity": first.sparsity, "relearning_radius": first.settings.relearning_radius}

    def first(self) -> Iterator[Cell]:
        """Give what is tried first."""
        for key, grid in self.grids.items():
            yield from self._tried(key, grid.tried)

    def beyond(self) -> Iterator[Cell]:
        """Give what is tried beside the best of these, where that is at an edge."""
        for key, grid in self.grids.items():
            yield from self._tried(key, grid.beyond(self._best(self._tried(key, grid.tried)).point))

    def others(self) -> Iterator[Cell]:
        """Give the other seeds' cells, once the points are chosen."""
        for cells in self.chosen.values():
            yield from cells[1:]

    def _tried(self, key: str, points: Sequence[Values]) -> list[Cell]:
        return [Cell(self.worlds[0], "unlearned", key, point) for point in points]

    def _best(self, cells: Sequence[Cell]) -> Cell:
        return max(cells, key=lambda cell: self.judged(cell)["composite_relearning"])

    @cached_property
    def tried(self) -> dict[str, list[Cell]]:
        """Return the cells that choose a contestant's point."""
        further: dict[str, list[Cell]] = {key: [] for key in self.grids}
        for cell in self.beyond():
            further[cell.contestant].append(cell)
        return {key: self._tried(key, grid.tried) + further[key] for key, grid in self.grids.items()}

    @cached_property
    def chosen(self) -> dict[str, list[Cell]]:
        """Return every contestant's cells at its best point, the first seed's first."""
        found = {}
        for key, cells in self.tried.items():
            best = self._best(cells)
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
        seeds = [world.seed for world in self.worlds]
        return {**self.asked(), "seeds": seeds, "ends": self.marks_of_ends(), "contestants": contestants}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that make and measure
    main()
