"""Steering: where a run is to arrive, what no accepted step may break, and the look at a model that tells.

Reads    settings and what the untouched model (and the reference) knew; a live model and the rows that steer
Gives    Target, Ceiling, Limits, find_target, find_spread, find_ceilings, find_limits, Probe, Probes, take_look
Source   -
Symbols  P = performance; a limit that is measured as NaN is broken
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraprune.data import Example
from loraprune.evaluate import measure
from loraprune.interval import ratio_interval
from loraprune.mask import LiveMask
from loraprune.records import Limit, Look, Mask, ModelGroups
from loraprune.settings import Settings

LEAST_HALF_BAND = 0.03
FADE, LEAST_FADE = 1.5, 2 * LEAST_HALF_BAND  # from how far above the target the push fades: in targets, at least
LEAST_SURE = 1e-4  # P closer to 0 or 1 counts as so far off
ONE_PLACE = 0.01  # about so far apart P of two rows must be for them to have ranks of their own
LEAST_ROWS = 20  # of the holdout: fewer say too little of how far apart rows lie
NOT_LOOKED_AT = ("taught", "final", "holdout", "bystander")  # while the run trains
End = TypeVar("End")


@dataclass(frozen=True)
class Target:
    """Where P(forget) is steered: the value, the band around it, and what set it."""

    performance: float
    low: float
    high: float
    source: str

    def way_left(self, performance: float, before: float) -> float:
        """Return which part of the last way down to the target is left, in [-1, 1].

        0 at the target, below 0 beneath it; where the way would lead up, 1 above the target and 0 beneath.
        """
        if before <= self.performance:
            return float(performance > self.performance)
        return max(-1.0, min(1.0, (performance - self.performance) / self.last_way(before)))

    def last_way(self, before: float) -> float:
        """Return how far above the target the push begins to fade: as P before, or less where the target is low.

        Faded from P before on, it would be nothing long before a low target is reached.
        """
        return min(max(before, self.high) - self.performance, max(LEAST_FADE, FADE * self.performance))

    def holds(self, performance: float) -> bool:
        return self.low <= performance <= self.high

    def as_values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def distance(self, performance: float) -> float:
        """Return how far P(forget) is outside the band; 0 inside."""
        return max(0.0, performance - self.high, self.low - performance)


@dataclass(frozen=True)
class Ceiling:
    """What P of an earlier request's forget set is held at (`rest`), and what it must not rise above (`high`)."""

    rest: float
    high: float


@dataclass(frozen=True)
class Limits:
    """What every accepted step and the written model hold."""

    min_retain_performance: float = 0.0
    max_guard_loss_ratio: float | None = None
    ceilings: tuple[float, ...] = ()
    min_forget: float | None = None  # the band's lower end; None where nothing can be overshot
    forget_high: float | None = None  # P(forget) above which forgetting needs room; None: nowhere, -inf: everywhere
    room: float | None = None  # lowest retention that a cut may leave, for what is above it is forgetting's

    def broken(self, look: Look) -> tuple[Limit, ...]:
        """Return the limits that the model breaks."""
        held: dict[Limit, bool] = {}
        if self.room is None:
            held["floor"] = look.retention >= self.min_retain_performance
        if self.max_guard_loss_ratio is not None and look.guard_loss_ratio is not None:
            held["guard"] = look.guard_loss_ratio <= self.max_guard_loss_ratio
        held["ceiling"] = all(now <= high for now, high in zip(look.already_forgotten, self.ceilings, strict=True))
        if self.min_forget is not None and look.forget is not None:
            held["band"] = look.forget >= self.min_forget
        if self.room is not None:  # which lies above the floor
            held["room"] = look.retention >= self.room
        return tuple(name for name, one in held.items() if not one)

    def of_cut(self, look: Look) -> "Limits":
        """Return the limits of a cut in a model that looks like this.

        While P(forget) is above `forget_high`, a cut may take half of the room that is left above the floor: what is
        forgotten costs retention too, and cuts that took all of it would leave the forget set known.
        """
        least = self.min_retain_performance
        if self.forget_high is None or not ((look.forget or 0.0) > self.forget_high and look.retention > least):
            return self
        return dataclasses.replace(self, room=(look.retention + least) / 2)


