"""Contest of one world: which cells there are, in the order in which they can be made, and what came of them.

Reads    a world of each seed, the grids of those that compete; their marks, once these are there
Gives    Contest
Source   -
Symbols  a cell = one point of one contestant on one seed of one world
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from arena_cells import Cell, End
from arena_contestants import CONTESTANTS, Grid
from arena_marks import judge
from arena_worlds import Values, World

from loraprune.attacked import Role

ENDS: tuple[Role, ...] = ("original", "reference")


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

    def begun_with(self) -> Values:
        """Return what a world's results have in common: what is asked of ours, and the marks of the models."""
        first = self.worlds[0]
        ends = {str(seed): {role: end.marks() for role, end in ends.items()} for seed, ends in self.ends.items()}
        asked = {"sparsity": first.sparsity, "relearning_radius": first.settings.relearning_radius}
        return {**asked, "seeds": [world.seed for world in self.worlds], "ends": ends}

    def first(self) -> Iterator[Cell]:
        """Give what is tried first."""
        for key in self.grids:
            yield from self._tried_first(key)

    def further(self) -> Iterator[Cell]:
        """Give what is tried beside the best of these, where that is at an edge."""
        for key in self.grids:
            yield from self._tried_further(key)

    def others(self) -> Iterator[Cell]:
        """Give the other seeds' cells, once the points are chosen."""
        for cells in self.chosen.values():
            yield from cells[1:]

    def _tried_first(self, key: str) -> list[Cell]:
        return self._at(key, self.grids[key].tried)

    def _tried_further(self, key: str) -> list[Cell]:
        return self._at(key, self.grids[key].beyond(self._best(self._tried_first(key)).point))

    def _at(self, key: str, points: Sequence[Values]) -> list[Cell]:
        return [Cell(self.worlds[0], "unlearned", key, point) for point in points]

    def _best(self, cells: Sequence[Cell]) -> Cell:
        return max(cells, key=lambda cell: self.judged(cell)["composite_relearning"])

    @cached_property
    def tried(self) -> dict[str, list[Cell]]:
        """Return the cells that choose a contestant's point."""
        return {key: self._tried_first(key) + self._tried_further(key) for key in self.grids}

    @cached_property
    def chosen(self) -> dict[str, list[Cell]]:
        """Return every contestant's cells at its best point, the first seed's first."""
        best = {key: self._best(cells) for key, cells in self.tried.items()}
        return {key: [replace(one, world=world) for world in self.worlds] for key, one in best.items()}

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
        return {**self.begun_with(), "contestants": contestants}
