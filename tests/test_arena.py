"""The arena: its store of cells, what marks are worth, what the page says was met, and what it keeps of earlier calls."""

import ast
import importlib
import json
import platform
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from pickle import PicklingError
from typing import NamedTuple

import pytest

BENCH = str(Path(__file__).resolve().parents[1] / "bench")


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a module of the bench; all of them are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in [name for name, one in sys.modules.items() if (getattr(one, "__file__", "") or "").startswith(BENCH)]:
        del sys.modules[name]


@pytest.fixture
def cells(bench, monkeypatch, tmp_path):
    """The bench's module, its cache in an empty folder."""
    module = bench("arena_cells")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    return module


def world_of(cells, **changes):
    """What the results hold of a world with one cell."""
    spent = dict.fromkeys(cells.SPENT, 1)
    cell = {"seed": 7, "key": "abc", "marks_key": "marks-1", "marks": {"performance": 0.5}, **spent, **changes}
    return {"contestants": {"ours": {"tried": [cell], "cells": [cell]}}}


def read(path):
    return json.loads(path.read_text())


def test_a_cell_of_the_results_counts_as_made_where_its_key_is_looked_for(cells, tmp_path):
    cells.put_back("demo", world_of(cells))
    assert read(tmp_path / "demo-7" / "abc" / "marks-1.json") == {"performance": 0.5}
    made = read(tmp_path / "demo-7" / "abc" / "made.json")
    assert made == {"contestant": "ours", **dict.fromkeys(cells.SPENT, 1)}


def test_a_cell_that_is_there_stays_and_one_half_made_goes(cells, tmp_path):
    folder = tmp_path / "demo-7" / "abc"
    (folder / "model").mkdir(parents=True)
    (folder / "marks-1.json").write_text("{}")
    cells.put_back("demo", world_of(cells))
    assert read(folder / "marks-1.json") == {"performance": 0.5} and not (folder / "model").exists()
    (folder / "model").mkdir()
    cells.put_back("demo", world_of(cells, marks={"performance": 0.1}))
    assert read(folder / "marks-1.json") == {"performance": 0.5}


def test_making_anew_takes_out_what_came_from_the_results_or_of_other_code(cells, tmp_path):
    cells.put_back("demo", world_of(cells))
    for key, code in (("own", cells.source()), ("older", "1")):
        cells.put_back("demo", world_of(cells, key=key, source=code))
        (tmp_path / "demo-7" / key / "model").mkdir()
    cells.put_back("stories", world_of(cells))
    cells.take_out("demo", [7, 8], ["SSD"])
    assert len(list((tmp_path / "demo-7").iterdir())) == 3  # of a contestant that was not asked for
    cells.take_out("demo", [7, 8], ["SSD", "ours"])
    assert [one.name for one in (tmp_path / "demo-7").iterdir()] == ["own"]
    assert [one.name for one in (tmp_path / "stories-7").iterdir()] == ["abc"]  # of a world that was not asked for


def test_a_cell_without_a_key_stays_where_it_is(cells, tmp_path):
    world = world_of(cells)
    del world["contestants"]["ours"]["cells"][0]["key"]
    cells.put_back("demo", world)
    assert not list(tmp_path.iterdir())


def test_the_benchs_own_code_counts_as_source(cells, monkeypatch, tmp_path):
    before = cells.source()
    for name in cells.MAKERS:
        (tmp_path / f"{name}.py").write_bytes((Path(BENCH) / f"{name}.py").read_bytes())
    monkeypatch.setattr(cells, "__file__", str(tmp_path / "arena_cells.py"))
    assert cells.source() == before
    (tmp_path / "arena_rivals.py").write_text("changed")
    assert cells.source() != before


def imported_by(name, left_out):
    """The bench's modules that a module of it imports, by itself or through others."""
    tree = list(ast.walk(ast.parse((Path(BENCH) / f"{name}.py").read_text())))
    named = {one.module for one in tree if isinstance(one, ast.ImportFrom)}
    named |= {alias.name for one in tree if isinstance(one, ast.Import) for alias in one.names}
    own = {one for one in named - left_out if (Path(BENCH) / f"{one}.py").exists()}
    return own.union(*(imported_by(one, left_out | own) for one in own))


