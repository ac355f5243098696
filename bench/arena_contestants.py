"""Contestants of the arena: ours, its rivals and its controls, each with the points of its small grid.

Reads    a world, a point
Gives    CONTESTANTS, Contestant
Source   Selective Pruning, arXiv 2403.01267; GradDiff, NPO and SimNPO as loraprune.objectives has them
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
from arena_worlds import Values, World
from rich.console import Console

from loraprune import trainer
from loraprune.pipeline import run
from loraprune.records import DatasetType, Metric, Sensitivity
from loraprune.scoring import score_model
from loraprune.settings import Settings

Scored = Mapping[DatasetType, Metric | None]  # by what each set is scored; None: all groups alike
ANY_RATIO: Values = {"order": "share", "unlearning_threshold": 0.0, "minimum_forget_sensitivity": 0.0}
NONE_GOES: Values = {"unlearning_threshold": 1.0, "order": "share", "metric": "random"}
RATIOS = tuple({"forget_retain_ratio": ratio} for ratio in (0.3, 1.0, 3.0))
OTHER_SEED = 1000  # added to the world's
DEFAULT = 1  # the point in the middle: the one of the quick form


@dataclass(frozen=True)
class Contestant:
    """What unlearns: `make` writes the checkpoint `model` into a folder."""

    role: Literal["ours", "variant", "rival", "control"]
    make: Callable[[World, Values, Path], None]
    points: tuple[Values, ...] = ({},)

    def default(self) -> Values:
        return self.points[min(DEFAULT, len(self.points) - 1)]


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
    unsteered |= {"min_retain_performance": 0.0, "recovery_steps": 0, "forget_loss": "none"}
    once: Values = {"metric": "activation", "warmup_steps": 0, "prune_every": 1, "prune_rounds": 1, **ANY_RATIO}
    _run(replace(world.settings, **{**unsteered, **once, **point}), folder)


def _run(settings: Settings, folder: Path) -> None:
    run(replace(settings, output=str(folder)), Console(file=io.StringIO()))


def _control(retain: Metric | None, forget: Metric | None, **others: Any) -> Contestant:
    """Return ours with another mask of the same size: same data, same losses, same steps."""
    scored: Scored = {"retain": retain, "forget": forget}
    return Contestant("control", partial(_ours, scored=scored, **others))


OURS = "ours"
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant("ours", _ours),
    "ours, not looking ahead": Contestant("variant", partial(_ours, **AS_IT_IS)),
    "ours, by share": Contestant("variant", partial(_ours, order="share")),
    "ours, nothing cut": Contestant("variant", _uncut),
    "retrained, another seed": Contestant("variant", _retrained),
    "GradDiff, LoRA": Contestant("rival", partial(_adapters_alone, kind="ga"), RATIOS),
    "NPO, LoRA": Contestant("rival", partial(_adapters_alone, kind="npo"), RATIOS),
    "SimNPO, LoRA": Contestant("rival", partial(_adapters_alone, kind="simnpo"), RATIOS),
    "NPO, all weights": Contestant("rival", full_npo, RATIOS),
    "RMU": Contestant("rival", rmu, tuple({"steering": one, "alpha": 10.0} for one in (1.0, 1.5, 3.0))),
    "activation ratio": Contestant("rival", _by_activation, tuple({"finish_steps": one} for one in (25, 100, 350))),
    "SSD": Contestant("rival", damping, tuple({"alpha": one} for one in (1.0, 1.5, 3.0))),
    "random mask": _control("random", "random"),
    "random mask, no floor": _control("random", "random", min_retain_performance=0.0),
    "retain-only mask": _control(Settings().metric, None),
    "magnitude mask": _control("magnitude", None),
    "forget-only mask": _control(None, Settings().metric),
}
QUICK = (OURS, "NPO, all weights", "RMU", "ours, not looking ahead", "random mask", "retain-only mask")
