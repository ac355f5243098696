"""Adapter: a LoRA adapter's folder, checked against the model it shall lie on, and loaded.

Reads    adapter_config.json, adapter_model.safetensors; of a run, mask.safetensors beside its folder
Gives    check_adapter, load_adapter, adapter_folder, adapter_hash, read_adapter_config
Source   PEFT's file format
Symbols  r rank
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from loraprune.errors import UserError
from loraprune.groups import expected_shapes
from loraprune.model import adapted_projections
from loraprune.setting import flag
from loraprune.settings import Settings

CONFIG, WEIGHTS, MASK = "adapter_config.json", "adapter_model.safetensors", "mask.safetensors"
PREFIX = "base_model.model."
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
# How PEFT calls what our settings call otherwise.
OF_CONFIG = {"lora_rank": "r", "lora_alpha": "lora_alpha", "target_modules": "target_modules"}


def adapter_folder(path: str) -> Path:
    """Return the adapter's folder: the path itself, or `adapter` in the folder of a run."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG).exists():
            return folder
    raise UserError(
        f"{path} holds no adapter.",
        f"an adapter is a folder with {CONFIG} and {WEIGHTS}, or the folder of a run.",
        "correct the path.",
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return how the adapter was made; raise UserError for a kind that is not plain LoRA."""
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    used = [name for name in VARIANTS if values.get(name)]
    used += [] if isinstance(values.get("target_modules"), list) else ["target_modules as a pattern"]
    if values.get("peft_type") != "LORA" or used:
        kind = ", ".join(used) or f"peft_type {values.get('peft_type')}"
        raise UserError(
            f"the adapter {folder} is not plain LoRA ({kind}).",
            "only W + alpha / r x B A is merged, scored and written here.",
            "give a plain LoRA adapter.",
        )
    return values


def adapter_hash(folder: Path) -> str:
    """Return the SHA-256 of the adapter's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def check_adapter(settings: Settings, config: PretrainedConfig) -> None:
    """Raise UserError where the adapter that a run shall start from does not fit the run; only headers are read."""
    folder = adapter_folder(settings.adapter or "")
    projections = adapted_projections(settings, config)
    asked = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha, "target_modules": projections}
    refuse_other_config(folder, asked, flag)
    check_shapes(folder, config)
    if (mask := folder.parent / MASK).exists() and any(not bool(one.all()) for one in load_file(mask).values()):
        raise UserError(
            f"the adapter {folder} belongs to a pruned model.",
            "without the groups that its mask removed it was never trained, and this run starts with all of them.",
            f"go on from the pruned model, {folder.parent / 'model'}, or let that run itself go on.",
        )


def refuse_other_config(folder: Path, asked: Mapping[str, Any], spell: Any) -> None:
    """Raise UserError where the adapter was made with another rank, alpha or other modules than is asked for."""
    own = read_adapter_config(folder)
    for name, wanted in asked.items():
        found = own.get(OF_CONFIG.get(name, name))
        found = found if not isinstance(found, list) else tuple(sorted(found))
        if found != (tuple(sorted(wanted)) if isinstance(wanted, tuple) else wanted):
            said = ",".join(found) if isinstance(found, tuple) else f"{found}"
            raise UserError(
                f"the adapter {folder} was made with {OF_CONFIG.get(name, name)} {said}, not {_words(wanted)}.",
                "under another rank, scale or on other modules its weights would mean something else.",
                f"set {spell(name)} {said}, or give another adapter.",
            )


def _words(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def check_shapes(folder: Path, config: PretrainedConfig) -> None:
    """Raise UserError unless the adapter holds exactly the weights that its config promises for the model."""
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder} has no {WEIGHTS}.", "weights are read from safetensors alone.", "save the adapter so."
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = _adapter_shapes(read_adapter_config(folder), config)
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong or not expected:
        one = wrong[0] if wrong else "no weight at all"
        raise UserError(
            f"the adapter {folder} does not fit the model: {len(wrong)} of {len(expected)} weights, {one} the first "
            f"({found.get(one, 'absent')}; expected {expected.get(one, 'none')}).",
            "weights left out in silence would leave the model as it was.",
            "give the adapter of this very model.",
        )


def _adapter_shapes(own: Mapping[str, Any], config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module, shape in expected_shapes(config).items():
        if module.rpartition(".")[2] in own["target_modules"]:
            out, size = shape
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (own["r"], size)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (out, own["r"])
    return shapes


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter's weights, checked before, into the model's adapters; raise UserError where they add nothing."""
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    if not any(bool(one.any()) for name, one in weights.items() if ".lora_B." in name):
        raise UserError(
            f"the adapter {folder} is empty: every B is zero.",
            "it adds nothing to the model, which would be measured or trained as it was.",
            "give an adapter that was trained.",
        )
    set_peft_model_state_dict(model, weights)