def test_the_source_of_a_cell_covers_all_of_the_bench_that_makes_and_measures_it(cells):
    elsewhere = {"arena_worlds", "results_page"}  # a world counts by its content, a page by what it shows
    assert set(cells.MAKERS) == {"arena_cells", *imported_by("arena_cells", elsewhere)}


# --- what marks are worth ---------------------------------------------------------------------------------------------

ALL_KEPT = {"final": 0.9, "taught": 0.9, "bystander": 0.8}


def marks_of(level, kept=ALL_KEPT, area=None, start=None):
    """Marks of a checkpoint on which everything that tells what it knows of the forget set is `level`."""
    curve = [[0, level if start is None else start], [40, level]]
    return {
        **dict.fromkeys(("performance", "extraction_strength", "truth_ratio", "forget_quality"), level),
        "membership": dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"), level),
        "sets": {name: {"performance": one, "loss": 1.0} for name, one in kept.items()},
        "relearning": {"area": level if area is None else area, "curve": curve},
        "rounded": {"nf4": level, "int8": level},
        "sampled": {"contains": level, "rouge_l_recall": level},
        "reworded": {"performance": level, "extraction_strength": level},
        "parameters": 100,
        "prefill": 1.0,
    }


ORIGINAL, REFERENCE = marks_of(1.0), marks_of(0.4)


def test_the_reference_scores_one_and_the_original_nothing(bench):
    judge = bench("arena_marks").judge
    own, untouched = judge(REFERENCE, ORIGINAL, REFERENCE), judge(ORIGINAL, ORIGINAL, REFERENCE)
    assert own["composite"] == own["composite_relearning"] == pytest.approx(1.0)
    assert untouched["composite"] == untouched["composite_relearning"] == 0.0
    assert untouched["kept"] == {"final": 1.0, "taught": 1.0, "bystander": 1.0}


def test_both_directions_count(bench):
    """0.2 below the reference's 0.4 is as far as 0.2 above it; what is kept beyond the original counts as kept."""
    judge = bench("arena_marks").judge
    below, above = (judge(marks_of(level, area=0.4), ORIGINAL, REFERENCE) for level in (0.2, 0.6))
    assert below["composite"] == pytest.approx(above["composite"])
    assert below["memorisation"] == below["privacy"] == pytest.approx(1 - 0.2 / 0.6)
    assert judge(marks_of(0.4, kept={**ALL_KEPT, "final": 1.0}), ORIGINAL, REFERENCE)["utility"] == pytest.approx(1.0)


def test_relearning_counts_above_the_references_alone_and_its_rise_from_where_it_begins(bench):
    judge = bench("arena_marks").judge
    back = judge(marks_of(0.4, area=0.7, start=0.5), ORIGINAL, REFERENCE)
    assert back["relearning_gap"] == pytest.approx(0.3) and back["relearning_rise_gap"] == pytest.approx(0.2)
    assert back["composite"] == pytest.approx(1.0)
    assert back["composite_relearning"] == pytest.approx(4 / (3 + 1 / (1 - 0.3 / 0.6)))
    assert judge(marks_of(0.4, area=0.1), ORIGINAL, REFERENCE)["composite_relearning"] == pytest.approx(1.0)


# --- what the page says -----------------------------------------------------------------------------------------------


def contestant(role, scores, left=0.7, bystander=0.95):
    cells = [
        {
            **{"seed": seed, "composite": one, "composite_relearning": one, "left": left, "forget": 0.4},
            **{"kept": {"final": 0.96, "taught": 0.99, "bystander": bystander}, "performance_gap": 0.0},
            **{"prefill": 1.4, "rounded_gap": {"nf4": 0.0}, "relearning_gap": 0.05},
        }
        for seed, one in enumerate(scores)
    ]
    return {"role": role, "cells": cells}


def asked(bench, **others):
    """The answers on the page, each by the beginning of what was asked."""
    world = {"contestants": {"ours": contestant("ours", (0.90, 0.92, 0.94)), **others}}
    lines = bench("arena_asked").asked_table(world, "ours").splitlines()[2:]
    cells = [[one.strip() for one in line.strip("|").split("|")] for line in lines]
    return {what: (came, met) for what, came, met in cells}


