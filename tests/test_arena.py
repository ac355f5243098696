"""The arena's store of cells: what the results hold is taken back, and can be made anew."""

import ast
import json
import sys
from pathlib import Path

import pytest

BENCH = str(Path(__file__).resolve().parents[1] / "bench")


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """The bench's module, its cache in an empty folder."""
    monkeypatch.syspath_prepend(BENCH)
    import arena_cells

    monkeypatch.setattr(arena_cells, "CACHE", tmp_path)
    yield arena_cells
    for name in [name for name, one in sys.modules.items() if (getattr(one, "__file__", "") or "").startswith(BENCH)]:
        del sys.modules[name]


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
    cells.take_out()
    assert [one.name for one in (tmp_path / "demo-7").iterdir()] == ["own"]


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
