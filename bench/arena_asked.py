"""What was asked of ours in a world of the arena, before any of it was measured, and what came of it.

Reads    a world's values, as arena.py gives them
Gives    asked_table; AREA, KEPT: two of the limits, for the figure; lead_of and spread: how the page writes both
Source   -
Symbols  ahead: ours minus theirs on a composite, paired by seed; surely: the 95% interval holds no 0
"""

from collections.abc import Callable, Iterator, Sequence
from operator import ge, le
from statistics import fmean
from typing import NamedTuple

from arena_marks import TAUGHT, WITHHELD, half_width, paired
from arena_worlds import Values
from results_page import markdown_table

from loraprune.settings import Settings
from loraprune.steering import find_target
from loraprune.words import counted

AREA, KEPT = 0.10, 0.95  # of relearning above the reference's, at most; of withheld rows, at least
KEPT_TAUGHT, BEHIND = 0.98, 0.03  # at least; bystanders behind the contestant that keeps most of them, at most
LEFT, FASTER, ROUNDED = 0.70, 1.30, 0.02  # at most, at least, at most
ALIKE = 0.02  # of the parameters: a mask that leaves more than that above ours, for its floor, is not of equal size
YES, IN_MEAN, NO = "yes", "in the mean", "**no**"
Line = tuple[str, str, str]
Column = Callable[[Values], float]  # a cell's number; NaN: its world has none


class Lead(NamedTuple):
    """How far ours is ahead of a contestant; `half` of the interval, None of a single seed."""

    name: str
    mean: float
    half: float | None

    @property
    def least(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def is_sure(self) -> bool:
        return self.half is not None and self.least > 0

    @property
    def is_sure_defeat(self) -> bool:
        return self.half is not None and self.mean + self.half < 0

    def __str__(self) -> str:
        half = self.half
        return f"{self.mean:+.3f}" + ("" if half is None else f" ({self.mean - half:+.3f} to {self.mean + half:+.3f})")


def asked_table(world: Values, ours: str) -> str:
    """Return a table with a line for each thing asked of ours by its defaults."""
    return markdown_table(["asked of ours, by default", "came", "met"], list(_lines(world, ours)))


def _lines(world: Values, ours: str) -> Iterator[Line]:
    cells = world["contestants"][ours]["cells"]
    inside = [_band_holds(cell) for cell in cells]
    came = f"{sum(inside)} of {counted(len(cells), 'seed')}"
    yield "P(forget) inside the band around the reference's", came, _said(all(inside))
    yield _limit("of withheld rows, at least {} kept", cells, lambda one: one["kept"][WITHHELD], KEPT, ge)
    yield _limit("of taught rows, at least {} kept", cells, lambda one: one["kept"][TAUGHT], KEPT_TAUGHT, ge)
    if "bystander" in cells[0]["kept"]:
        yield _bystanders(world, ours)
    yield _limit("at most {} of the parameters left", cells, lambda one: one["left"], LEFT, le)
    yield _limit("prefill at least {} times as fast", cells, lambda one: one["prefill"], FASTER, ge)
    yield _limit("P(forget) in NF4 at most {} higher", cells, lambda one: one["rounded_gap"]["nf4"], ROUNDED, le)
    area = "relearning area at most {} above the reference's"
    yield _limit(area, cells, lambda one: one["relearning_gap"], AREA, le)
    masks = _of_role(world, "control")
    alike = [key for key in masks if _left(world, key) <= _left(world, ours) + ALIKE]
    if masks:
        larger = [key for key in masks if key not in alike]
        beside = f"; {', '.join(larger)}: larger, for the floor" if larger else ""
        leads = [lead_of(world, ours, key, "composite_relearning") for key in alike]
        what = f"surely ahead of every mask of equal size, with relearning ({len(alike)} measured{beside})"
        yield _led(what, leads, NO)
    if rivals := _of_role(world, "rival"):
        among = f"{counted(len(rivals), 'rival')} measured"
        leads = [lead_of(world, ours, key, "composite_relearning") for key in rivals]
        yield _led(f"ahead of every rival, with relearning ({among})", leads, IN_MEAN)
        leads = [lead_of(world, ours, key, "composite") for key in rivals]
        yield _led(f"behind no rival, without relearning ({among})", leads, IN_MEAN)


def _said(met: bool) -> str:
    return YES if met else NO


def _band_holds(cell: Values) -> bool:
    """Say whether a cell's P(forget) is inside the band: the default one, which every world's runs have."""
    reference = {"forget": {"performance": cell["forget"] - cell["performance_gap"]}}
    target = find_target(Settings(forget="forget"), {"reference": reference})
    assert target is not None
    return target.holds(cell["forget"])


def _limit(what: str, cells: Sequence[Values], of: Column, limit: float, holds: Callable[[float, float], bool]) -> Line:
    """Return the line of a number whose mean over seeds has a limit; `holds`: ge or le."""
    numbers = [of(one) for one in cells]
    kept = f"{sum(holds(one, limit) for one in numbers)} of {counted(len(cells), 'seed')}"
    return what.format(f"{limit:.2f}"), f"{spread(numbers)}; {kept}", _met(numbers, limit, holds)


def _met(numbers: Sequence[float], limit: float, holds: Callable[[float, float], bool]) -> str:
    """Say whether a limit is met: where the whole interval holds it, or the only seed; in the mean where the mean
    does."""
    mean, half = fmean(numbers), half_width(numbers) or 0.0
    if not holds(mean, limit):
        return NO
    return YES if all(holds(mean + one, limit) for one in (-half, half)) else IN_MEAN


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean over seeds ± half of its interval; the number alone of a single seed."""
    half = half_width(values)
    return f"{fmean(values):.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _bystanders(world: Values, ours: str) -> Line:
    rated = [ours, *_of_role(world, "control"), *_of_role(world, "rival")]
    kept = {key: _by_seed(world, key, lambda cell: cell["kept"]["bystander"]) for key in rated}
    best = max(kept, key=lambda key: fmean(kept[key].values()))
    behind = paired(kept[best], kept[ours])
    what = f"bystanders at most {BEHIND:.2f} behind the contestant that keeps most of them"
    return what, f"{spread(behind)}, {best}", _met(behind, BEHIND, le)


def _of_role(world: Values, role: str) -> list[str]:
    return [key for key, one in world["contestants"].items() if one["role"] == role]


def _left(world: Values, key: str) -> float:
    return fmean(cell["left"] for cell in world["contestants"][key]["cells"])


def lead_of(world: Values, ours: str, key: str, name: str) -> Lead:
    """Return by how much ours leads a contestant on a composite, over the seeds that both have."""
    differences = paired(*(_by_seed(world, one, lambda cell: cell[name]) for one in (ours, key)))
    return Lead(key, fmean(differences), half_width(differences))


def _by_seed(world: Values, key: str, of: Column) -> dict[int, float]:
    return {cell["seed"]: of(cell) for cell in world["contestants"][key]["cells"]}


def _led(what: str, leads: Sequence[Lead], in_mean: str) -> Line:
    """Return the line of a lead over all of these; it shows the least of them. `in_mean`: the answer to a lead of all
    of them in the mean, which is not sure."""
    if not leads:
        return what, "none measured", NO
    least = min(leads, key=lambda one: one.mean)
    if all(one.is_sure for one in leads):
        return what, f"{least}, {least.name}", YES
    met = in_mean if least.mean > 0 else NO
    behind = [one.name for one in leads if one.is_sure_defeat]
    return what, f"{least}, {least.name}", met + (f", surely behind {' and '.join(behind)}" if behind else "")