def half_band(value: float, settings: Settings) -> float:
    """Return how far P may be from a natural value and still count as there."""
    return settings.band if settings.band is not None else max(LEAST_HALF_BAND, value / 4)


def find_target(settings: Settings, before: Mapping[str, Any]) -> Target | None:
    """Return where P(forget) is steered: the reference's, else the holdout's, else as set, else a tenth of before."""
    if not settings.is_unlearning:
        return None
    if "reference" in before:
        value, source = before["reference"]["forget"]["performance"], "reference"
    elif "holdout" in before:
        value, source = before["holdout"]["performance"], "holdout"
    elif settings.forget_target is not None:
        value, source = settings.forget_target, "forget_target"
    else:
        value, source = before["forget"]["performance"] / 10, "tenth"
    half = half_band(value, settings)
    return Target(value, value - half, value + half, source)


def find_spread(settings: Settings, before: Mapping[str, Any], target: Target | None) -> tuple[float, ...]:
    """Return P of the holdout's rows under the given model, in rising order, moved to have the target as their mean.

    Empty where only the mean of the forget rows is to be steered: also when the holdout has fewer than 20 rows.
    """
    rows = before["rows"].get("holdout", ())
    if target is None or not settings.natural_spread or len(rows) < LEAST_ROWS:
        return ()
    return moved_to(target.performance, rows)


def moved_to(mean: float, performances: Sequence[float]) -> tuple[float, ...]:
    """Return performances in rising order, all moved by as many log-odds as give them another mean."""
    odds = torch.tensor(performances, dtype=torch.float64).logit(LEAST_SURE).sort().values
    low, high = -2 * float(odds.abs().max()) - 10, 2 * float(odds.abs().max()) + 10
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if float((odds + middle).sigmoid().mean()) < mean else (low, middle)
    return tuple((odds + low).sigmoid().tolist())


def find_ceilings(settings: Settings, before: Mapping[str, Any], names: Sequence[str]) -> tuple[Ceiling, ...]:
    """Return the ceiling of each earlier request's set: the band's upper end around the reference's P.

    Without a reference, around what the model to start from has. A set that is above already must not rise further.
    """

    def ceiling(name: str) -> Ceiling:
        now = before[name]["performance"]
        rest = before["reference"][name]["performance"] if "reference" in before else now
        return Ceiling(rest, max(rest + half_band(rest, settings), now))

    return tuple(map(ceiling, names))


def find_limits(
    settings: Settings, before: Mapping[str, Any], target: Target | None, ceilings: Sequence[Ceiling]
) -> Limits:
    """Return what every accepted step must hold; where P(forget) starts below the band it cannot be overshot."""
    starts_above = target is not None and 0.0 < target.low <= before["forget"]["performance"]
    pushed = settings.pushes_down and settings.min_retain_performance > 0
    return Limits(
        settings.min_retain_performance,
        settings.max_guard_loss_ratio if settings.guard is not None else None,
        tuple(one.high for one in ceilings),
        target.low if target is not None and starts_above else None,
        target.high if target is not None and pushed else None,
    )


@dataclass(frozen=True)
class Probe:
    """Rows that are measured at every look; rows of one fact have the same number in `facts`."""

    examples: Sequence[Example]
    facts: Sequence[int]


@dataclass(frozen=True)
class Probes:
    """The sets by which a run is steered, and what the original model knew of them."""

    floor: Probe
    floor_before: Sequence[float]  # P of each floor row
    pad_token_id: int
    batch_size: int
    forget: Probe | None = None
    guard: Sequence[Example] = ()
    guard_loss_before: float = 0.0
    already_forgotten: tuple[Sequence[Example], ...] = ()


def take_look(model: nn.Module, live: LiveMask, probes: Probes) -> Look:
    """Return the model as it is now, mask and adapters included, in the numbers that steer."""
    return look_at(model, live.groups, live.value, probes)


