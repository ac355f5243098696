"""The arena: its store of cells, what marks are worth, what the page says was met, and what it keeps of earlier calls."""

import ast
import importlib
import json
import sys
from functools import partial
from pathlib import Path

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
    cells.take_out({"demo": [7, 8]})
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
    what = "surely ahead of every mask of equal size (chance: larger, for the floor), with relearning"
    assert answers[what] == ("+0.097 (+0.082 to +0.111), other", "yes")
    assert asked(bench, chance=larger)[what] == ("none measured", "**no**")


def test_bystanders_are_held_against_whoever_keeps_most(bench):
    best = contestant("rival", (0.80, 0.80, 0.80), bystander=0.99)
    answers = asked(bench, best=best, chance=contestant("control", (0.8, 0.8, 0.8), bystander=0.9))
    what = "bystanders at most 0.03 behind the contestant that keeps most of them"
    assert answers[what] == ("0.040 ± 0.000, best", "**no**")


# --- what a call keeps of earlier ones --------------------------------------------------------------------------------


def earlier_world(names, ends, **changes):
    cell = {"seed": 7, "marks": marks_of(0.5), "composite": 0.0}
    contestants = {name: {"role": "rival", "tried": [cell], "cells": [cell]} for name in names}
    return {
        "seeds": [7],
        "sparsity": 0.33,
        "relearning_radius": 2.0,
        "ends": {"7": ends},
        "contestants": contestants,
        **changes,
    }


ENDS = {"original": ORIGINAL, "reference": REFERENCE}


def test_other_contestants_stay(bench):
    arena = bench("arena")
    older, newer = earlier_world(("SSD", "RMU"), ENDS), earlier_world(("NPO, all weights", "RMU"), ENDS)
    both = arena.joined(older, newer)["contestants"]
    assert list(both) == ["NPO, all weights", "RMU", "SSD"] and both["RMU"] is newer["contestants"]["RMU"]
    assert arena.joined(None, newer) == newer


def test_a_call_that_would_take_the_place_of_results_is_refused(bench):
    arena, older = bench("arena"), earlier_world(("SSD", "RMU"), ENDS)
    asked = {name: older[name] for name in ("sparsity", "relearning_radius")}
    arena.check_points("demo", None, [8], ["SSD"], True)
    arena.check_points("demo", older, older["seeds"], ["SSD"], True)  # its grid was not searched either
    arena.check_models("demo", older, asked, older["ends"])
    with pytest.raises(SystemExit, match=r"why: they are of seeds 7, this call is of 7, 8\n  fix: .*--replace"):
        arena.check_points("demo", older, [7, 8], ["SSD"], False)
    older["contestants"]["SSD"]["tried"] *= 2
    arena.check_points("demo", older, older["seeds"], ["RMU"], True)
    with pytest.raises(SystemExit, match="points of SSD were searched"):
        arena.check_points("demo", older, older["seeds"], ["SSD", "RMU"], True)
    with pytest.raises(SystemExit, match=r"they are by sparsity 0\.33"):
        arena.check_models("demo", older, {**asked, "sparsity": 0.2}, older["ends"])
    with pytest.raises(SystemExit, match="models of seeds 7 came out otherwise"):
        arena.check_models("demo", older, asked, {"7": {**ENDS, "reference": ORIGINAL}})


def test_beyond_an_edge_of_a_grid_one_more_point_is_tried(bench):
    module = bench("arena_contestants")
    low, inner, high = module.RATIOS.tried
    assert module.RATIOS.default() == inner and module.RATIOS.beyond(inner) == []
    assert module.RATIOS.beyond(low) == [module.RATIOS.below] and module.RATIOS.beyond(high) == [module.RATIOS.above]
    assert module.RATIOS.is_outermost(module.RATIOS.above) and not module.RATIOS.is_outermost(high)
    alone = module.Grid()
    assert alone.beyond(alone.default()) == [] and not alone.is_outermost(alone.default())


def test_a_process_that_fails_keeps_no_other_from_its_end_and_is_named(cells, tmp_path):
    made = [tmp_path / name for name in ("first", "last")]
    tasks = {"one": partial(Path.touch, made[0]), "two": partial(sys.exit, 3), "three": partial(Path.touch, made[1])}
    with pytest.raises(SystemExit, match=r"Not made: two \(exit code 3\)\n  why"):
        cells.in_processes(tasks, 1)
    assert all(one.exists() for one in made)


def test_earlier_numbers_are_made_again_of_their_marks(bench):
    arena, marks = bench("arena"), bench("arena_marks")
    cell = arena.judged_again(earlier_world(("SSD",), ENDS))["contestants"]["SSD"]["cells"][0]
    assert cell["composite"] == marks.judge(marks_of(0.5), ORIGINAL, REFERENCE)["composite"] > 0