def test_a_lead_is_sure_or_in_the_mean_and_a_sure_defeat_is_named(bench):
    sure, level = contestant("rival", (0.80, 0.83, 0.84)), contestant("rival", (0.80, 0.96, 0.90))
    ahead = "ahead of every rival, with relearning (1 rival measured)"
    assert asked(bench, one=sure)[ahead][1] == "yes"
    assert asked(bench, one=level)[ahead][1] == "in the mean"
    both = asked(bench, one=level, another=contestant("rival", (0.89, 0.96, 0.94)), a_third=sure)
    came, met = both["ahead of every rival, with relearning (3 rivals measured)"]
    assert came.startswith("-0.010") and came.endswith("another") and met == "**no**"
    beaten = asked(bench, one=level, another=contestant("rival", (0.91, 0.931, 0.95)))
    assert beaten["ahead of every rival, with relearning (2 rivals measured)"][1] == "**no**, surely behind another"


def test_a_mask_that_ends_larger_is_named_and_does_not_count(bench):
    larger = contestant("control", (0.99, 0.99, 0.99), left=0.9)
    answers = asked(bench, chance=larger, other=contestant("control", (0.80, 0.83, 0.84)))
    what = "surely ahead of every mask of equal size, with relearning ({} measured; chance: larger, for the floor)"
    assert answers[what.format(1)] == ("+0.097 (+0.082 to +0.111), other", "yes")
    assert asked(bench, chance=larger)[what.format(0)] == ("none measured", "**no**")