def look_at(model: nn.Module, groups: ModelGroups, mask: Mask, probes: Probes) -> Look:
    """Return a model without what the mask removes, masked or cut, in the numbers that steer."""

    def measured(examples: Sequence[Example]) -> Any:
        return measure(model, examples, batch_size=probes.batch_size, pad_token_id=probes.pad_token_id)

    kept = measured(probes.floor.examples).row_performance
    forget = measured(probes.forget.examples) if probes.forget else None
    return Look(
        sparsity=mask.sparsity(groups),
        retention=sum(kept) / sum(probes.floor_before),
        retention_interval=ratio_interval(kept, probes.floor_before, probes.floor.facts),
        forget=forget.performance if forget else None,
        forget_interval=forget.interval(probes.forget.facts) if forget and probes.forget else None,
        guard_loss_ratio=measured(probes.guard).loss / probes.guard_loss_before if probes.guard else None,
        already_forgotten=tuple(measured(one).performance for one in probes.already_forgotten),
        groups={kind: tuple(mask.kept[kind].sum(1).tolist()) for kind in groups.layers},
    )


def scale_original(
    original: Mapping[str, Any], before: Mapping[str, Any], rounded: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the original would know, rounded as the given model is: looks on it then charge no rounding to a run.

    Of every withheld row and the guard that is what the rounded model knows, times the original's mean over the given
    model's; the two are one where this is the first request.
    """
    sets = dict(original["sets"])
    floor, guard = sets["floor"], sets.get("guard")
    factor = floor["performance"] / before["floor"]["performance"]
    rows = [factor * one for one in rounded["rows"]["floor"]]
    sets["floor"] = {**floor, "performance": sum(rows) / len(rows), "row_performance": rows}
    if guard is not None:
        sets["guard"] = {**guard, "loss": rounded["guard"]["loss"] * guard["loss"] / before["guard"]["loss"]}
    return {**original, "sets": sets}


@dataclass(frozen=True)
class Steering:
    """All that steers a run: what is looked at, what must hold, where P(forget) is to arrive and where it began.

    `spread`: how far apart the forget rows' P are to lie; empty where their mean alone is steered.
    """

    probes: Probes
    limits: Limits = Limits()
    target: Target | None = None
    ceilings: tuple[Ceiling, ...] = ()
    forget_before: float | None = None
    spread: tuple[float, ...] = ()

    def ways_left(self, performances: Tensor) -> Tensor:
        """Return which part of its way down each row of a forget batch has left, (b,), in [-1, 1].

        1 `last_way` above the row's goal or further, 0 at it, below 0 beneath. With a spread the rows are ranked by P
        and the goal of a rank is that quantile of the spread; rows that are nearly alike share their ranks, so that no
        rounding changes them, and the goals of a batch have the target as their mean. Without a spread, or where a P is
        not finite, all rows have the way that their mean has left to the target.
        """
        target, before = self.target, self.forget_before
        if target is None or before is None:
            return torch.ones_like(performances)
        if not self.spread or before <= target.performance or not performances.isfinite().all():
            return torch.full_like(performances, target.way_left(float(performances.mean()), before))
        apart = (performances[:, None] - performances[None, :]).double() / ONE_PLACE
        goals = torch.tensor(self.spread).double().quantile(apart.sigmoid().mean(1).cpu()).to(performances)
        goals += target.performance - goals.mean()
        return ((performances - goals) / target.last_way(before)).clamp(-1.0, 1.0)

    def acceptable(self, look: Look) -> bool:
        """Say whether a model may be written: every limit holds; outside of the band it is only a worse one."""
        return set(self.limits.broken(look)) <= {"band"}

    def distance(self, look: Look) -> float:
        """Return how far P(forget) is outside the band; 0 without a target."""
        return 0.0 if self.target is None or look.forget is None else self.target.distance(look.forget)

    def past_half_way(self, look: Look) -> bool:
        """Say whether P(forget) has come more than half of its way down to the target; False where there is no way."""
        before = self.forget_before
        if self.target is None or before is None or look.forget is None or before <= self.target.performance:
            return False
        return look.forget < (before + self.target.performance) / 2


def first_acceptable(
    ends: Sequence[End], look: Callable[[End], Look], steering: Steering
) -> tuple[End, Look, tuple[Limit, ...]]:
    """Return the first of some ends that may be written, what was seen of it, and the limits that the one before broke.

    The last is taken whatever it breaks.
    """
    broken: tuple[Limit, ...] = ()
    for end in ends[:-1]:
        if steering.acceptable(found := look(end)):
            return end, found, broken
        broken = steering.limits.broken(found)
    found = look(ends[-1])
    return ends[-1], found, broken if steering.acceptable(found) else steering.limits.broken(found)
