"""Contestants of the arena: ours, its rivals and its controls, each with the points of its small grid.

Reads    a world, a point
Gives    CONTESTANTS, Contestant
Source   arXiv numbers in the contestants' words; GradDiff, NPO and SimNPO as loraprune.objectives has them
Symbols  a point = the settings, or the rival's own numbers, that a contestant tries; one is its default
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from arena_rivals import AS_IT_IS, damping, full_npo, rmu, rows_of_step, steps_of_rival
from arena_worlds import ASKED, Values, World
from rich.console import Console

from loraprune import trainer
from loraprune.pipeline import run
from loraprune.records import DatasetType, Metric, Sensitivity
from loraprune.scoring import score_model
from loraprune.settings import Settings

Scored = Mapping[DatasetType, Metric | None]  # by what each set is scored; None: all groups alike
ANY_RATIO: Values = {"order": "share", "unlearning_threshold": 0.0, "minimum_forget_sensitivity": 0.0}
NO_FLOOR: Values = {"min_retain_performance": 0.0, "guard": None}
NONE_GOES: Values = {"unlearning_threshold": 1.0, "order": "share", "metric": "random"}
OTHER_SEED = 1000  # added to the world's


@dataclass(frozen=True)
class Grid:
    """A contestant's points in order. `tried` are tried first; where the best of them is the first or the last, so is
    the point beyond it."""

    tried: tuple[Values, ...] = ({},)
    below: Values | None = None
    above: Values | None = None

    def default(self) -> Values:
        """Return the point in the middle: the one of the quick form."""
        return self.tried[len(self.tried) // 2]

    def beyond(self, best: Values) -> list[Values]:
        """Return the point to try beside the best of those tried first, if there is one."""
        sides = [self.below] * (best == self.tried[0]) + [self.above] * (best == self.tried[-1])
        return [point for point in sides if point is not None]


def _grid(name: str, *values: float, **others: Any) -> Grid:
    below, *tried, above = ({name: value, **others} for value in values)
    return Grid(tuple(tried), below, above)


RATIOS = _grid("forget_retain_ratio", 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Contestant:
    """What unlearns: `make` writes the checkpoint `model` into a folder; `words` say how, in a line."""

    role: Literal["ours", "variant", "rival", "control"]
    words: str
    make: Callable[[World, Values, Path], None]
    grid: Grid = Grid()


def _ours(world: World, point: Values, folder: Path, scored: Scored | None = None, **others: Any) -> None:
    """Run the product as a user would; a control has other scores or other settings in one place."""
    with scored_by(scored) if scored else nullcontext():
        _run(replace(world.settings, **{**others, **point}), folder)


@contextmanager
def scored_by(scored: Scored) -> Iterator[None]:
    """Let the runs inside this block score each set in a way of its own: no setting makes a mask of one set alone."""

    def score(model: Any, live: Any, batches: Any, dataset_type: DatasetType, **how: Any) -> Sensitivity:
        metric = scored[dataset_type]
        if metric is None:
            kept = live.value.kept
            return Sensitivity({kind: torch.ones(one.shape, dtype=torch.float64) for kind, one in kept.items()})
        return score_model(model, live, batches, dataset_type, **{**how, "prune_metric": metric})

    with mock.patch.object(trainer, "score_model", score):
        yield


def _adapters_alone(world: World, point: Values, folder: Path, kind: str) -> None:
    """Run the product with a forget loss and no pruning, in as many passes.

    The loss fades at the target for the rival too, by the mean of the rows, since the rival pushes all alike.
    """
    _uncut(world, {"forget_loss": kind, "natural_spread": False, **point}, folder, **AS_IT_IS)


def _uncut(world: World, point: Values, folder: Path, **others: Any) -> None:
    """Run the product without its cuts: steps in place of the scoring passes."""
    settings = replace(world.settings, **others)
    steps = steps_of_rival(world.settings, rows_of_step(settings))
    _run(replace(settings, **{**NONE_GOES, **steps, **point}), folder)


def _retrained(world: World, point: Values, folder: Path) -> None:
    """Train another reference: what two models that never saw the forget set differ by is the best there is."""
    world.retrain(folder / "model", world.seed + OTHER_SEED)


def _by_activation(world: World, point: Values, folder: Path) -> None:
    """Cut at once what is active on forget rows rather than on retain rows, then repair on retain rows alone.

    The product's mean |input| x column norm of both sets: in their ratio the norm cancels. Nothing steers: the cut is
    of one size, wherever P(forget) ends.
    """
    unsteered: Values = {"reference": None, "holdout": None, "forget_target": 0.5, "band": 1.0}
    unsteered |= {"recovery_steps": 0, "forget_loss": "none", **NO_FLOOR}
    once: Values = {"metric": "activation", "warmup_steps": 0, "prune_every": 1, "prune_rounds": 1, **ANY_RATIO}
    _run(replace(world.settings, **{**unsteered, **once, **point}), folder)


def _run(settings: Settings, folder: Path) -> None:
    run(replace(settings, output=str(folder)), Console(file=io.StringIO()))


def _control(words: str, retain: Metric | None, forget: Metric | None, **others: Any) -> Contestant:
    """Return ours with another mask of the same size: same data, same losses, same steps."""
    scored: Scored = {"retain": retain, "forget": forget}
    return Contestant("control", words, partial(_ours, scored=scored, **others))


def _variant(words: str, **others: Any) -> Contestant:
    return Contestant("variant", words, partial(_ours, **others))


def _rival(words: str, make: Callable[[World, Values, Path], None], grid: Grid) -> Contestant:
    return Contestant("rival", words, make, grid)


def _loss_alone(words: str, kind: str) -> Contestant:
    words = f"{words}, by the product with nothing cut, its floor included"
    return _rival(words, partial(_adapters_alone, kind=kind), RATIOS)


OURS = "ours"
METRIC = Settings().metric
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant("ours", "`loraprune unlearn` by its defaults", _ours),
    "ours, not looking ahead": _variant("its forget loss is taken where the weights are", **AS_IT_IS),
    "ours, looking ahead by 4": _variant("twice as far as by default", relearning_radius=4.0),
    "ours, steered by the mean": _variant(
        "pushed towards the reference's mean P, no row towards a goal of its own; no holdout is read",
        natural_spread=False,
    ),
    "ours, floor 0.95": _variant("what is kept of the floor rows may fall no lower", min_retain_performance=0.95),
    "ours, a fifth": _variant("asked for 20% of all parameters", sparsity=0.2),
    "ours, a half": _variant("asked for 50% of all parameters", sparsity=0.5),
    "ours, by share": _variant("groups go by the forget set's share of their score", order="share"),
    "ours, nothing cut": Contestant("variant", "the same training, steps in place of the scoring passes", _uncut),
    "retrained, another seed": Contestant(
        "variant",
        "another reference, from other first weights: as near as two come that never saw the set",
        _retrained,
    ),
    "GradDiff, LoRA": _loss_alone("gradient ascent beside the retain loss (2203.12817)", "ga"),
    "NPO, LoRA": _loss_alone("negative preference optimisation beside it (2404.05868)", "npo"),
    "SimNPO, LoRA": _loss_alone("NPO by the mean token, without the first model (2410.07163)", "simnpo"),
    "NPO, all weights": _rival("NPO beside the retain loss, every weight trained, no floor", full_npo, RATIOS),
    "RMU": _rival(
        "a layer's states on forget rows steered to a random direction, held on retain rows (2403.03218)",
        rmu,
        _grid("alpha", 20.0, 40.0, 60.0, 80.0, 160.0, steering=1.0),
    ),
    "activation ratio": _rival(
        "channels more active on forget rows than on retain rows cut at once, then repaired (2403.01267)",
        _by_activation,
        _grid("sparsity", 0.2, ASKED, 0.5, 0.65, 0.8),
    ),
    "SSD": _rival(
        "every weight damped that matters more to forget rows than to retain rows, then repaired (2308.07707)",
        damping,
        Grid(tuple({"alpha": one} for one in (1.0, 1.5, 3.0)), above={"alpha": 10.0}),
    ),
    "random mask": _control("chance", "random", "random"),
    "random mask, no floor": _control("chance, cut as far as asked", "random", "random", **NO_FLOOR),
    "retain-only mask": _control("what the retain set needs least, as LoRAPrune cuts", METRIC, None),
    "magnitude mask": _control("the smallest weights", "magnitude", None),
    "forget-only mask": _control("what the forget set needs most", None, METRIC),
}
QUICK = (OURS, "NPO, all weights", "RMU", "ours, not looking ahead", "random mask", "retain-only mask")
