"""Assembled: a run's base model, adapter and mask as the pruned checkpoint that they stand for.

Reads    the base model; the adapter's folder, mask.safetensors beside it
Gives    assemble, Assembled
Source   LoRAPrune's inference script, for the three parts
Symbols  -
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PretrainedConfig

from loraprune.adapter import MASK, adapter_folder, check_shapes, load_adapter, read_adapter_config, refuse_other_config
from loraprune.config import LoraConfig
from loraprune.errors import UserError
from loraprune.export import export_model
from loraprune.groups import find_groups
from loraprune.mask import full_mask
from loraprune.model import checked_config, load_model, load_tokenizer
from loraprune.records import Mask, ModelGroups
from loraprune.settings import Settings


@dataclass(frozen=True)
class Assembled:
    """What was put together, in numbers of parameters."""

    adapter: Path
    parameters: int
    removed: int


def assemble(settings: Settings, adapter: str, asked: Mapping[str, Any], folder: Path) -> Assembled:
    """Write base + adapter, cut by the mask beside the adapter, to `folder` as a checkpoint.

    `asked`: lora_rank, lora_alpha, target_modules or lora_dropout that the adapter must have been made with.
    Raises UserError for an adapter that is empty, does not fit, or has no mask: else the unpruned model would pass for
    the pruned one.
    """
    found = adapter_folder(adapter)
    config = checked_config(settings.model, settings)
    refuse_other_config(found, asked, lambda name: f"--{name}")
    check_shapes(found, config)
    base = load_model(settings.model, settings)
    groups, mask = _read_mask(found, base, config)
    model = _with_adapter(base, found)
    export_model(model.merge_and_unload(), load_tokenizer(settings.model, settings), groups, mask, folder)
    return Assembled(found, groups.total_parameters, mask.removed_parameters(groups))


def _with_adapter(base: Any, folder: Path) -> PeftModel:
    own = read_adapter_config(folder)
    made = LoraConfig(
        r=own["r"], lora_alpha=own["lora_alpha"], target_modules=own["target_modules"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, made)
    load_adapter(model, folder)
    return model


def _read_mask(folder: Path, base: Any, config: PretrainedConfig) -> tuple[ModelGroups, Mask]:
    """Return the mask of the run that the adapter belongs to, and the groups of which it speaks."""
    path = next((one / MASK for one in (folder.parent, folder) if (one / MASK).exists()), None)
    if path is None:
        raise UserError(
            f"there is no {MASK} beside the adapter {folder}.",
            "it says which groups are removed; without it the unpruned model would be measured.",
            "name the folder of a run, or its adapter folder where it lies.",
        )
    mask = Mask.from_tensors(load_file(path))
    groups = find_groups(base, config, "q_head" if "q_head" in mask.kept else "kv_group")
    shapes = {kind: tuple(one.shape) for kind, one in full_mask(groups).kept.items()}
    if {kind: tuple(one.shape) for kind, one in mask.kept.items()} != shapes:
        said = ", ".join(f"{kind} {shape}" for kind, shape in shapes.items())
        raise UserError(f"{path} is of another model.", f"this one has {said}.", "give the model of that run.")
    return groups, mask