FAULTS = """
import sys, torch
from resource import RUSAGE_SELF, getrusage
sys.path.insert(0, sys.argv[1])
from arena_marks import keep_memory

def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return getrusage(RUSAGE_SELF).ru_minflt - before

at_first = faults()
keep_memory()
faults()
print(at_first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_stays_with_the_process_takes_no_page_faults():
    told = subprocess.run([sys.executable, "-c", FAULTS, BENCH], capture_output=True, text=True, check=True).stdout
    at_first, then = map(int, told.split()[-2:])
    if at_first < 100:
        pytest.skip("this machine's pages are huge, or it counts none")
    assert 10 * then < at_first


def test_bystanders_are_held_against_whoever_keeps_most(bench):
    best = contestant("rival", (0.80, 0.80, 0.80), bystander=0.99)
    answers = asked(bench, best=best, chance=contestant("control", (0.8, 0.8, 0.8), bystander=0.9))
    what = "bystanders at most 0.03 behind the contestant that keeps most of them"
    assert answers[what] == ("0.040 ± 0.000, best", "**no**")


def limits(bench, *kept):
    """What the page says of the withheld rows and of the bystanders, of as many seeds as there are numbers."""
    ours, best = contestant("ours", [0.9] * len(kept)), contestant("rival", [0.8] * len(kept), bystander=0.95)
    for cell, one in zip(ours["cells"], kept, strict=True):
        cell["kept"] |= {"final": one, "bystander": one}
    answers = asked(bench, ours=ours, best=best)
    rows = "of withheld rows, at least 0.95 kept"
    return answers[rows], answers["bystanders at most 0.03 behind the contestant that keeps most of them"]


def test_a_limit_is_met_by_the_whole_interval_or_in_the_mean(bench):
    assert limits(bench, 0.960, 0.961, 0.962)[0] == ("0.961 ± 0.002; 3 of 3 seeds", "yes")
    assert limits(bench, 0.930, 0.960, 0.990)[0] == ("0.960 ± 0.075; 2 of 3 seeds", "in the mean")
    assert limits(bench, 0.930, 0.940, 0.950)[0] == ("0.940 ± 0.025; 1 of 3 seeds", "**no**")
    assert limits(bench, 0.960)[0] == ("0.960; 1 of 1 seed", "yes")
    behind = [limits(bench, *kept)[1][1] for kept in ((0.93, 0.93), (0.91, 0.95), (0.91, 0.91))]
    assert behind == ["yes", "in the mean", "**no**"]


def test_a_point_at_the_end_of_what_was_tried_is_named(bench):
    page, cells = bench("arena_page"), [{"point": {"alpha": one, "steering": 1.0}} for one in (20.0, 40.0, 60.0, 80.0)]
    text = {one: page._point({"point": {"alpha": one, "steering": 1.0}, "tried": cells}) for one in (40.0, 80.0)}
    assert text == {40.0: "alpha 40, steering 1", 80.0: "alpha 80, steering 1, its grid's end"}
    assert page._point({"point": {"alpha": 40.0}, "tried": [{"point": {"alpha": 40.0}}]}) == "alpha 40"
    assert page._point({"point": {}, "tried": [{"point": {}}]}) == "-"


def test_how_runs_ended_is_counted_and_a_rivals_does_not_count(bench):
    page, cells = bench("arena_page"), [{"outcome": one} for one in ("target_reached", "floor_reached", None)]
    assert page._ended({"role": "control", "cells": cells}) == "target_reached 1, floor_reached 1"
    assert page._ended({"role": "rival", "cells": cells}) == "-" == page._ended({"role": "ours", "cells": cells[2:]})


# --- which cells are made ---------------------------------------------------------------------------------------------


def test_beyond_an_edge_of_a_grid_one_more_point_is_tried(bench):
    module = bench("arena_contestants")
    low, inner, high = module.RATIOS.tried
    assert module.RATIOS.default() == inner and module.RATIOS.beyond(inner) == []
    assert module.RATIOS.beyond(low) == [module.RATIOS.below] and module.RATIOS.beyond(high) == [module.RATIOS.above]
    alone = module.Grid()
    assert alone.beyond(alone.default()) == []


class NamedWorld(NamedTuple):
    """All that a contest asks of a world before anything is made."""

    name: str
    seed: int


def test_the_first_seed_chooses_the_point_and_the_one_beyond_may_win(bench, monkeypatch):
    contest, grids = bench("arena_contest").Contest, bench("arena_contestants").Grid
    points = [{"at": one} for one in range(5)]
    grid = grids((points[1], points[2], points[3]), points[0], points[4])
    made = contest([NamedWorld("demo", 7), NamedWorld("demo", 8)], {"SSD": grid, "ours": grids()})
    monkeypatch.setattr(contest, "judged", lambda self, cell: {"composite_relearning": cell.point.get("at", 0)})
    assert [(cell.contestant, cell.point) for cell in made.first()][:3] == [("SSD", one) for one in points[1:4]]
    assert [(cell.contestant, cell.point) for cell in made.further()] == [("SSD", points[4])]
    chosen = [(cell.world.seed, cell.contestant, cell.point) for cell in made.others()]
    assert chosen == [(8, "SSD", points[4]), (8, "ours", {})]
    monkeypatch.setattr(contest, "judged", lambda self, cell: {"composite_relearning": cell.point == points[2]})
    inner = contest(made.worlds, {"SSD": grid})
    assert list(inner.further()) == [] and [cell.point for cell in inner.others()] == [points[2]]


# --- what a call keeps of earlier ones --------------------------------------------------------------------------------


def earlier_world(names, ends, **changes):
    cell = {"seed": 7, "marks": marks_of(0.5), "composite": 0.0, "machine": "2 cores"}
    contestants = {name: {"role": "rival", "tried": [cell], "cells": [cell]} for name in names}
    begun_with = {"seeds": [7], "sparsity": 0.33, "relearning_radius": 2.0, "ends": {"7": ends}}
    return {**begun_with, "contestants": contestants, **changes}


ENDS = {"original": ORIGINAL, "reference": REFERENCE}


def test_other_contestants_and_worlds_stay(bench):
    kept, newer = bench("arena_earlier").Kept, earlier_world(("NPO, all weights", "RMU"), ENDS)
    older = {"stories": earlier_world(("SSD",), ENDS), "demo": earlier_world(("SSD", "RMU"), ENDS)}
    both = kept(older, replaces=False).joined({"demo": newer})
    assert list(both) == ["demo", "stories"] and list(both["demo"]["contestants"]) == ["NPO, all weights", "RMU", "SSD"]
    assert both["demo"]["contestants"]["RMU"] is newer["contestants"]["RMU"]
    assert kept({}, replaces=False).joined({"demo": newer}) == {"demo": newer}


def test_results_that_a_call_does_not_fit_end_it_or_go(bench, capsys):
    kept, newer = bench("arena_earlier").Kept, earlier_world(("RMU",), ENDS)
    older = {"demo": earlier_world(("SSD",), ENDS), "stories": earlier_world(("SSD",), ENDS)}
    with pytest.raises(SystemExit, match=r"results of demo stay as they are\n  why: too old\n  fix: (?s:.*)--replace"):
        kept(older, replaces=False).settle("demo", "too old")
    replacing = kept(older, replaces=True)
    replacing.settle("stories", None)
    replacing.settle("demo", "too old")
    assert capsys.readouterr().out == "demo: too old; the results of SSD go\n"
    both = replacing.joined({"demo": newer, "stories": newer})
    assert {name: list(one["contestants"]) for name, one in both.items()} == {
        "demo": ["RMU"],
        "stories": ["RMU", "SSD"],
    }


def test_it_is_told_why_a_call_does_not_fit_results(bench):
    module, older = bench("arena_earlier"), earlier_world(("SSD", "RMU"), ENDS)
    assert module.unlike_points(None, [8], ["SSD"], True, on_gpu=True) is None
    assert module.unlike_points(older, [7], ["SSD"], True, on_gpu=False) is None  # its grid was not searched either
    assert module.unlike_points(older, [7, 8], ["SSD"], False, False) == "they are of seeds 7, this call is of 7, 8"
    on_gpu = module.unlike_points(older, [7], ["SSD"], False, on_gpu=True)
    assert on_gpu == "they were made on 2 cores, this call is on a GPU"
    older["contestants"]["SSD"]["tried"] *= 2
    assert module.unlike_points(older, [7], ["RMU"], True, on_gpu=False) is None
    assert "points of SSD were searched" in module.unlike_points(older, [7], ["SSD", "RMU"], True, on_gpu=False)
    assert module.unlike_models(None, older) is None is module.unlike_models(older, older)
    assert module.unlike_models(older, {**older, "sparsity": 0.2}) == "they are by sparsity 0.33, this call is not"
    other = {"7": {**ENDS, "reference": ORIGINAL}}
    assert "models of seeds 7 came out otherwise" in module.unlike_models(older, {**older, "ends": other})


def test_results_of_unknown_contestants_are_named(bench, monkeypatch, tmp_path):
    module, path = bench("arena_earlier"), tmp_path / "arena.json"
    monkeypatch.setattr(module, "results_path", lambda name: path)
    assert module.earlier() == {}
    path.write_text(json.dumps({"demo": earlier_world(("SSD", "an older name"), ENDS)}))
    with pytest.raises(SystemExit, match="does not know: an older name"):
        module.earlier()


def test_earlier_numbers_are_made_again_of_their_marks(bench):
    module, marks = bench("arena_earlier"), bench("arena_marks")
    cell = module.judged_again(earlier_world(("SSD",), ENDS))["contestants"]["SSD"]["cells"][0]
    assert cell["composite"] == marks.judge(marks_of(0.5), ORIGINAL, REFERENCE)["composite"] > 0


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_that_fails_keeps_no_other_from_its_end_and_is_named(cells, tmp_path):
    made = [tmp_path / name for name in ("first", "last")]
    tasks = {"one": partial(Path.touch, made[0]), "two": partial(sys.exit, 3), "three": partial(Path.touch, made[1])}
    with pytest.raises(SystemExit, match=r"Not made: two \(exit code 3\)\n  why"):
        cells.in_processes(tasks, 1)
    assert all(one.exists() for one in made)


def test_where_a_process_cannot_begin_none_is_left_and_it_is_said_why(cells):
    with pytest.raises((AttributeError, PicklingError), match="lambda"):
        cells.in_processes({"one": partial(time.sleep, 60), "two": lambda: None}, 2)
    assert not active_children()
