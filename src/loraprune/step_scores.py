"""Step scores: sensitivities read from training's own gradients, so that scoring needs no pass of its own.

Reads    what a training step's backward passes leave on adapters, gates or frozen weights
Gives    StepScores
Source   LoRAPrune, arXiv 2305.18403, which scores in this way
Symbols  a step is one optimizer step; it may be made of several backward passes
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from loraprune.mask import LiveMask
from loraprune.processes import summed
from loraprune.records import Sensitivity
from loraprune.scoring import (
    Scores,
    add_gates,
    empty_scores,
    gradients_on,
    prunable_weights,
    random_scores,
    read_weights,
    unit_norms,
)
from loraprune.settings import Settings


class StepScores:
    """The scores of the training steps, for the metric and the frequency that the settings ask for."""

    def __init__(self, model: PeftModel, live: LiveMask, settings: Settings) -> None:
        self.model, self.live, self.settings = model, live, settings
        self.how = {"power": settings.score_power, "unit_norm": settings.score_norm == "module"}
        self.weights = prunable_weights(model, live)
        self.gathered: Scores | None = None  # of a step's passes so far

    def due(self, step: int) -> bool:
        """Say whether training step `step` (1, 2, ...) is scored."""
        return self.settings.score_from == "training" and step % self.settings.score_every == 0

    @contextmanager
    def watched(self, rows: int, device: torch.device) -> Iterator[None]:
        """Let one forward and backward pass of so many rows inside this block leave what the metric reads."""
        if self.settings.metric == "gate":
            with self.live.gates(rows, device) as gates:
                yield
            self.gathered = self.gathered or empty_scores(self.live)
            add_gates(self.gathered, self.model, self.live, gates, "retain", self.settings.score_power)
        elif self.settings.metric == "grad":
            with gradients_on(self.weights):
                yield
        else:
            yield

    def take_frozen(self) -> None:
        """Read metric grad at once and drop the frozen weights' gradients: clipping must not see them."""
        if self.settings.metric == "grad":
            self.gathered = read_weights(self.model, self.live, "retain", "grad", **self.how)
            for weight in self.weights:
                weight.grad = None

    def read(self) -> Sensitivity:
        """Return the step's score, once all its passes are done and before its gradients are used up."""
        settings, values = self.settings, self.gathered
        if settings.metric == "random":
            values = random_scores(self.live, "retain", settings.seed)
        elif values is None:
            how: dict[str, Any] = {**self.how, "third_term": settings.third_term}
            values = read_weights(self.model, self.live, "retain", settings.metric, **how)
        elif settings.metric == "gate":
            summed(values.values())
            values = unit_norms(values) if settings.score_norm == "module" else values
        self.gathered = None
        return Sensitivity(values)
