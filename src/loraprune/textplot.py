"""Text plot: curves on a grid of characters, for a terminal or a log; plain text, no colour.

Reads    points
Gives    text_plot, Curve, Bound
Source   -
Symbols  x in [0, right], y from 0 up; a cell is (column, row), row 0 at y = 0
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isfinite

UNIT, TICK_ROWS = 1 / 16, 4  # y of one row; every fourth row is a quarter
PATH, BOTH = ".", "*"
Cell = tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """Points in the order in which they came, and the letter that marks them."""

    mark: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bound:
    """A level, or the band from `low` to `high`, drawn over the whole width and named at its right end."""

    mark: str
    low: float
    high: float
    name: str


def text_plot(
    curves: Sequence[Curve], bounds: Sequence[Bound], right: float, x_ticks: tuple[str, str, str], width: int
) -> list[str]:
    """Return the plot's lines from the top down; points that are not finite are left out.

    `x_ticks` stand below the left end, the middle and the right end of the x axis; `width` is that of the axis.
    """
    finite = [[(x, y) for x, y in curve.points if isfinite(x) and isfinite(y)] for curve in curves]
    highest = max([1.0, *(y for points in finite for _, y in points)])
    unit = UNIT * ceil(highest / 1.5)
    lines = [[(round(x / right * (width - 1)), round(y / unit)) for x, y in points] for points in finite]
    grid = [[" "] * width for _ in range(round(highest / unit) + 1)]
    names = {row: bound.name for bound in bounds for row in _fill(grid, bound, unit)}
    for cell in (cell for line in lines for cell in _path(line)):
        _put(grid, cell, PATH)
    _put_marks(grid, dict(zip((curve.mark for curve in curves), lines, strict=True)))
    margin = len(_tick(len(grid) - len(grid) % TICK_ROWS, unit))
    drawn = [f"{_tick(row, unit):>{margin}} |{''.join(cells)} {names.get(row, '')}" for row, cells in enumerate(grid)]
    return [*(line.rstrip() for line in reversed(drawn)), *_axis(x_ticks, width, margin)]


def _tick(row: int, unit: float) -> str:
    return f"{row * unit:.2f}" if row % TICK_ROWS == 0 else ""


def _fill(grid: list[list[str]], bound: Bound, unit: float) -> list[int]:
    """Fill the bound's rows and return the middle one; nothing where the bound lies above the plot."""
    rows = range(max(round(bound.low / unit), 0), min(round(bound.high / unit) + 1, len(grid)))
    for row in rows:
        grid[row] = [bound.mark] * len(grid[row])
    return [rows[len(rows) // 2]] if rows else []


def _path(line: Sequence[Cell]) -> Iterator[Cell]:
    """Give the cells on the straight way from each point to the next."""
    for (column, row), (next_column, next_row) in pairwise(line):
        steps = max(abs(next_column - column), abs(next_row - row), 1)
        for step in range(steps):
            yield (
                round(column + (next_column - column) * step / steps),
                round(row + (next_row - row) * step / steps),
            )


def _put(grid: list[list[str]], cell: Cell, mark: str) -> None:
    column, row = cell
    grid[row][column] = mark


def _put_marks(grid: list[list[str]], lines: dict[str, list[Cell]]) -> None:
    """Mark each curve's points, and with BOTH the cells where two curves meet."""
    seen: set[Cell] = set()
    for mark, line in lines.items():
        for cell in line:
            _put(grid, cell, BOTH if cell in seen else mark)
        seen |= set(line)


def _axis(ticks: tuple[str, str, str], width: int, margin: int) -> list[str]:
    left, middle, right = ticks
    words = left + middle.center(width - len(left) - len(right)) + right
    return [" " * margin + " +" + "-" * width, " " * (margin + 2) + words]
