"""Checkpoint: a run's state between two steps, without a pickle.

Reads    the trainer between two steps; a folder `state` of the run
Gives    state.json and safetensors: adapter, mask, averages, optimizer, random state; all of one step
Source   -
Symbols  -
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from loraprune.folder import settled, whole_folder, write_json
from loraprune.pruning import ModelState
from loraprune.records import Mask, Removal, removal_columns, removals_from
from loraprune.sensitivity import MovingAverage, SensitivityDict


@dataclass
class RunState:
    """Where a run stands: everything that decides what comes next, apart from weights and optimizer."""

    step: int = 0
    main_end: int = 0  # the step after which recovery begins
    ended_by: str = "budget"  # what ended the pruning
    forgetting: bool = True  # whether the forget loss is on
    largest_step: float = 1.0  # of sparsity; a pruning step that had to be halved sets it for those after it
    removals: list[Removal] = field(default_factory=list)
    train_seconds: float = 0.0  # of all starts together, scoring included
    score_seconds: float = 0.0
    sensitivities: SensitivityDict = field(default_factory=SensitivityDict)


def save_state(folder: Path, run_state: RunState, state: ModelState, optimizer: Optimizer) -> None:
    """Write everything that a run needs to go on from here, whole or not at all."""
    with whole_folder(folder) as part:
        save_file({name: one.contiguous() for name, one in state.trained.items()}, part / "adapter.safetensors")
        save_file({**state.mask.kept}, part / "mask.safetensors")
        save_file(_average_tensors(run_state.sensitivities), part / "averages.safetensors")
        save_file(_optimizer_tensors(optimizer), part / "optimizer.safetensors")
        save_file(_random_states(), part / "random.safetensors")
        write_json(part / "state.json", _run_values(run_state))


def load_state(folder: Path) -> tuple[RunState, ModelState] | None:
    """Return where a run stood and the weights it had, None where nothing was saved; then `resume_optimizer`."""
    if not settled(folder).exists():
        return None
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    sensitivities = _read_averages(load_file(folder / "averages.safetensors"), values.pop("averages"))
    removals = removals_from(values.pop("removals"))
    state = ModelState(Mask(load_file(folder / "mask.safetensors")), load_file(folder / "adapter.safetensors"))  # type: ignore[arg-type]
    return RunState(**values, removals=removals, sensitivities=sensitivities), state


def resume_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Give a fresh optimizer its moments and step counts back, and torch its random states."""
    tensors = load_file(folder / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, one in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = one
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": one.contiguous() for index, slot in state.items() for key, one in slot.items()}


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
    one = run_state.sensitivities
    return {
        "step": run_state.step,
        "main_end": run_state.main_end,
        "ended_by": run_state.ended_by,
        "forgetting": run_state.forgetting,
        "largest_step": run_state.largest_step,
        "train_seconds": run_state.train_seconds,
        "score_seconds": run_state.score_seconds,
        "removals": removal_columns(run_state.removals),
        "averages": {"forget": one.forget.weight, "retain": one.retain.weight, "skipped": one.skipped},
    }
