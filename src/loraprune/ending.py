"""Ending: what a quantised or sharded base leaves is cut and merged in the original, and looked at as it is written.

Reads    the ends that the run may be written at, the best first; the original checkpoint
Gives    write_best, save_adapter, write_decision: what the run leaves on disk
Source   -
Symbols  end = a mask and trained adapters; the last one is the untouched model
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from loraprune.checkpoint import RunState
from loraprune.export import export_model
from loraprune.folder import whole_folder, write_json
from loraprune.mask import LiveMask
from loraprune.model import attach_lora, load_measured, load_model
from loraprune.processes import first_does
from loraprune.pruning import ModelState, restore_state
from loraprune.records import Limit, Look, Mask, ModelGroups, removal_columns
from loraprune.rules import Rules, channel_multiple, removed_share, smallest_share
from loraprune.settings import Settings
from loraprune.steering import Steering, first_acceptable, look_at

END = "end"  # the folders of what may be written begin so


@dataclass(frozen=True)
class Written:
    """Which end was written and where, what was seen of it, and the limits that better ends broke."""

    end: ModelState
    path: Path
    look: Look
    broken: tuple[Limit, ...]


def save_adapter(model: PeftModel, path: Path) -> None:
    """Write the adapters in PEFT's own form."""
    with whole_folder(path) as part:
        model.save_pretrained(str(part))
        (part / "README.md").unlink(missing_ok=True)  # PEFT's is an empty form


def write_best(
    ends: Sequence[ModelState],
    groups: ModelGroups,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    steering: Steering,
    folder: Path,
) -> Written:
    """Write the first end that holds its limits as a checkpoint, under `folder`/end-N, with its `folder`/adapter.

    Each end has a folder of its own: another machine could still see under one name what lay there before.
    """

    def path_of(number: int) -> Path:
        return folder / f"{END}-{number}"

    def look(numbered: tuple[int, ModelState]) -> Look:
        number, end = numbered
        first_does(lambda: _cut_original(end, groups, tokenizer, settings, path_of(number)))
        gc.collect()  # the original goes before what was made of it is loaded
        return look_at(load_measured(str(path_of(number)), settings), groups, end.mask, steering.probes)

    (number, end), found, broken = first_acceptable(list(enumerate(ends)), look, steering)
    return Written(end, path_of(number), found, broken)


def _cut_original(
    end: ModelState,
    groups: ModelGroups,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    path: Path,
) -> None:
    """Merge an end's adapters into the original's weights, in the machine's memory, and cut these."""
    model = attach_lora(load_model(settings.model, replace(settings, device="cpu")), settings)
    live = LiveMask(model, groups)
    restore_state(model, end)
    save_adapter(model, path.with_name("adapter"))
    live.remove()
    plain: Any = model.merge_and_unload()
    export_model(plain, tokenizer, groups, end.mask, path)


def write_decision(folder: Path, state: RunState, groups: ModelGroups, mask: Mask, rules: Rules) -> None:
    """Write which groups went, in order, a column for each thing said of them; no clock time, no text."""
    kept = {kind: mask.kept[kind].sum(1).tolist() for kind in groups.layers}
    counts = {kind: {"before": mask.kept[kind].numel(), "after": sum(kept[kind])} for kind in groups.layers}
    write_json(
        folder / "decision.json",
        {
            "ended_by": state.ended_by,
            "steps": state.step,
            "smallest_step": smallest_share(groups, rules, mask),
            "round_to": channel_multiple(groups, rules),  # in force, whether it was set or not
            "reached": removed_share(mask, groups, rules),  # of what sparsity is asked for
            "scores_left_out": state.sensitivities.skipped,  # for a number that was not finite
            "steps_left_out": state.skipped,  # for a gradient that was not finite
            "breaks": state.breaks,  # how often each limit held the run back: at a wait, a cut, or in recovery
            "sparsity": mask.sparsity(groups),
            "groups": counts,
            "kept_by_layer": kept,
            **({"factors": {kind: one.tolist() for kind, one in mask.factors.items()}} if mask.factors else {}),
            "removals": removal_columns(state.removals),
        },
    )
    temporary = folder / "mask.safetensors.part"
    save_file(mask.tensors(), temporary)
    temporary.replace(folder / "mask.safetensors")
