"""Presets: values that stand in for the defaults, by name.

Reads    nothing
Gives    PRESETS
Source   LoRAPrune: arXiv 2305.18403, and its released code (aim-uofa/LoRAPrune, December 2024)
Symbols  -
"""

from collections.abc import Mapping
from typing import Any

_LORAPRUNE: Mapping[str, Any] = {
    "min_retain_performance": 0.0,
    "metric": "lora",
    "third_term": True,
    "score_from": "training",
    "score_every": 1,
    "moving_average": 0.9,
    "budget": "layer",
    "widths": "per_layer",
    "round_to": 1,
    "prune_every": 10,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "learning_rate": 1e-4,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "released": {
        **_LORAPRUNE,
        "score_power": 1,
        "score_norm": "module",
        "sparsity_of": "groups",
        "schedule": "released",
        "frozen_layers": ("first-tenth", "-1"),
    },
    "paper": {**_LORAPRUNE, "score_power": 2, "score_norm": "none"},
}
