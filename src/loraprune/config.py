"""Config: the adapter's configuration, with the four settings that unlearning adds to it.

Reads    keyword arguments, or an adapter folder's adapter_config.json
Gives    LoraConfig
Source   the unlearning plan, section 5; PEFT's LoraConfig
Symbols  -
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import peft

from loraprune.settings import Settings


@dataclass
class LoraConfig(peft.LoraConfig):
    """PEFT's LoRA configuration for every linear layer but the output's, with how an unlearning run decides.

    A group may go when its share S / (1 + S) of the dual score S = I_forget / (I_retain + `unlearning_epsilon`) is
    above `unlearning_threshold`; a run that is asked for a sparsity takes any, by difference, unless `order` is share.
    Each pruning step must leave retention at or above `min_retain_performance`.
    Between pruning steps the adapters are trained on L_retain + `forget_retain_ratio` x L_forget.

    Example: `LoraConfig(r=8, lora_alpha=16, unlearning_threshold=0.6)` takes only groups whose forget sensitivity is
    at least 1.5 times their retain sensitivity.
    """

    unlearning_threshold: float = field(default=Settings.unlearning_threshold)
    unlearning_epsilon: float = field(default=Settings.unlearning_epsilon)
    min_retain_performance: float = field(default=Settings.min_retain_performance)
    forget_retain_ratio: float = field(default=Settings.forget_retain_ratio)

    def __post_init__(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"  # PEFT's word for them; on a model it becomes their names
        Settings(**{name: getattr(self, name) for name in UNLEARNING_FIELDS})  # checks the ranges
        super().__post_init__()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> "LoraConfig":
        """Return the configuration of an adapter folder. differs: PEFT's own returns its class and drops our fields."""
        path = Path(pretrained_model_name_or_path, subfolder or "", "adapter_config.json")
        if not path.exists():
            raise ValueError(f"there is no adapter_config.json in {path.parent}")
        known = {one.name for one in fields(cls) if one.init}
        values = {name: value for name, value in json.loads(path.read_text()).items() if name in known}
        return cls(**{**values, **kwargs})


UNLEARNING_FIELDS = ("unlearning_threshold", "unlearning_epsilon", "min_retain_performance", "forget_retain_ratio")


def lora_config(settings: Settings, target_modules: Sequence[str]) -> LoraConfig:
    """Return the adapter configuration of a run; `target_modules` are names of the model's projections."""
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT multiplies with it, fractions hold
        lora_dropout=settings.lora_dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        **{name: getattr(settings, name) for name in UNLEARNING_FIELDS},
    )
