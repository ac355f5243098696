"""loraprune: make a language model forget by cutting out what serves the forget set and not the retain set.

Reads    -
Gives    the public names; each is imported when it is first used, so that `import loraprune` loads no torch
Source   -
Symbols  -
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraprune.attack import attack_run as attack_run
    from loraprune.config import LoraConfig as LoraConfig
    from loraprune.demo import run_demo as run_demo
    from loraprune.errors import UserError as UserError
    from loraprune.evaluation import evaluate_files as evaluate_files
    from loraprune.groups import find_groups as find_groups
    from loraprune.mask import LiveMask as LiveMask
    from loraprune.model import load_pruned as load_pruned
    from loraprune.pipeline import run as run
    from loraprune.pruning import local_prune as local_prune
    from loraprune.pruning import unlearning_prune as unlearning_prune
    from loraprune.scripts import train as train
    from loraprune.sensitivity import compute_dual_sensitivity as compute_dual_sensitivity
    from loraprune.sensitivity import compute_sensitivity as compute_sensitivity
    from loraprune.sensitivity import update_sensitivity_dict as update_sensitivity_dict
    from loraprune.settings import Settings as Settings
    from loraprune.trainer import LoRAPruneTrainer as LoRAPruneTrainer

_HOMES = {
    "LiveMask": "mask",
    "LoRAPruneTrainer": "trainer",
    "LoraConfig": "config",
    "Settings": "settings",
    "UserError": "errors",
    "attack_run": "attack",
    "compute_dual_sensitivity": "sensitivity",
    "compute_sensitivity": "sensitivity",
    "evaluate_files": "evaluation",
    "find_groups": "groups",
    "load_pruned": "model",
    "local_prune": "pruning",
    "run": "pipeline",
    "run_demo": "demo",
    "train": "scripts",
    "unlearning_prune": "pruning",
    "update_sensitivity_dict": "sensitivity",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraprune' has no attribute {name!r}")
    return getattr(import_module(f"loraprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
