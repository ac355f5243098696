"""Checkpoint: a run's state between two steps, without a pickle.

Reads    the trainer between two steps; a folder `state` of the run
Gives    Point, RunState; state.json and safetensors: the model now, the point to roll back to, averages, random
Source   -
Symbols  moments = what the optimizer knows of each trained weight, by "index.name"
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from loraprune.errors import UserError
from loraprune.folder import settled, whole_folder, write_json
from loraprune.processes import first_does
from loraprune.pruning import ModelState
from loraprune.records import Look, Mask, Removal, removal_columns, removals_from
from loraprune.sensitivity import MovingAverage, SensitivityDict

NOW, GOOD = "now", "good"


@dataclass(frozen=True)
class Point:
    """A moment of a run to come back to: mask and trained weights, the optimizer's moments."""

    state: ModelState
    moments: Mapping[str, Tensor]


@dataclass
class RunState:
    """Where a run stands: everything that decides what comes next, apart from weights and optimizer."""

    step: int = 0
    main_end: int = 0  # the step after which recovery begins
    end: int = 0  # the last step
    ended_by: str = "budget"  # what ended the pruning
    forgetting: bool = True  # whether the forget loss is on
    forget_weight: float = 1.0  # of the forget loss; halved where training itself broke a limit
    largest_step: float = 1.0  # of sparsity; a pruning step that had to be halved sets it for those after it
    skipped: int = 0  # training steps left out, for a gradient that was not finite
    breaks: dict[str, int] = field(default_factory=dict)  # how often each limit was found broken
    removals: list[Removal] = field(default_factory=list)
    train_seconds: float = 0.0  # of all starts together, scoring included
    score_seconds: float = 0.0
    sensitivities: SensitivityDict = field(default_factory=SensitivityDict)
    good_look: Look | None = None  # the model at the point to roll back to; None before the first look
    began_well: bool = False  # whether a look since the first step was one to roll back to
    lacks_room: bool = False  # whether forgetting brought the model below a floor before P(forget) was in its band


@dataclass(frozen=True)
class SavedRun:
    """What a stopped run left: where it stood, the model as it was, and the point to roll back to."""

    run_state: RunState
    now: Point
    good: Point
    random: Mapping[str, Tensor]


def save_state(folder: Path, run_state: RunState, now: Point, good: Point) -> None:
    """Write everything that a run needs to go on from here, whole or not at all."""
    with whole_folder(folder) as part:
        for name, point in {GOOD: good, NOW: now}.items():
            _write_point(part / name, point)
        save_file(_average_tensors(run_state.sensitivities), part / "averages.safetensors")
        save_file(_random_states(), part / "random.safetensors")
        write_json(part / "state.json", _run_values(run_state))


def _write_point(folder: Path, point: Point) -> None:
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in point.state.trained.items()}, folder / "adapter.safetensors")
    save_file(point.state.mask.tensors(), folder / "mask.safetensors")
    save_file({name: one.contiguous() for name, one in point.moments.items()}, folder / "optimizer.safetensors")


def load_state(folder: Path) -> SavedRun | None:
    """Return what a stopped run left, None where nothing was saved."""
    if not first_does(lambda: settled(folder).exists()):
        return None
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if "end" not in values:
        raise UserError(
            f"{folder} was saved by an earlier release.",
            "its losses counted otherwise: going on would mix two runs.",
            "choose another --output.",
        )
    values["sensitivities"] = _read_averages(load_file(folder / "averages.safetensors"), values.pop("averages"))
    values["removals"] = removals_from(values["removals"])
    values["good_look"] = Look.from_values(values["good_look"]) if values["good_look"] else None
    now, good = _read_point(folder / NOW), _read_point(folder / GOOD)
    return SavedRun(RunState(**values), now, good, load_file(folder / "random.safetensors"))


def _read_point(folder: Path) -> Point:
    mask = Mask.from_tensors(load_file(folder / "mask.safetensors"))
    state = ModelState(mask, load_file(folder / "adapter.safetensors"))
    return Point(state, load_file(folder / "optimizer.safetensors"))


def moments_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return a copy of the optimizer's moments and step counts."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": one.detach().clone() for index, slot in state.items() for key, one in slot.items()}


def restore_moments(optimizer: Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put moments and step counts back, bit for bit; without any the optimizer is as fresh."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, one in moments.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = one.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Give torch its random states back, those that were saved."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _average_tensors(sensitivities: SensitivityDict) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": one.contiguous()
        for name, average in (("forget", sensitivities.forget), ("retain", sensitivities.retain))
        for kind, one in (average.totals or {}).items()
    }


def _read_averages(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SensitivityDict:
    def average(name: str) -> MovingAverage:
        totals: Any = {key.split(".", 1)[1]: one for key, one in tensors.items() if key.startswith(f"{name}.")}
        return MovingAverage(totals or None, values[name])

    return SensitivityDict(average("forget"), average("retain"), values["skipped"])


def _run_values(run_state: RunState) -> dict[str, Any]:
    values = {one.name: getattr(run_state, one.name) for one in fields(run_state) if one.name != "sensitivities"}
    averages = run_state.sensitivities
    return {
        **values,
        "removals": removal_columns(run_state.removals),
        "good_look": run_state.good_look.as_values() if run_state.good_look else None,
        "averages": {
            "forget": averages.forget.weight,
            "retain": averages.retain.weight,
            "skipped": averages.skipped,
        },
    }
