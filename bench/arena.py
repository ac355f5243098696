"""Arena: does pruning by dual importance unlearn better than forget losses alone, other prunings, masks of equal size?

Reads    nothing; worlds, checkpoints and marks stay in bench/cache/arena under the hash of their content, settings and
         point, and are not made again: empty it when the code has changed. Cells that bench/results/arena.json holds
         count as made where the world comes out the same; --anew takes none from there
Gives    bench/results/arena.json, docs/arena.png, docs/arena_frontier.png, docs/arena_relearning.png and the section
         of docs/results.md. There worlds that are not asked for stay as they are, and so do a world's other
         contestants; a call of other seeds, models or machine, or of fewer points, is refused, unless --replace
Source   arena_contestants.py and arena_rivals.py for the methods, arena_cells.py for how each is run, arena_marks.py
         for the marks, arena_contest.py for what is run when, arena_earlier.py for what stays of earlier calls
Symbols  a cell = one point of one contestant on one seed of one world
"""

import argparse
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from arena_cells import fill, made_worlds, put_back, source, take_out
from arena_contest import Contest
from arena_contestants import CONTESTANTS, QUICK, Grid
from arena_earlier import Kept, earlier, unlike_models, unlike_points
from arena_page import draw, draw_frontier, draw_relearning, section, sources
from arena_worlds import BETTER_ON_GPU, CACHE, ON_GPU, TRIED_ON, WORLDS, Values, is_on_gpu
from filelock import FileLock, Timeout
from results_page import ROOT, write_results

from loraprune.folder import write_json
from loraprune.model import quiet_libraries

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
    parser.add_argument(
        "--anew", action="store_true", help="make again what other code made, of the contestants asked for"
    )
    parser.add_argument(
        "--replace", action="store_true", help="let a world's earlier results go where they do not fit the call"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process of one thread")
    options = parser.parse_args()
    if missing := [name for name in options.worlds if name not in here]:
        parser.error(f"{missing[0]} is run on a GPU, and torch sees none here")
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
        kept = Kept({} if options.quick else known, options.replace)
        for name in worlds:
            older = kept.worlds.get(name)
            kept.settle(name, unlike_points(older, seeds[name], names, options.defaults, is_on_gpu(name)))
        contests = begin(seeds, names, options.quick or options.defaults, options.jobs)
        for name, contest in contests.items():
            kept.settle(name, unlike_models(kept.worlds.get(name), contest.begun_with()))
            if options.anew:
                take_out(name, seeds[name], names)
            elif name in known:
                put_back(name, known[name])
        values = compete(contests, options.jobs)
        for name, world in values.items():
            if older := sources(world) - {source()}:
                print(f"{name}: cells of source {', '.join(sorted(older))}; this is {source()}. --anew takes no others")
        if options.quick:
            publish(values, folder := CACHE / "quick")
            write_json(folder / "arena.json", values)
            print(f"JSON and figures: {folder}")
        else:
            values = kept.joined(values)
            write_results("arena", values, publish(values, ROOT / "docs"))


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


def publish(values: Values, folder: Path) -> str:
    """Print the section and return it; write the figures into the folder."""
    text = section(values)
    print(text)
    folder.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        make(values, folder / f"{name}.png")
    return text


def begin(seeds: Mapping[str, Sequence[int]], names: Sequence[str], defaults: bool, jobs: int) -> dict[str, Contest]:
    """Return every world's contest; its models are made, and their marks measured, where they are missing."""
    grids = {key: CONTESTANTS[key].grid for key in names}
    grids = {key: Grid((grid.default(),)) if defaults else grid for key, grid in grids.items()}
    contests = {name: Contest(list(one.values()), grids) for name, one in made_worlds(seeds, jobs).items()}
    fill([one for contest in contests.values() for one in contest.all_ends()], jobs)
    return contests


def compete(contests: Mapping[str, Contest], jobs: int) -> Values:
    """Return all cells of every world, and what each contestant's best point is; what is missing is made first."""
    fill([one for contest in contests.values() for one in contest.first()], jobs)
    fill([one for contest in contests.values() for one in contest.further()], jobs)
    fill([one for contest in contests.values() for one in contest.others()], jobs)
    return {name: contest.values() for name, contest in contests.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that make and measure
    main()
