"""Earlier results of the arena: what of them a call keeps beside its own, and which calls they do not fit.

Reads    bench/results/arena.json
Gives    earlier; Kept: settle, joined; unlike_points, unlike_models: why a call does not fit a world's results
Source   -
Symbols  -
"""

import json
from collections.abc import Mapping, Sequence

from arena_cells import is_gpu
from arena_contestants import CONTESTANTS
from arena_marks import judge
from arena_worlds import WORLDS, Values
from results_page import results_path

ASKED = ("sparsity", "relearning_radius")


def earlier() -> Values:
    """Return what earlier calls left in the results."""
    path = results_path("arena")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if lost := {key for world in known.values() for key in world["contestants"]} - set(CONTESTANTS):
        raise SystemExit(
            f"{path} holds contestants that this code does not know: {_listed(sorted(lost))}\n"
            "  why: they would go from the page without a word\n"
            "  fix: give them their new names there, or take them out"
        )
    return known


class Kept:
    """The earlier results that stay beside a call's own; worlds that these do not fit go, if the call is to `replace`
    them, and else end it."""

    def __init__(self, known: Values, replaces: bool) -> None:
        self.worlds, self.replaces = dict(known), replaces

    def settle(self, name: str, unlike: str | None) -> None:
        """Let a world's results go, or refuse the call, where there is a reason why the two are unlike."""
        if unlike is None:
            return
        if not self.replaces:
            raise SystemExit(
                f"The results of {name} stay as they are\n  why: {unlike}\n"
                "  fix: leave --seeds and --defaults out, and run where the models are that they began with; or give "
                "--replace to let all results of this world go"
            )
        print(f"{name}: {unlike}; the results of {_listed(self.worlds.pop(name)['contestants'])} go", flush=True)

    def joined(self, values: Values) -> Values:
        """Return these worlds with what stays of earlier results, worlds and contestants in order.

        Numbers of earlier calls are made again of their marks, so that the page is of one judgement.
        """
        known = {name: judged_again(world) for name, world in self.worlds.items()}
        for name, world in values.items():
            both = {**known.get(name, world)["contestants"], **world["contestants"]}
            known[name] = {**world, "contestants": {key: both[key] for key in CONTESTANTS if key in both}}
        return {name: known[name] for name in WORLDS if name in known}


def unlike_points(
    older: Values | None, seeds: Sequence[int], contestants: Sequence[str], defaults: bool, on_gpu: bool
) -> str | None:
    """Say why a call of these seeds and points does not fit a world's results, as far as can be told at its start."""
    if older is None:
        return None
    known = older["contestants"]
    if older["seeds"] != list(seeds):
        return f"they are of seeds {_listed(older['seeds'])}, this call is of {_listed(seeds)}"
    searched = [key for key in contestants if key in known and len(known[key]["tried"]) > 1]
    if defaults and searched:
        return f"the points of {_listed(searched)} were searched there, --defaults searches none"
    machines = {cell["machine"] for one in known.values() for cell in one["cells"]}
    if any(is_gpu(machine) != on_gpu for machine in machines):
        return f"they were made on {_listed(sorted(machines))}, this call is {'' if on_gpu else 'not '}on a GPU"
    return None


def unlike_models(older: Values | None, now: Values) -> str | None:
    """Say why a call does not fit a world's results by what it begins with; `now`: the call's, as `begun_with` has
    it."""
    if older is None:
        return None
    if changed := [f"{setting} {older[setting]:g}" for setting in ASKED if older[setting] != now[setting]]:
        return f"they are by {' and '.join(changed)}, this call is not"
    if others := [seed for seed, ends in now["ends"].items() if ends != older["ends"].get(seed)]:
        return f"the models of seeds {_listed(others)} came out otherwise here, or are measured otherwise"
    return None


def judged_again(world: Values) -> Values:
    """Return an earlier call's world with every cell's numbers made of its marks by this code."""
    contestants = {
        name: {**one, **{part: [_judged_again(world, cell) for cell in one[part]] for part in ("tried", "cells")}}
        for name, one in world["contestants"].items()
    }
    return {**world, "contestants": contestants}


def _judged_again(world: Mapping[str, Values], cell: Values) -> Values:
    return {**cell, **judge(cell["marks"], **world["ends"][str(cell["seed"])])}


def _listed(values: Sequence[object] | Mapping[str, object]) -> str:
    return ", ".join(map(str, values))
